"""Blocks: what one rank computes with the keys of another, as rectangles without a mask and causal triangles.

Queries and keys of a block are arithmetic runs of a sequence (see layouts), so that "key j is not later than query i"
is ``j <= i + shift`` in local indices: a triangle that the dense engine computes without a mask, and a rectangle.

For a rectangle with output O_b and log-sum-exp l_b over its keys, and the softmax over all keys with log-sum-exp l::

    forward    (O, l) <- merge((O, l), (O_b, l_b))
    backward   P = exp(scale Q K^T - l)      dV += P^T dO      dS = P * (dO V^T - D + dl)      D = rowsum(dO * O)
               dQ += scale dS K              dK += scale dS^T Q

A sliding window w lets query i see keys ``i + low <= j <= i + shift`` of a run: a band, cut into tiles as long as it is
wide. A soft cap bends the scores, see :mod:`manyheads.engines.dense_capped`.

Source: "Ring Attention with Blockwise Transformers", arXiv 2310.01889; "FlashAttention", arXiv 2205.14135 (backward).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyheads.engines import dense_capped as capped
from manyheads.engines.common import accumulation_dtype
from manyheads.engines.dense import attention
from manyheads.engines.dense_blocked import dense_backward
from manyheads.engines.merge import merge
from manyheads.parallel.layouts import Run

_BAND_ROWS = 64  # a band's tiles have this many rows at least: shorter ones cost more in calls than in hidden pairs


@dataclass(frozen=True)
class Tile:
    """Local query rows against local key columns; causal: the last row sees all columns, each one before one less.

    ``band`` (low, high): the tile's row i sees its columns i + low .. i + high only.
    """

    rows: slice
    columns: slice
    causal: bool
    band: tuple[int, int] | None = None

    @property
    def pairs(self) -> int:
        """Query-key pairs that attend."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        if self.band is not None:
            low, high = self.band
            return sum(max(0, min(columns - 1, i + high) - max(0, i + low) + 1) for i in range(rows))
        return rows * columns - (rows * (rows - 1) // 2 if self.causal else 0)

    def mask(self, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Pairs that attend, of real keys and within the band: (batch | 1, 1, rows | 1, columns), None for all."""
        mask = None if key_mask is None else key_mask[:, None, None, self.columns]
        if self.band is None:
            return mask
        rows = torch.arange(self.rows.stop - self.rows.start, device=device)[:, None]
        ahead = torch.arange(self.columns.stop - self.columns.start, device=device) - rows
        inside = ((ahead >= self.band[0]) & (ahead <= self.band[1]))[None, None]
        return inside if mask is None else inside & mask


def tiles(queries: Sequence[Run], keys: Sequence[Run], causal: bool, window: int | None = None) -> list[Tile]:
    """The pairs of the same sequence that attend, cut into tiles; tiles that could be one are one."""
    queries, keys = list(queries), list(keys)
    if causal and window is None and queries == keys and len({run.sequence for run in queries}) == 1:
        end = queries[-1].offset + queries[-1].count
        return [Tile(slice(0, end), slice(0, end), True)]  # local order is the order of the sequence
    found: list[Tile] = []
    by_sequence: dict[int, list[Run]] = {}
    for k in keys:
        by_sequence.setdefault(k.sequence, []).append(k)
    for q in queries:
        for k in by_sequence.get(q.sequence, ()):
            for tile in _pair(q, k, causal) if window is None else _banded(q, k, window):
                joined = _join(found[-1], tile) if found else None
                found[-1:] = [joined] if joined else [*found[-1:], tile]
    return found


def _pair(q: Run, k: Run, causal: bool) -> list[Tile]:
    columns = slice(k.offset, k.offset + k.count)
    if not causal:
        return [Tile(slice(q.offset, q.offset + q.count), columns, False)]
    shift = (q.start - k.start) // q.stride  # query i sees keys j <= i + shift
    first, full = max(0, -shift), k.count - 1 - shift  # rows that see one key at least, and all keys
    if first >= q.count:
        return []
    if full <= first:
        return [Tile(slice(q.offset + first, q.offset + q.count), columns, False)]
    last = min(full + 1, q.count)
    seen = slice(k.offset, k.offset + last + shift)
    triangle = Tile(slice(q.offset + first, q.offset + last), seen, last - first > 1)
    rest = slice(q.offset + last, q.offset + q.count)
    return [triangle] if rest.start == rest.stop else [triangle, Tile(rest, columns, False)]


def _banded(q: Run, k: Run, window: int) -> list[Tile]:
    """Queries see the keys less than ``window`` tokens before them, up to their own."""
    ahead = q.start - k.start
    shift, low = ahead // q.stride, -((window - 1 - ahead) // q.stride)  # query i sees keys i + low .. i + shift
    found, width = [], max(_BAND_ROWS, shift - low + 1)
    if low > shift:  # striped, and the window is shorter than the stride
        return []
    for start in range(max(0, -shift), min(q.count, k.count - low), width):
        stop = min(start + width, q.count, k.count - low)
        first, last = max(0, start + low), min(k.count, stop + shift)
        band = (start + low - first, start + shift - first)
        whole = band[0] + stop - start - 1 <= 0 and band[1] >= last - first - 1
        rows = slice(q.offset + start, q.offset + stop)
        found.append(Tile(rows, slice(k.offset + first, k.offset + last), False, None if whole else band))
    return found


def _join(a: Tile, b: Tile) -> Tile | None:
    if a.causal or b.causal or a.band or b.band:
        return None
    if a.rows == b.rows and a.columns.stop == b.columns.start:
        return replace(a, columns=slice(a.columns.start, b.columns.stop))
    if a.columns == b.columns and a.rows.stop == b.rows.start:
        return replace(a, rows=slice(a.rows.start, b.rows.stop))
    return None


def span(some: Sequence[Tile]) -> slice:
    """The rows that the tiles touch, as one slice."""
    return slice(min((t.rows.start for t in some), default=0), max((t.rows.stop for t in some), default=0))


def empty(query: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over no keys at all."""
    wide = accumulation_dtype(query.dtype)
    return query.new_zeros(*query.shape[:3], width, dtype=wide), query.new_full(query.shape[:3], -math.inf, dtype=wide)


def forward(
    query: Tensor, key_value: Sequence[Tensor], some: Sequence[Tile], scale: float, mask: Tensor | None,
    out: Tensor, lse: Tensor, softcap: float | None = None,
) -> None:  # fmt: skip
    """Merge the tiles' attention into ``out`` and ``lse``, in place; ``mask`` (batch, keys) is True for real keys."""
    key, value = key_value
    for tile in some:
        rows, columns = tile.rows, tile.columns
        # A half-precision kernel would round every partial output: on a CPU float32 costs nothing extra.
        wide = out.dtype if query.device.type == "cpu" else query.dtype
        tensors = (query[:, :, rows].to(wide), key[:, :, columns].to(wide), value[:, :, columns].to(wide))
        some_mask = tile.mask(mask, query.device)
        if softcap is None:
            part, part_lse = attention(*tensors, mask=some_mask, causal=tile.causal, scale=scale, return_lse=True)
        else:
            part, part_lse = capped.forward(*tensors, some_mask, tile.causal, scale, softcap)
        out[:, :, rows], lse[:, :, rows] = merge(
            [out[:, :, rows], part.to(out.dtype)], [lse[:, :, rows], part_lse.to(lse.dtype)]
        )


def backward(
    query: Tensor, key_value: Sequence[Tensor], grad: Tensor, lse: Tensor, shift: Tensor, some: Sequence[Tile],
    scale: float, mask: Tensor | None, d_query: Tensor, d_key_value: Sequence[Tensor], softcap: float | None = None,
) -> None:  # fmt: skip
    """Add the tiles' gradients to ``d_query`` and ``d_key_value`` in place; ``shift`` is dl - D, ``lse`` global."""
    (key, value), (d_key, d_value), wide = key_value, d_key_value, d_query.dtype
    nothing = torch.zeros((), dtype=wide, device=query.device)
    for tile in some:
        rows, columns = tile.rows, tile.columns
        some_grad, some_mask = grad[:, :, rows].to(wide), tile.mask(mask, query.device)
        tensors = (query[:, :, rows].to(wide), key[:, :, columns].to(wide), value[:, :, columns].to(wide))
        if softcap is None:
            grads = dense_backward(
                some_grad, shift[:, :, rows], *tensors, nothing.expand(some_grad.shape), lse[:, :, rows], some_mask,
                None, tile.causal, scale, "softmax", False,
            )  # fmt: skip
        else:
            grads = capped.backward(
                some_grad, shift[:, :, rows], *tensors, lse[:, :, rows], some_mask, tile.causal, scale, softcap
            )
        d_query[:, :, rows] += grads[0]
        d_key[:, :, columns] += grads[1]
        d_value[:, :, columns] += grads[2]
