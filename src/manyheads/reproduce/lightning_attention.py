"""Claims of "Various Lengths, Constant Speed" (lightning attention, TNL), arXiv 2405.17381."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from manyheads.ops.lightning import lightning_attention, lightning_slopes
from manyheads.reproduce.byte_lm import ByteLM, train_byte_lm
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.clock import thread_seconds

_FULL = "manyheads compare --pattern causal-self --length {} --device cuda --dtype bfloat16"


def judge(confirmed: bool) -> Verdict:
    """Confirmed or refuted."""
    return Verdict.CONFIRMED if confirmed else Verdict.REFUTED


def tokens_per_second(run: Callable[[Tensor], object], length: int, seed: int, repeats: int = 5) -> float:
    """From the fastest run on (1, 4, length, 32) inputs, in CPU time of one thread."""
    torch.manual_seed(seed)
    x = torch.randn(1, 4, length, 32)
    return length / thread_seconds(lambda: run(x), repeats=repeats)


def _forward(backend: str) -> Callable[[Tensor], object]:
    def run(x: Tensor) -> None:
        with torch.no_grad():
            lightning_attention(x, x, x, slopes=lightning_slopes(4), backend=backend)

    return run


def _both_ways(backend: str) -> Callable[[Tensor], object]:
    def run(x: Tensor) -> None:
        x = x.detach().requires_grad_()
        # Autograd may hand the backward to another thread, whose time thread_time would miss.
        with torch.autograd.set_multithreading_enabled(False):
            out = cast(Tensor, lightning_attention(x, x, x, slopes=lightning_slopes(4), backend=backend))
            out.sum().backward()

    return run


def constant_speed(make: Callable[[str], Callable[[Tensor], object]], seed: int) -> Finding:
    """Tokens per second of the blocked operator from 1k to 32k tokens, of the quadratic form from 1k to 2k."""
    speed = {n: tokens_per_second(make("chunked"), n, seed) for n in (1024, 4096, 8192, 32768)}
    slow = {n: tokens_per_second(make("reference"), n, seed, repeats=3) for n in (1024, 2048)}
    spread = max(speed.values()) / min(speed.values()) - 1
    fall = slow[1024] / slow[2048]
    return Finding(
        measured={"spread": spread},
        baseline={"quadratic_slowdown_per_doubling": fall},
        verdict=judge(spread <= 0.25 and fall >= 1.5),
        details={"tokens_per_second": speed, "quadratic_tokens_per_second": slow},
    )


def _exact(seed: int) -> Finding:
    torch.manual_seed(seed)
    errors = {}
    for dtype in (torch.float64, torch.float32):
        q, k, v = torch.randn(3, 1, 4, 500, 32, dtype=dtype).unbind()
        want = lightning_attention(
            q.double(), k.double(), v.double(), slopes=lightning_slopes(4), backend="recurrent", return_state=True
        )
        for backend in ("chunked", "reference"):
            got = lightning_attention(q, k, v, slopes=lightning_slopes(4), backend=backend, return_state=True)
            error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want))
            errors[f"{backend} {str(dtype).removeprefix('torch.')}"] = error
    limits = {name: 1e-12 if "64" in name else 1e-5 for name in errors}
    return Finding(errors, limits, judge(all(errors[n] <= limits[n] for n in errors)))


@functools.cache
def _loss(seed: int, kind: str, decay: bool = True) -> float:
    # Two claims compare with the same model: it is trained once.
    torch.manual_seed(seed)
    return train_byte_lm(ByteLM(kind, decay=decay), seed)[1]


def _matches_softmax(seed: int) -> Finding:
    tnl, gpt = _loss(seed, "tnl"), _loss(seed, "gpt")
    return Finding(tnl, gpt, judge(tnl <= gpt))


def _decay_helps(seed: int) -> Finding:
    tnl, without = _loss(seed, "tnl"), _loss(seed, "tnl", decay=False)
    return Finding(tnl, without, judge(tnl < without))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "lightning_attention",
        "constant_speed",
        "Time per token does not depend on the length.",
        "Confirmed if tokens per second (forward, 4 heads of 32, one thread) vary by at most 25% over 1k to 32k tokens "
        "while the quadratic form slows down at least 1.5 times when the length doubles; refuted otherwise.",
        lambda seed: constant_speed(_forward, seed),
        _FULL.format(131072),
    ),
    Claim(
        "lightning_attention",
        "exact",
        "The blocked form needs no cumulative sum and equals the recurrence and the quadratic form.",
        "Confirmed if the relative error (norms) against the float64 recurrence is at most 1e-12 in float64, 1e-5 in "
        "float32, output and final state; refuted otherwise.",
        _exact,
    ),
    Claim(
        "lightning_attention",
        "constant_speed_gradient",
        "The gradient too takes constant time per token.",
        "As constant_speed, forward and backward together.",
        lambda seed: constant_speed(_both_ways, seed),
        _FULL.format(131072),
    ),
    Claim(
        "lightning_attention",
        "matches_softmax",
        "A TNL language model is at least as good as a softmax Transformer of equal size.",
        "Byte model on Python's documentation, 4 layers of width 128, 300 steps of 12 x 128: confirmed if the test "
        "loss is not above the softmax model's; refuted otherwise.",
        _matches_softmax,
    ),
    Claim(
        "lightning_attention",
        "decay_helps",
        "The exponential decay improves the language model.",
        "The same model with all slopes 0: confirmed if its test loss is higher; refuted otherwise.",
        _decay_helps,
    ),
)
