"""Claims of "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", arXiv 2502.07563."""

from __future__ import annotations

import math
import time
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from manyheads.engines.linear import linear_attention
from manyheads.parallel import LinearMoEAttention, LocalRanks, lasp, lasp2, record
from manyheads.parallel.local import group_of
from manyheads.parallel.wire import Pending
from manyheads.reproduce.claims import Claim, Finding, Verdict

WORLD, HEADS, WIDTH = 4, 2, 16
DELAY = 0.005  # seconds that every message or collective takes longer


def judge(confirmed: bool) -> Verdict:
    """Confirmed or refuted."""
    return Verdict.CONFIRMED if confirmed else Verdict.REFUTED


def errors_on_rank(decay: bool, causal: bool, seed: int) -> float:
    """Largest relative error (norms) of output and gradients against one process."""
    torch.manual_seed(seed)
    log_decay = -torch.rand(HEADS) if decay else None
    *wholes, grad = torch.randn(4, 2, HEADS, 256, WIDTH, dtype=torch.float64).unbind()
    wholes = [t.requires_grad_() for t in wholes]
    given = None if log_decay is None else log_decay.double()
    want = cast(Tensor, linear_attention(*wholes, log_decay=given, causal=causal, backend="reference"))
    want.backward(grad)

    def cut(tensor: Tensor) -> Tensor:
        return tensor.chunk(dist.get_world_size(), dim=2)[dist.get_rank()]

    locals_ = [cut(t.detach()).float().requires_grad_() for t in wholes]
    out = cast(Tensor, lasp2(*locals_, log_decay=log_decay, causal=causal))
    out.backward(cut(grad).float())
    pairs = [(out, cut(want)), *((a.grad, cut(b.grad)) for a, b in zip(locals_, wholes) if b.grad is not None)]
    return max(float((a.double() - b).detach().norm() / b.detach().norm()) for a, b in pairs if a is not None)


def _exact(seed: int) -> Finding:
    forms = {"no decay": (False, True), "decay": (True, True), "noncausal": (False, False)}
    with LocalRanks(WORLD) as ranks:
        found = {name: max(ranks.run(errors_on_rank, *form, seed)) for name, form in forms.items()}
    return Finding(found, 1e-5, judge(max(found.values()) < 1e-5))


