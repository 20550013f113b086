"""The geometry of neighborhood attention: which tokens a token sees, and how query tiles and key boxes cover that.

On one axis of length X, with window w, stride s, dilation d, coordinate i belongs to dilation group g = i mod d at
place u = i div d; the group has L = ceil((X - g) / d) places. Token i sees the places a <= t < b of its own group::

    not causal   leader l = min((u div s) s + s div 2, L - 1)
                 a = clamp(l, w div 2, L - 1 - r) - w div 2, b = a + w    with r = w div 2 + w mod 2 - 1
    causal       leader l = min((u div s) s + s - 1, L - 1)         a = max(l - w + 1, 0), b = u + 1

On several axes a token is seen if it is seen on every axis.

Sources: arXiv 2403.04690 (windows that shift inside at a border), arXiv 2504.16922 (stride).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.engines.blocksparse_plan import BlockPlan

DENSE_TOKENS = 2048  # beyond so many tokens a dense mask is not even considered
DENSE_PAIR = 0.45  # a pair of one dense tile costs so much of a pair of a small tile
TILE, KEY = 1000, 24  # what starting a tile and gathering a key cost, counted in pairs
ROWS = 16, 128  # tokens in a tile


class Axis(NamedTuple):
    """One axis: its length and the options of the window along it."""

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def group_length(self, group: int) -> int:
        return -(-(self.length - group) // self.dilation)

    def window_of(self, place: int, places: int) -> tuple[int, int]:
        """First place and place behind the last that a token at ``place`` of a group of ``places`` sees."""
        w, s = self.window, self.stride
        if self.causal:
            leader = min(place // s * s + s - 1, places - 1)
            return max(leader - w + 1, 0), place + 1
        leader = min(place // s * s + s // 2, places - 1)
        first = min(max(leader - w // 2, 0), places - w)
        return first, first + w


def neighborhood_mask(length: int, window: int, *, stride: int = 1, dilation: int = 1, causal: bool = False) -> Tensor:
    """The pairs that attend along one axis, boolean (length, length), rows being queries.

    The mask on several axes is the product of the masks of its axes.

    Raises:
        ValueError: as :func:`neighborhood_attention`.

    >>> neighborhood_mask(5, 3).int().tolist()[0]
    [1, 1, 1, 0, 0]
    """
    axis = Axis(length, window, stride, dilation, causal)
    check_axis(axis)
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        group, place = i % dilation, i // dilation
        first, stop = axis.window_of(place, axis.group_length(group))
        mask[i, first * dilation + group : (stop - 1) * dilation + group + 1 : dilation] = True
    return mask


def check_axis(axis: Axis) -> None:
    """Raise ValueError unless the window fits the axis."""
    x, w, s, d = axis.length, axis.window, axis.stride, axis.dilation
    if w < 2:
        raise ValueError(f"window must be at least 2, got {w}")
    if not 1 <= s <= w:
        raise ValueError(f"stride cannot be larger than the window nor below 1, got stride={s}, window={w}")
    if d < 1:
        raise ValueError(f"dilation must be at least 1, got {d}")
    if w * d > x:
        raise ValueError(f"window times dilation exceeds the axis: {x} tokens, window={w}, dilation={d}")


@dataclass(frozen=True)
class _Segment:
    """A run of places of one dilation group: a side of a tile, with the box of keys that it sees."""

    group: int
    first: int
    first_key: int
    keys: int
    # The same for all segments that look alike: places and windows counted from the first place or key, so that mask
    # and relative positions can be shared.
    pattern: tuple


def _segments(axis: Axis, size: int) -> list[_Segment]:
    found = []
    for group in range(axis.dilation):
        places = axis.group_length(group)
        windows = [axis.window_of(place, places) for place in range(places)]
        for first in range(0, places, size):
            # A segment that sticks out repeats its last token, which is thrown away afterwards.
            own = [min(place, places - 1) for place in range(first, first + size)]
            low, high = min(windows[u][0] for u in own), max(windows[u][1] for u in own)
            seen = tuple((u - first, windows[u][0] - low, windows[u][1] - low) for u in own)
            found.append(_Segment(group, first, low, high - low, (seen, low - first, high - low)))
    return found


def _cost(axes: tuple[Axis, ...], sizes: tuple[int, ...]) -> int:
    tables = [_segments(axis, size) for axis, size in zip(axes, sizes)]
    tiles, keys = prod(len(table) for table in tables), prod(sum(one.keys for one in table) for table in tables)
    gathering = KEY if len(axes) > 1 else 0  # along one axis the keys of a tile are consecutive: a view
    return keys * (prod(sizes) + gathering) + tiles * TILE


def tile_sizes(axes: tuple[Axis, ...]) -> tuple[tuple[int, ...], int]:
    """Sides of the query tile that make the least work, and that work in pairs."""
    choices = []
    for axis in axes:
        longest = axis.group_length(0)
        sizes = {1, 2, 4, 8, 16, 32, 64, 128, axis.stride, 2 * axis.stride, longest}
        choices.append(sorted(size for size in sizes if size <= longest))
    low = min(ROWS[0], prod(axis.group_length(0) for axis in axes))
    fitting = [sizes for sizes in itertools.product(*choices) if low <= prod(sizes) <= ROWS[1]]
    fitting = fitting or [min(itertools.product(*choices), key=lambda sizes: abs(prod(sizes) - low))]
    best = min(fitting, key=lambda sizes: _cost(axes, sizes))
    return best, _cost(axes, best)


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokens brought into the order of tiles, and the plan over them.

    Attributes:
        plan: query tiles against lists of key tokens; keys keep their row-major order.
        order: (tiles * rows,) token of every row of every tile; None where that is the row-major order.
        back: (tokens,) row of every token.
        entries: per mask class, the entry of a relative-position table (2w - 1 per axis, row-major) of every pair.
    """

    plan: BlockPlan
    order: Tensor | None
    back: Tensor | None
    entries: Tensor


