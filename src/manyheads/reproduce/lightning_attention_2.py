"""Claims of "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths", arXiv 2401.04658."""

from __future__ import annotations

from typing import cast

import psutil
import torch
from torch import Tensor

from manyheads.ops.lightning import lightning_attention, lightning_slopes
from manyheads.reproduce import lightning_attention as version_1
from manyheads.reproduce.byte_lm import ByteLM, train_byte_lm
from manyheads.reproduce.claims import Claim, Finding
from manyheads.reproduce.lightning_attention import judge

HEADS, DIM, CHUNK = 4, 32, 512

_FULL = "manyheads compare --pattern causal-self --length 131072 --device cuda --dtype bfloat16"


def _any_block(seed: int) -> Finding:
    torch.manual_seed(seed)
    tokens = 300
    inputs = torch.randn(3, 1, 4, tokens, 16, dtype=torch.float64)
    runs = {}
    for block in (1, 16, 64, 100, tokens):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = cast(Tensor, lightning_attention(q, k, v, slopes=lightning_slopes(4), block=block, backend="chunked"))
        runs[block] = [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]
    errors = {
        str(block): max(((a - b).norm() / b.norm()).item() for a, b in zip(run, runs[tokens]))
        for block, run in runs.items()
    }
    return Finding(max(errors.values()), 1e-12, judge(max(errors.values()) < 1e-12), {"by_block": errors})


def _stream(seed: int, first: int, last: int, chunk: int = CHUNK) -> tuple[Tensor, list[int]]:
    """Output of the last chunk, and the process's memory after each chunk, when only the state is carried on."""
    state, held, out = None, [], torch.empty(0)
    slopes, process = lightning_slopes(HEADS), psutil.Process()
    for step in range(first, last):
        # Each chunk's tokens depend on its number only: two streams can start at different places.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        q, k, v = torch.randn(3, 1, HEADS, chunk, DIM, generator=generator).unbind()
        with torch.no_grad():
            out, state = lightning_attention(q, k, v, slopes=slopes, initial_state=state, return_state=True)
        held.append(process.memory_info().rss)
    return out, held


def _unlimited_length(seed: int) -> Finding:
    chunks, late = 200_000 // CHUNK, (200_000 - 20_000) // CHUNK
    out, held = _stream(seed, 0, chunks)
    want, _ = _stream(seed, late, chunks)
    error = ((out - want).norm() / want.norm()).item()
    settled = len(held) // 10
    growth = max(held[settled:]) - held[settled]
    cache = 2 * 4 * HEADS * DIM * CHUNK * (len(held) - settled)
    return Finding(
        {"growth_to_cache": growth / cache, "relative_error": error},
        {"growth_to_cache": 0.1, "relative_error": 1e-5},
        judge(growth <= 0.1 * cache and error <= 1e-5),
        {"tokens": chunks * CHUNK, "growth_bytes": growth, "cache_bytes": cache},
    )


def _drop_in(seed: int) -> Finding:
    losses = {}
    for backend in ("reference", "chunked"):
        torch.manual_seed(seed)
        losses[backend] = train_byte_lm(ByteLM("tnl", backend=backend), seed, steps=50)[0]
    tiled, quadratic = losses["chunked"][-1], losses["reference"][-1]
    return Finding(tiled, quadratic, judge(abs(tiled - quadratic) <= 1e-4), losses)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "lightning_attention_2",
        "exact_for_any_block",
        "The tiling is exact whatever the block size.",
        "Blocks of 1, 16, 64, 100 and all tokens, float64, output and gradients: confirmed if the spread is below "
        "1e-12 (relative); refuted otherwise.",
        _any_block,
    ),
    Claim(
        "lightning_attention_2",
        "unlimited_length",
        "Sequences of unlimited length run in constant memory.",
        "200k tokens in chunks of 512 with a carried state, slopes from 1/4 to 1/256: confirmed if the process's "
        "resident memory grows after the first tenth by at most 10% of what a float32 key/value cache of the remaining "
        "tokens would hold, and the last chunk's output equals that of a stream started 20k tokens before the end to "
        "1e-5 (relative norm); refuted otherwise.",
        _unlimited_length,
        _FULL,
    ),
    Claim(
        "lightning_attention_2",
        "constant_time",
        "Time per token does not depend on the length.",
        version_1.CLAIMS[0].rule,
        version_1.CLAIMS[0].run,
        _FULL,
    ),
    Claim(
        "lightning_attention_2",
        "drop_in",
        "It trains like version 1.",
        "Byte model trained with the quadratic or the tiled operator from the same seed: confirmed if the losses after "
        "50 steps agree to 1e-4; refuted otherwise.",
        _drop_in,
    ),
)
