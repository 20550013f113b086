"""Claims of "Sequence Parallelism: Long Sequence Training from System Perspective", arXiv 2105.13120."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manyheads.parallel import LocalRanks, record, ring_self_attention, rsa_attention, rsa_linformer
from manyheads.parallel.local import group_of
from manyheads.reproduce.claims import Claim, Finding, Verdict

WORLD, BATCH, HEADS, WIDTH = 4, 1, 2, 16
LAYOUTS = ("contiguous", "zigzag", "striped")


def judge(confirmed: bool) -> Verdict:
    """Confirmed or refuted."""
    return Verdict.CONFIRMED if confirmed else Verdict.REFUTED


def shards(seed: int, tokens: int) -> list[Tensor]:
    """This rank's query, key, value."""
    torch.manual_seed(seed + dist.get_rank())
    return [torch.randn(BATCH, HEADS, tokens, WIDTH, requires_grad=True) for _ in range(3)]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def smollm2_on_rank(tokens: int) -> dict[str, dict[str, float]] | None:
    """Rank 0: relative errors of loss and gradients of every layout against the model on this rank alone."""
    from transformers.utils import logging

    from manyheads.data.language_models import load_language_model
    from manyheads.data.text import python_documentation
    from manyheads.parallel.context_parallel import context_parallel

    logging.disable_progress_bar()  # four bars on one terminal
    model, tokenizer = load_language_model("smollm2")
    ids = torch.tensor([tokenizer(python_documentation()[: 8 * tokens])["input_ids"][:tokens]])
    want, loss = {}, 0.0
    if dist.get_rank() == 0:
        alone = model(input_ids=ids, labels=ids, use_cache=False).loss
        alone.backward()
        want, loss = _gradients(model), float(alone.detach())
    errors = {}
    for layout in LAYOUTS:
        model.zero_grad()
        with context_parallel(model, method="ring", layout=layout):
            sharded = model(input_ids=ids, labels=ids, use_cache=False).loss
            sharded.backward()
        if want:
            off = sum(float((grad - want[name]).square().sum()) for name, grad in _gradients(model).items())
            size = sum(float(grad.square().sum()) for grad in want.values())
            errors[layout] = {
                "loss": abs(float(sharded.detach()) - loss) / abs(loss),
                "gradients": (off / size) ** 0.5,
            }
    return errors or None


def _exact(seed: int) -> Finding:
    needs = ["manyheads.parallel.context_parallel", "manyheads.data.language_models", "transformers.models.llama"]
    with LocalRanks(WORLD, timeout=300, preload=needs) as ranks:
        errors = ranks.run(smollm2_on_rank, 512)[0]
    worst = {layout: max(found.values()) for layout, found in errors.items()}
    return Finding(worst, 1e-4, judge(max(worst.values()) < 1e-4), {"errors": errors})


def saved_on_rank(world: int, name: str, tokens: int, seed: int) -> dict[str, int] | None:
    """What a rank's forward pass keeps for the backward pass: bytes in all, numbers in the largest tensor."""
    group = group_of(world)
    if group is None:
        return None
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = shards(seed, tokens)
    with record() as log, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if name == "linformer":
            projections = [torch.randn(32, tokens, requires_grad=True) for _ in range(2)]
            out = rsa_linformer(*inputs, *projections, group=group)
        else:
            out = {"ring": ring_self_attention, "rsa": rsa_attention}[name](*inputs, group=group)
        assert isinstance(out, Tensor)
        out.sum().backward()
    return {
        "bytes": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        "largest": max(tensor.numel() for tensor in kept.values()),
        "block": max(log.pairs.values(), default=0),
    }


