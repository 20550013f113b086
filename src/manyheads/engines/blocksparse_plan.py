"""Which key blocks a query block reads: the plan of block-sparse attention, and a bias that lives in a table.

A plan is geometry only. It is built once for a shape and used for every call; what a run over it needs (tiles of equal
length and mask put together, float masks, views instead of gathers where keys are consecutive) is worked out at the
first call and kept with the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TableBias:
    """A bias on the logits that is read from a small table per head, such as a relative-position table.

    Attributes:
        table: (heads, entries), or (1, entries) for all heads; receives a gradient.
        index: which entry a pair reads: a function ``index(query, key) -> integer tensor`` of broadcasting positions,
            or, for a plan that has mask classes, an integer tensor of the shape of the plan's ``mask``.

    >>> import torch
    >>> bias = TableBias(torch.zeros(4, 127), lambda query, key: (key - query).clamp(-63, 63) + 63)
    """

    table: Tensor
    index: Callable[[Tensor, Tensor], Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Query tiles of a plan that read equally many keys and share one mask class, so that one call serves them."""

    tiles: Tensor  # (tiles,) numbers of the query tiles
    blocks: Tensor  # (tiles, slots) numbers of their key blocks
    keys: int  # keys of each tile; less than slots * key_block where the last block is ragged
    first: int | None  # number of the first tile where the tiles are consecutive
    slab: tuple[int, int] | None  # (first key, step from tile to tile) where the keys of each tile are consecutive
    mask_class: int | None
    mask: Tensor | None  # (query_block, keys) additive: 0 or -inf
    empty: Tensor | None  # (query_block,) rows of the mask without any key; None when there are none


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The key blocks that every query block reads.

    Attributes:
        query_block: queries in a block (a tile); the last block may be ragged.
        key_block: keys in a block; 1 makes the index a list of keys per query block.
        index: integers (query_blocks, slots), (heads, query_blocks, slots) or (batch, heads, query_blocks, slots):
            distinct key blocks in rising order, -1 behind them for unused slots. `heads` are the query's.
        mask: optional boolean (classes, query_block, slots * key_block): pairs of a tile that attend. Only for a plan
            without head and batch axes; costs nothing per call, unlike a predicate.
        mask_of: (query_blocks,) the mask class of each query block.
        padded: False promises that the index has no -1.

    >>> import torch
    >>> plan = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool), query_block=16, key_block=16)
    >>> plan.index.tolist()
    [[0], [1], [2], [3]]
    """

    query_block: int
    key_block: int
    index: Tensor
    mask: Tensor | None = None
    mask_of: Tensor | None = None
    padded: bool = True
    _groups: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("query_block", "key_block"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if self.index.ndim not in (2, 3, 4) or self.index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "index must be integers (query_blocks, slots), (heads, query_blocks, slots) or (batch, heads, "
                f"query_blocks, slots), got {self.index.dtype} {tuple(self.index.shape)}"
            )
        if (self.mask is None) != (self.mask_of is None):
            raise ValueError("mask and mask_of come together: the mask classes and the class of each query block")
        if self.mask is not None:
            wanted = (self.query_block, self.index.shape[-1] * self.key_block)
            if self.index.ndim != 2 or tuple(self.mask.shape[1:]) != wanted or self.mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be boolean (classes, {wanted[0]}, {wanted[1]}) with an index for all heads, got "
                    f"{self.mask.dtype} {tuple(self.mask.shape)} with an index {tuple(self.index.shape)}"
                )

    @classmethod
    def from_mask(cls, mask: Tensor, *, query_block: int, key_block: int, slots: int | None = None) -> BlockPlan:
        """The plan of a dense boolean block mask (..., query_blocks, key_blocks), True where a block is read.

        ``slots`` bounds the blocks of a row; where it is known beforehand, torch.compile can trace this function.
        """
        if mask.dtype != torch.bool or mask.ndim not in (2, 3, 4):
            raise ValueError(f"mask must be boolean with 2 to 4 axes, got {mask.dtype} {tuple(mask.shape)}")
        blocks = mask.shape[-1]
        number = torch.arange(blocks, device=mask.device).expand(mask.shape)
        # Unused blocks get a number behind all others, so that sorting leaves the used ones in rising order in front.
        index = torch.where(mask, number, blocks).sort(dim=-1).values
        if slots is None:
            slots = int(mask.sum(-1).max()) if mask.numel() else 0
        index = index[..., :slots]
        return cls(query_block, key_block, torch.where(index < blocks, index, -1), padded=True)

    @classmethod
    def from_index(cls, index: Tensor, *, query_block: int, key_block: int, padded: bool = True) -> BlockPlan:
        """The plan of block lists in any order; -1 may stand anywhere, ``padded=False`` promises that it does not."""
        last = torch.iinfo(index.dtype).max
        index = torch.where(index < 0, last, index).sort(dim=-1).values
        return cls(query_block, key_block, torch.where(index == last, -1, index), padded=padded)

    def expand_mask(self, queries: int, keys: int) -> Tensor:
        """The pairs that the plan reads, as a boolean (..., queries, keys): for references and small problems."""
        blocks = -(-keys // self.key_block)
        lead, rows = self.index.shape[:-2], self.index.shape[-2] * self.query_block
        if self.mask is None:
            read = torch.zeros(*self.index.shape[:-1], blocks + 1, dtype=torch.bool, device=self.index.device)
            read.scatter_(-1, torch.where(self.index < 0, blocks, self.index).long(), True)
            read = read[..., :blocks].repeat_interleave(self.query_block, -2).repeat_interleave(self.key_block, -1)
            return read[..., :queries, :keys]
        columns = torch.where(self.index < 0, blocks, self.index).long()[..., None] * self.key_block
        columns = (columns + torch.arange(self.key_block, device=columns.device)).flatten(-2)
        elements = self.mask[self.mask_of]  # (query_blocks, query_block, slots * key_block)
        read = torch.zeros(*lead, rows, (blocks + 1) * self.key_block, dtype=torch.bool, device=columns.device)
        read.scatter_(-1, columns.repeat_interleave(self.query_block, -2), elements.flatten(0, 1))
        return read[..., :queries, :keys]

    def groups(self, keys: int, dtype: torch.dtype) -> list[Group]:
        """The tiles of the plan put together by number of keys and mask class, for ``keys`` key tokens.

        Tiles of a plan per head, or per batch and head, are numbered through in that order.
        """
        known = self._groups.get((keys, dtype))
        if known is None:
            known = self._groups[keys, dtype] = self._make_groups(keys, dtype)
        return known

    def _make_groups(self, keys: int, dtype: torch.dtype) -> list[Group]:
        index = self.index.flatten(0, -2).long()
        tiles, slots = index.shape
        ragged = -keys % self.key_block
        everything = torch.arange(tiles, device=index.device)
        if not self.padded and not ragged and self.mask is None:
            return [self._group(everything, index, slots * self.key_block, None, dtype)] if tiles else []
        count = (index >= 0).sum(-1)
        has_ragged = (index == keys // self.key_block).any(-1) if ragged else torch.zeros_like(count, dtype=torch.bool)
        kind = self.mask_of.long() if self.mask_of is not None else torch.zeros_like(count)
        label = (kind * (slots + 1) + count) * 2 + has_ragged
        groups = []
        for one in label.unique().tolist():
            used, members = one // 2 % (slots + 1), everything[label == one]
            number = used * self.key_block - (ragged if one % 2 else 0)
            mask_class = one // 2 // (slots + 1) if self.mask is not None else None
            if number:
                groups.append(self._group(members, index[members, :used], number, mask_class, dtype))
        return groups

    def _group(self, tiles: Tensor, blocks: Tensor, keys: int, mask_class: int | None, dtype: torch.dtype) -> Group:
        consecutive = bool((tiles.diff() == 1).all())
        slab = None
        if bool((blocks.diff(dim=-1) == 1).all()):
            steps = blocks[:, 0].diff()
            if len(steps) == 0 or (bool((steps == steps[0]).all()) and int(steps[0]) > 0):
                step = int(steps[0]) if len(steps) else 1
                slab = int(blocks[0, 0]) * self.key_block, step * self.key_block
        mask = empty = None
        if mask_class is not None and self.mask is not None:
            attends = self.mask[mask_class, :, :keys]
            if not bool(attends.all()):
                mask = torch.zeros(attends.shape, dtype=dtype, device=attends.device).masked_fill_(~attends, -torch.inf)
            rows = ~attends.any(-1)
            empty = rows if bool(rows.any()) else None
        return Group(tiles, blocks, keys, int(tiles[0]) if consecutive else None, slab, mask_class, mask, empty)