def messages_on_rank(name: str, world: int, length: int, seed: int) -> dict[str, list] | None:
    """(kind, bytes sent, bytes received) of every message of this rank, forward and backward."""
    group = group_of(world)
    if group is None:
        return None
    torch.manual_seed(seed)
    inputs = [torch.randn(1, HEADS, length // world, WIDTH, requires_grad=True) for _ in range(3)]
    found = {}
    with record() as log:
        out = cast(Tensor, {"lasp2": lasp2, "lasp": lasp}[name](*inputs, group=group))
        found["forward"] = [(m.kind, m.sent, m.received) for m in log.messages]
    with record() as log:
        out.sum().backward()
        found["backward"] = [(m.kind, m.sent, m.received) for m in log.messages]
    return found


def _one_collective(seed: int) -> Finding:
    with LocalRanks(WORLD) as ranks:
        found = {n: ranks.run(messages_on_rank, "lasp2", WORLD, n, seed) for n in (256, 4096)}
    single = all(
        len(one[way]) == 1 and one[way][0][0] == "all_gather"
        for by_rank in found.values() for one in by_rank for way in ("forward", "backward")
    )  # fmt: skip
    sizes = {f"N={n}": float(by_rank[0]["forward"][0][1]) for n, by_rank in found.items()}
    return Finding(sizes, None, judge(single and found[256] == found[4096]), {"rank 0": found[256][0]})


def seconds_on_rank(name: str, world: int, seed: int) -> float | None:
    """The fastest of some forward and backward passes with every message late by ``DELAY``."""
    group = group_of(world)
    if group is None:
        return None
    torch.manual_seed(seed)
    inputs = [torch.randn(1, HEADS, 64, WIDTH, requires_grad=True) for _ in range(3)]
    wait = Pending.wait

    def late(self: Pending) -> None:
        # A receiver sees the message late; what a sender does meanwhile is not held up.
        arrives = any(kind != "send" for kind, _, _ in self.peers)
        wait(self)
        if arrives:
            time.sleep(DELAY)

    Pending.wait, best = late, math.inf
    try:
        for _ in range(6):
            dist.barrier(group)
            start = time.perf_counter()
            cast(Tensor, {"lasp2": lasp2, "lasp": lasp}[name](*inputs, group=group)).sum().backward()
            best = min(best, time.perf_counter() - start)
    finally:
        Pending.wait = wait
    return best


def _fewer_steps(seed: int) -> Finding:
    steps, seconds = {}, {}
    with LocalRanks(WORLD) as ranks:
        for world in (2, 3, 4):
            for name in ("lasp", "lasp2"):
                sent = [one for one in ranks.run(messages_on_rank, name, world, 64 * world, seed) if one is not None]
                # Every hop of LASP waits for the one before; a collective is one step for all ranks.
                posted = [m for one in sent for way in one.values() for m in way if m[0] == "send"]
                gathers = [m for way in sent[0].values() for m in way if m[0] == "all_gather"]
                steps[f"{name} W={world}"] = len(posted) + len(gathers)
                times = ranks.run(seconds_on_rank, name, world, seed)
                seconds[f"{name} W={world}"] = max(t for t in times if t is not None)
    right = all(steps[f"lasp W={w}"] == 2 * (w - 1) and steps[f"lasp2 W={w}"] == 2 for w in (2, 3, 4))
    right &= all(seconds[f"lasp2 W={w}"] < seconds[f"lasp W={w}"] for w in (3, 4))
    measured, baseline = ({n: v for n, v in seconds.items() if n.startswith(f"{name} ")} for name in ("lasp2", "lasp"))
    return Finding(measured, baseline, judge(right), {"sequential steps": steps, "delay": DELAY})


def hybrid_loss(pattern: str, seed: int) -> float:
    """Test loss of a byte model whose layers are linear (L) or softmax (N)."""
    # Imported here, because every rank of the other claims imports this module.
    from manyheads.reproduce import byte_lm

    torch.manual_seed(seed)
    model = byte_lm.ByteLM("gpt")
    for block, letter in zip(model.blocks, pattern):
        if letter == "L":
            mixer = LinearMoEAttention(byte_lm.WIDTH, byte_lm.HEADS)
            for module in mixer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
            cast(nn.ModuleList, block)[1] = mixer
    return byte_lm.train_byte_lm(model, seed, steps=150)[1]


def _hybrid(seed: int) -> Finding:
    found = {pattern: hybrid_loss(pattern, seed) for pattern in ("LLLL", "LLLN", "NNNN")}
    linear, hybrid, softmax = found.values()
    between = min(linear, softmax) <= hybrid <= max(linear, softmax)
    return Finding(hybrid, {"LLLL": linear, "NNNN": softmax},
                   judge(between and abs(hybrid - softmax) < abs(hybrid - linear)), {"losses": found})  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "lasp2",
        "exact",
        "Linear attention with gathered states equals that of one device, forward and backward.",
        "4 processes of 64 tokens, with and without decay, causal and not: confirmed if the relative errors (norms) of "
        "output and gradients are below 1e-5 in float32; refuted otherwise.",
        _exact,
    ),
    Claim(
        "lasp2",
        "one_collective",
        "A layer makes one all-gather forward and one backward, whose size does not depend on the length.",
        "256 and 4096 tokens over 4 ranks: confirmed if every rank records exactly one all-gather each way and nothing "
        "else, with equal bytes for both lengths; refuted otherwise.",
        _one_collective,
    ),
    Claim(
        "lasp2",
        "fewer_steps",
        "LASP-2 needs two communication steps where LASP needs 2 (W - 1) that wait for each other, and is faster.",
        "2, 3, 4 ranks, every message 5 ms late: confirmed if the recorded steps are 2 and 2 (W - 1) and LASP-2's "
        "forward and backward pass is faster for 3 and 4 ranks; refuted otherwise.",
        _fewer_steps,
        "manyheads compare --parallel",
    ),
    Claim(
        "lasp2",
        "hybrid_closes_the_gap",
        "Replacing a quarter of the linear layers by softmax layers nearly closes the gap to a softmax model.",
        "Byte models of 4 layers (width 128, 150 steps of 12 x 128): confirmed if the test loss of LLLN lies between "
        "those of LLLL and NNNN, closer to NNNN; refuted otherwise.",
        _hybrid,
    ),
)
