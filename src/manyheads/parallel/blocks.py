"""Blocks: what one rank computes with the keys of another, as rectangles without a mask and causal triangles.

Queries and keys of a block are arithmetic runs of a sequence (see layouts), so that "key j is not later than query i"
is ``j <= i + shift`` in local indices: a triangle that the dense engine computes without a mask, and a rectangle.

For a rectangle with output O_b and log-sum-exp l_b over its keys, and the softmax over all keys with log-sum-exp l::

    forward    (O, l) <- merge((O, l), (O_b, l_b))
    backward   P = exp(scale Q K^T - l)      dV += P^T dO      dS = P * (dO V^T - D + dl)      D = rowsum(dO * O)
               dQ += scale dS K              dK += scale dS^T Q

Source: "Ring Attention with Blockwise Transformers", arXiv 2310.01889; "FlashAttention", arXiv 2205.14135 (backward).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manyheads.engines.common import accumulation_dtype
from manyheads.engines.dense import attention
from manyheads.engines.dense_blocked import dense_backward
from manyheads.engines.merge import merge
from manyheads.parallel.layouts import Run


@dataclass(frozen=True)
class Tile:
    """Local query rows against local key columns; causal: the last row sees all columns, each one before one less."""

    rows: slice
    columns: slice
    causal: bool

    @property
    def pairs(self) -> int:
        """Query-key pairs that attend."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return rows * columns - (rows * (rows - 1) // 2 if self.causal else 0)


def tiles(queries: Sequence[Run], keys: Sequence[Run], causal: bool) -> list[Tile]:
    """The pairs of the same sequence that attend, cut into tiles; tiles that could be one are one."""
    queries, keys = list(queries), list(keys)
    if causal and queries == keys and len({run.sequence for run in queries}) == 1:
        end = queries[-1].offset + queries[-1].count
        return [Tile(slice(0, end), slice(0, end), True)]  # local order is the order of the sequence
    found: list[Tile] = []
    for q in queries:
        for k in keys:
            if q.sequence == k.sequence:
                for tile in _pair(q, k, causal):
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


def _join(a: Tile, b: Tile) -> Tile | None:
    if a.causal or b.causal:
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
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Merge the tiles' attention into ``out`` and ``lse``, in place; ``mask`` (batch, keys) is True for real keys."""
    key, value = key_value
    for tile in some:
        rows, columns = tile.rows, tile.columns
        # A half-precision kernel would round every partial output: on a CPU float32 costs nothing extra.
        wide = out.dtype if query.device.type == "cpu" else query.dtype
        part, part_lse = attention(
            query[:, :, rows].to(wide), key[:, :, columns].to(wide), value[:, :, columns].to(wide),
            mask=None if mask is None else mask[:, None, None, columns], causal=tile.causal, scale=scale,
            return_lse=True,
        )  # fmt: skip
        out[:, :, rows], lse[:, :, rows] = merge(
            [out[:, :, rows], part.to(out.dtype)], [lse[:, :, rows], part_lse.to(lse.dtype)]
        )


def backward(
    query: Tensor, key_value: Sequence[Tensor], grad: Tensor, lse: Tensor, shift: Tensor, some: Sequence[Tile],
    scale: float, mask: Tensor | None, d_query: Tensor, d_key_value: Sequence[Tensor],
) -> None:  # fmt: skip
    """Add the tiles' gradients to ``d_query`` and ``d_key_value`` in place; ``shift`` is dl - D, ``lse`` global."""
    (key, value), (d_key, d_value), wide = key_value, d_key_value, d_query.dtype
    nothing = torch.zeros((), dtype=wide, device=query.device)
    for tile in some:
        rows, columns = tile.rows, tile.columns
        some_grad = grad[:, :, rows].to(wide)
        grads = dense_backward(
            some_grad, shift[:, :, rows], query[:, :, rows].to(wide), key[:, :, columns].to(wide),
            value[:, :, columns].to(wide), nothing.expand(some_grad.shape), lse[:, :, rows],
            None if mask is None else mask[:, None, None, columns], None, tile.causal, scale, "softmax", False,
        )  # fmt: skip
        d_query[:, :, rows] += grads[0]
        d_key[:, :, columns] += grads[1]
        d_value[:, :, columns] += grads[2]


def pairs(some: Sequence[Tile]) -> int:
    """Query-key pairs of all tiles together."""
    return sum(tile.pairs for tile in some)