@lru_cache(maxsize=128)
def layout(axes: tuple[Axis, ...], device: torch.device, dense: bool | None) -> Layout:
    """The tiles of a grid, or one dense tile; ``dense=None`` takes the cheaper one."""
    tokens = prod(axis.length for axis in axes)
    sizes, cost = tile_sizes(axes) if dense is not True else ((), 0.0)
    if dense is None:
        dense = tokens <= DENSE_TOKENS and DENSE_PAIR * tokens**2 < cost
    return _dense(axes, device) if dense else _tiled(axes, sizes, device)


def _dense(axes: tuple[Axis, ...], device: torch.device) -> Layout:
    tokens = prod(axis.length for axis in axes)
    mask, entries = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
    for axis in axes:
        place = torch.arange(axis.length) // axis.dilation
        own = neighborhood_mask(
            axis.length, axis.window, stride=axis.stride, dilation=axis.dilation, causal=axis.causal
        )
        mask = _product(mask, own, torch.logical_and)
        entries = _product(entries * (2 * axis.window - 1), _relative(place, place, axis), torch.add)
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    plan = BlockPlan(tokens, tokens, index, mask[None].to(device), index[0], padded=False)
    return Layout(plan, None, None, entries[None].to(device))


def _tiled(axes: tuple[Axis, ...], sizes: tuple[int, ...], device: torch.device) -> Layout:
    tables = [_segments(axis, size) for axis, size in zip(axes, sizes)]
    tiles = list(itertools.product(*tables))
    classes: dict[tuple, int] = {}
    members = [classes.setdefault(tuple(one.pattern for one in tile), len(classes)) for tile in tiles]
    rows, slots = prod(sizes), max(prod(one.keys for one in tile) for tile in tiles)

    tokens, index = torch.empty(len(tiles), rows, dtype=torch.long), torch.full((len(tiles), slots), -1)
    masks, entries = torch.zeros(len(classes), rows, slots, dtype=torch.bool), torch.zeros(len(classes), rows, slots)
    entries = entries.long()
    done: set[int] = set()
    for number, (tile, member) in enumerate(zip(tiles, members)):
        own, box = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        mask, entry = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
        for axis, one in zip(axes, tile):
            seen, offset, keys = one.pattern
            place = torch.tensor([u for u, _, _ in seen])
            key = torch.arange(keys)
            own = (own[:, None] * axis.length + (one.first + place) * axis.dilation + one.group).flatten()
            box = (box[:, None] * axis.length + (one.first_key + key) * axis.dilation + one.group).flatten()
            if member not in done:
                low = torch.tensor([a for _, a, _ in seen])[:, None]
                high = torch.tensor([b for _, _, b in seen])[:, None]
                mask = _product(mask, (key >= low) & (key < high), torch.logical_and)
                entry = _product(entry * (2 * axis.window - 1), _relative(place, key + offset, axis), torch.add)
        tokens[number], index[number, : len(box)] = own, box
        if member not in done:
            masks[member, :, : len(box)], entries[member, :, : len(box)] = mask, entry
            done.add(member)
    order = tokens.flatten()
    back = torch.empty(prod(axis.length for axis in axes), dtype=torch.long)
    # Rows that repeat a token come behind the token's own row: writing backwards leaves the first.
    back[order.flip(0)] = torch.arange(len(order)).flip(0)
    kept = len(order) == len(back) and bool((order == torch.arange(len(order))).all())
    plan = BlockPlan(rows, 1, index.to(device), masks.to(device), torch.tensor(members, device=device))
    return Layout(plan, None if kept else order.to(device), None if kept else back.to(device), entries.to(device))


def _relative(query: Tensor, key: Tensor, axis: Axis) -> Tensor:
    # Pairs that do not attend may lie outside the table; what they read is masked.
    return (key[None, :] - query[:, None] + axis.window - 1).clamp(0, 2 * axis.window - 2)


def _product(left: Tensor, right: Tensor, combine) -> Tensor:
    """All pairs of rows by all pairs of columns: (m, n) and (p, q) to (m p, n q)."""
    joined = combine(left[:, None, :, None], right[None, :, None, :])
    return joined.reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
