"""Claims about the neighborhood operator itself: speed, memory and how many tiles are visited."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from manyheads.engines.blocksparse import blocksparse_attention
from manyheads.ops.neighborhood import neighborhood_attention
from manyheads.ops.neighborhood_plan import Axis, layout
from manyheads.reproduce.claims import Claim, Finding, Verdict

HEADS, DIM = 2, 32


def tiles_beat_unfused(seed: int) -> Finding:
    """Forward time of tiles, of a gather of every window, and of dense attention with a mask, interleaved."""
    times, ratios = {}, []
    for side, window in ((28, 7), (56, 7), (56, 13)):
        query, key, value = _random(side, seed)
        axes = (Axis(side, window),) * 2
        mask, index = _dense_mask(axes), _windows(axes)
        contestants: dict[str, Callable[[], object]] = {
            "tiles": lambda q=query, k=key, v=value, w=window: neighborhood_attention(q, k, v, window=w),
            "gather": lambda q=query, k=key, v=value, i=index: _gather(
                q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), i
            ),
            "dense mask": lambda q=query, k=key, v=value, m=mask: scaled_dot_product_attention(
                q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), attn_mask=m
            ),
        }
        found = _interleaved(contestants)
        times[f"{side}x{side}, window {window}"] = found
        ratios.append(min(found["gather"], found["dense mask"]) / found["tiles"])
    large = min(ratios[1:])
    verdict = Verdict.CONFIRMED if large >= 2 else Verdict.REFUTED if large < 1 else Verdict.INCONCLUSIVE
    return Finding(round(large, 2), 1.0, verdict, {"milliseconds": times, "ratios": [round(one, 2) for one in ratios]})


def memory_constant_in_window(seed: int) -> Finding:
    """Bytes of the largest tensor made during a forward pass on 56 x 56 tokens, tiles against gathered windows."""
    peaks: dict[str, list[int]] = {"tiles": [], "gather": []}
    for window in (5, 9, 17):
        query, key, value = _random(56, seed)
        axes = (Axis(56, window),) * 2
        index, found = _windows(axes), layout(axes, query.device, False)
        query, key, value = (tensor.flatten(2, 3) for tensor in (query, key, value))
        # The engine beneath the operator, because tensors made inside an operator of torch.library are not seen.
        rows = query if found.order is None else query.index_select(2, found.order)
        blocksparse_attention(
            rows, key, value, found.plan, backend="tiles"
        )  # the geometry is kept, not made at every call
        with _Largest() as tiles:
            blocksparse_attention(rows, key, value, found.plan, backend="tiles")
        with _Largest() as gather:
            _gather(query, key, value, index)
        peaks["tiles"].append(tiles.size)
        peaks["gather"].append(gather.size)
    growth = {name: round(sizes[-1] / sizes[0], 2) for name, sizes in peaks.items()}
    verdict = Verdict.CONFIRMED if growth["tiles"] <= 2 and growth["gather"] >= 8 else Verdict.REFUTED
    return Finding(growth["tiles"], growth["gather"], verdict, {"bytes": peaks, "windows": [5, 9, 17]})


def aligned_strides_save_tiles(seed: int) -> Finding:
    """Tiles of 8 x 8 keys that tiles of 8 x 8 queries visit on 64 x 64 tokens with windows of 24 x 24."""
    side, window, tile = 64, 24, 8
    visited = {stride: _visited(Axis(side, window, stride), tile) ** 2 for stride in (1, 4, tile, 16)}
    ideal = (side / window) ** 2
    gains = {stride: (side // tile) ** 4 / tiles for stride, tiles in visited.items()}
    reached = gains[tile] >= 0.999 * ideal
    verdict = Verdict.CONFIRMED if reached and gains[1] < 0.9 * ideal else Verdict.REFUTED
    return Finding(round(gains[tile], 3), round(gains[1], 3), verdict, {"ratio of FLOPs": ideal, "tiles": visited})


def _visited(axis: Axis, tile: int) -> int:
    windows = [axis.window_of(place, axis.length) for place in range(axis.length)]
    count = 0
    for start in range(0, axis.length, tile):
        low = min(first for first, _ in windows[start : start + tile])
        high = max(stop for _, stop in windows[start : start + tile])
        count += -(-high // tile) - low // tile
    return count


def _random(side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    # Three storages, not views of one: the memory claim counts the bytes of storages.
    query, key, value = (torch.randn(1, HEADS, side, side, DIM, generator=numbers) for _ in range(3))
    return query, key, value


def _dense_mask(axes: tuple[Axis, ...]) -> Tensor:
    mask = layout(axes, torch.device("cpu"), True).plan.mask
    assert mask is not None
    return mask[0]


def _windows(axes: tuple[Axis, ...]) -> Tensor:
    """(tokens, window tokens) the tokens that every token sees."""
    mask = _dense_mask(axes)
    return mask.nonzero()[:, 1].view(len(mask), prod(axis.window for axis in axes))


def _gather(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    keys = key.index_select(2, index.flatten()).unflatten(2, index.shape)
    weights = (keys @ query[..., None] * DIM**-0.5).softmax(dim=-2)
    values = value.index_select(2, index.flatten()).unflatten(2, index.shape)
    return (weights.transpose(-2, -1) @ values).squeeze(-2)


def _interleaved(contestants: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(median(own), 2) for name, own in times.items()}


class _Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


SLUG = "neighborhood_attention"
OPERATOR_CLAIMS = (
    Claim(
        SLUG,
        "tiles_beat_unfused",
        "Computing windows in tiles is faster than gathering every window or masking dense attention.",
        "56 x 56 tokens, windows 7 and 13: confirmed if the faster of both takes at least twice the time of the tiles "
        "at both windows, refuted if less than once at either.",
        tiles_beat_unfused,
        "manyheads compare --pattern noncausal-self --length 16384",
    ),
    Claim(
        SLUG,
        "memory_constant_in_window",
        "The memory of the tiled operator does not grow with the window, that of the unfused one with its square.",
        "Windows 5 to 17 (11.6 times the tokens): confirmed if the largest tensor of the tiles grows at most 2-fold "
        "and that of the gather at least 8-fold, else refuted.",
        memory_constant_in_window,
    ),
    Claim(
        SLUG,
        "aligned_strides_save_tiles",
        "Strided windows reach the speed-up that their FLOPs promise only where window, stride and tile fit.",
        "Tiles of 8 visited by windows of 24 on 64 x 64: confirmed if stride 8 reaches the ratio of FLOPs and stride 1 "
        "stays below 90 % of it, else refuted.",
        aligned_strides_save_tiles,
    ),
)
