"""Claims of "TokenRing", arXiv 2412.20501."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from manyheads.cost.parallel import Mesh, predict
from manyheads.cost.schedules import Sequence
from manyheads.engines.dense import attention
from manyheads.parallel import LocalRanks, record, ring_self_attention, shard, token_ring
from manyheads.parallel.local import group_of
from manyheads.reproduce.claims import Claim, Finding, Verdict

WORLD, HEADS, WIDTH = 4, 4, 16


def judge(confirmed: bool) -> Verdict:
    """Confirmed or refuted."""
    return Verdict.CONFIRMED if confirmed else Verdict.REFUTED


def errors_on_rank(world: int, causal: bool, seed: int) -> float | None:
    """Largest relative error (norms) of output and gradients against one process."""
    group = group_of(world)
    if group is None:
        return None
    torch.manual_seed(seed)
    layout = "zigzag" if causal else "contiguous"
    *wholes, grad = torch.randn(4, 2, HEADS, 48, WIDTH, dtype=torch.float64).unbind()
    wholes = [t.requires_grad_() for t in wholes]
    want = attention(*wholes, causal=causal, backend="reference")
    assert isinstance(want, Tensor)
    want.backward(grad)

    def cut(tensor: Tensor) -> Tensor:
        return shard(tensor, group.rank(), world, dim=2, layout=layout)

    locals_ = [cut(t.detach()).float().requires_grad_() for t in wholes]
    out = token_ring(*locals_, group=group, causal=causal, layout=layout)
    assert isinstance(out, Tensor)
    out.backward(cut(grad).float())
    pairs = [(out, cut(want)), *((a.grad, cut(b.grad)) for a, b in zip(locals_, wholes) if b.grad is not None)]
    return max(float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs if a is not None)


def _exact(seed: int) -> Finding:
    found = {}
    with LocalRanks(WORLD) as ranks:
        for world in (2, 3, 4):
            for name, causal in (("bidirectional", False), ("causal", True)):
                errors = ranks.run(errors_on_rank, world, causal, seed)
                found[f"{name} W={world}"] = max(error for error in errors if error is not None)
    return Finding(found, 1e-5, judge(max(found.values()) < 1e-5))


def traffic_on_rank(kv_heads: int, seed: int) -> dict[str, int]:
    """Bytes that this rank sends in each direction during a forward pass."""
    torch.manual_seed(seed)
    query, key = torch.randn(1, HEADS, 32, WIDTH), torch.randn(1, kv_heads, 32, WIDTH)
    with record() as ring, torch.no_grad():
        ring_self_attention(query, key, key)
    with record() as tokens, torch.no_grad():
        token_ring(query, key, key)
    return {"ring": ring.sent(), "queries": tokens.sent(what="query"), "outputs": tokens.sent(what="output")}


def _direction(kv_heads: int, seed: int) -> tuple[float, dict[str, int]]:
    with LocalRanks(WORLD) as ranks:
        sent = ranks.run(traffic_on_rank, kv_heads, seed)[0]
    return max(sent["queries"], sent["outputs"]) / sent["ring"], sent


def _half_volume(seed: int) -> Finding:
    ratio, sent = _direction(HEADS, seed)
    expected = (WIDTH + 1) / (2 * WIDTH)
    return Finding(ratio, expected, judge(abs(ratio / expected - 1) <= 0.01), sent)


def _grouped(seed: int) -> Finding:
    ratio, sent = _direction(HEADS // 4, seed)
    return Finding(ratio, 1.0, judge(ratio < 1), sent)


def _speed_up(tokens: int, world: int, kv_heads: int) -> float:
    slow = Mesh(bandwidth=1e9, links="mesh")  # every step waits for its messages
    sequence = Sequence(tokens * world, world, heads=32, kv_heads=kv_heads, causal=False)
    ring, tokens_ring = (predict(method, sequence, slow).forward for method in ("ring", "token_ring"))
    return float(ring / tokens_ring)


def _links(seed: int) -> Finding:
    sweep = {(n, w, g): _speed_up(n, w, g) for n in (512, 2048, 8192) for w in (4, 8, 32) for g in (32, 8, 4)}
    whole = [value for (_, _, g), value in sweep.items() if g == 32]
    grouped = [value for (_, _, g), value in sweep.items() if g < 16]
    right = max(whole) <= 2 and min(whole) > 1 and max(grouped) < 1
    found = {"slowest, all heads": min(whole), "fastest, all heads": max(whole), "fastest, grouped": max(grouped)}
    details = {f"n={n} W={w} kv_heads={g}": value for (n, w, g), value in sweep.items()}
    return Finding(found, 2.0, judge(right), details | {"mesh": dataclasses.asdict(Mesh(bandwidth=1e9, links="mesh"))})


def pairs_on_rank(tokens: int, seed: int) -> list[int]:
    """Query-key pairs that this rank computes at every step of the causal form."""
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, 1, HEADS, tokens, WIDTH).unbind()
    with record() as log, torch.no_grad():
        token_ring(query, key, value, causal=True, layout="zigzag")
    return [log.pairs["token_ring", step] for step in range(WORLD)]


def _balanced(seed: int) -> Finding:
    tokens = 64
    with LocalRanks(WORLD) as ranks:
        found = ranks.run(pairs_on_rank, tokens, seed)
    later = {pairs for steps in found for pairs in steps[1:]}
    first = {steps[0] for steps in found}
    right = later == {tokens**2 // 2} and len(first) == 1
    worst = max(max(step) * WORLD / sum(step) for step in zip(*found))
    return Finding(worst, 1.0, judge(right), {"pairs by rank and step": found})


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "token_ring",
        "exact",
        "Queries that travel and outputs that come home give exact attention, and so do the gradients.",
        "2, 3 and 4 processes, both forms: confirmed if the relative errors (norms) of output and gradients against "
        "one process are below 1e-5; refuted otherwise.",
        _exact,
    ),
    Claim(
        "token_ring",
        "half_the_volume",
        "Each direction of a link carries half of what ring attention sends in its one direction.",
        "As many key/value heads as query heads: confirmed if the bytes of the busier direction over ring attention's "
        "are within 1% of (d + 1) / (2 d); refuted otherwise.",
        _half_volume,
    ),
    Claim(
        "token_ring",
        "half_the_volume_grouped",
        "The busier direction carries less than ring attention's also with a quarter of key/value heads.",
        "Key/value heads are a quarter of the heads: confirmed if the busier direction carries fewer bytes than ring "
        "attention sends; refuted otherwise.",
        _grouped,
    ),
    Claim(
        "token_ring",
        "faster_on_slow_links",
        "Where links are the bottleneck TokenRing is faster, up to twice, and only without grouped heads.",
        "Cost model, direct duplex links of 1 GB/s, 512 to 8192 tokens a rank, 4 to 32 ranks: confirmed if the "
        "speed-up over ring attention is above 1 and at most 2 with 32 of 32 key/value heads, and below 1 with 8 or 4; "
        "refuted otherwise.",
        _links,
        "manyheads compare --parallel",
    ),
    Claim(
        "token_ring",
        "balanced_causal_work",
        "The causal form gives all ranks equal work at every step.",
        "4 ranks, zigzag: confirmed if every rank computes n^2 / 2 pairs at every step after the first, and equally "
        "many at the first; refuted otherwise.",
        _balanced,
    ),
)