def _memory(seed: int) -> Finding:
    whole, found = 1024, {}
    with LocalRanks(WORLD) as ranks:
        for name in ("ring", "rsa"):
            for world in (1, 2, 4):
                found[f"{name} W={world}"] = ranks.run(saved_on_rank, world, name, whole // world, seed)[0]
    share = {w: found[f"ring W={w}"]["bytes"] / found["ring W=1"]["bytes"] for w in (2, 4)}
    scores = {w: found[f"rsa W={w}"]["largest"] for w in (1, 2, 4)}
    blocks = {w: found[f"ring W={w}"]["block"] for w in (1, 2, 4)}
    right = all(abs(share[w] * w - 1) <= 0.1 for w in (2, 4))
    right &= all(scores[w] == BATCH * HEADS * (whole // w) * whole for w in scores)
    right &= all(blocks[w] == (whole // w) ** 2 for w in blocks)
    right &= found["ring W=4"]["largest"] <= 2 * BATCH * HEADS * (whole // 4) * WIDTH
    return Finding({f"W={w}": value for w, value in share.items()}, {"W=2": 0.5, "W=4": 0.25}, judge(right), found)


def volume_on_rank(tokens: int, seed: int) -> int:
    """Numbers that this rank sends in a forward and a backward pass of the paper's form."""
    with record() as log:
        rsa_attention(*shards(seed, tokens), reduction="all_reduce").sum().backward()
    return log.sent() // 4


def _volume(seed: int) -> Finding:
    tokens = 64
    with LocalRanks(WORLD) as ranks:
        sent = ranks.run(volume_on_rank, tokens, seed)
    # Four all-reduces of (B, N, H d) a layer, 2 (W - 1) / W of which every rank sends.
    tensor_parallel = 8 * (WORLD - 1) * BATCH * HEADS * tokens * WIDTH
    return Finding(
        float(max(sent)), float(tensor_parallel), judge(set(sent) == {tensor_parallel}), {"sent by rank": sent}
    )


def pairs_on_rank(layout: str, tokens: int, seed: int) -> list[int]:
    """Query-key pairs that this rank computes at every step."""
    with record() as log, torch.no_grad():
        ring_self_attention(*shards(seed, tokens), causal=True, layout=layout)
    return [log.pairs["ring_self_attention", step] for step in range(WORLD)]


def _balance(seed: int) -> Finding:
    tokens = 256
    with LocalRanks(WORLD) as ranks:
        found = {layout: ranks.run(pairs_on_rank, layout, tokens, seed) for layout in LAYOUTS}
    totals = {layout: [sum(steps) for steps in by_rank] for layout, by_rank in found.items()}
    ratio = {layout: max(total) / (sum(total) / WORLD) for layout, total in totals.items()}
    equal = all(len(set(step)) == 1 for step in zip(*found["zigzag"]))
    expected = 2 - 1 / WORLD
    right = equal and ratio["zigzag"] == 1 and abs(ratio["contiguous"] / expected - 1) <= 0.02
    return Finding(ratio, {"zigzag": 1.0, "contiguous": expected}, judge(right), {"pairs by rank and step": found})


def _linformer(seed: int) -> Finding:
    tokens, found = 256, {}
    with LocalRanks(WORLD) as ranks:
        for world in (1, 2, 4):
            found[f"W={world}"] = float(ranks.run(saved_on_rank, world, "linformer", tokens, seed)[0]["bytes"])
    return Finding(found, None, judge(max(found.values()) <= 1.01 * min(found.values())), {"tokens a rank": tokens})


def _claim(name: str, statement: str, rule: str, run: Callable[[int], Finding], full_scale: str = "") -> Claim:
    return Claim("ring_self_attention", name, statement, rule, run, full_scale)


CLAIMS: tuple[Claim, ...] = (
    _claim(
        "exact",
        "A model whose sequence is sharded over a ring computes what one device computes.",
        "SmolLM2-135M on 512 tokens of documentation, 4 processes, each layout: confirmed if the relative errors of "
        "the loss and of all gradients together (norms) against one process are below 1e-4; refuted otherwise.",
        _exact,
    ),
    _claim(
        "memory_falls",
        "Activations on a rank shrink with the number of ranks; the paper's form keeps n x N scores, streaming n x n.",
        "1024 tokens over 1, 2, 4 ranks: confirmed if what the streaming form keeps for the backward pass is within "
        "10% of 1/W and its largest tensor no larger than keys and values, the paper's form keeps exactly B H n N "
        "scores, and the streaming form's largest block has n^2 pairs; refuted otherwise.",
        _memory,
    ),
    _claim(
        "volume_of_tensor_parallel",
        "Sequence parallelism with all-reduced gradients sends as much as Megatron's tensor parallelism.",
        "Confirmed if every one of 4 ranks sends exactly 8 (W - 1) B H n d numbers in a forward and a backward pass; "
        "refuted otherwise.",
        _volume,
    ),
    _claim(
        "zigzag_balances",
        "Under a causal mask the zigzag layout gives all ranks equal work, the contiguous one does not.",
        "4 ranks of 256 tokens: confirmed if with zigzag all ranks compute equally many pairs at every step, and with "
        "contiguous the busiest rank's share over the mean is within 2% of 2 - 1/W; refuted otherwise.",
        _balance,
    ),
    _claim(
        "sparse_has_no_limit",
        "With Linformer's attention the memory of a rank does not depend on the length of the whole sequence.",
        "256 tokens a rank on 1, 2, 4 ranks: confirmed if the bytes kept for the backward pass vary by at most 1%; "
        "refuted otherwise.",
        _linformer,
    ),
)
