"""What is added to the scores of block-sparse attention, tile by tile, and where the gradient of it goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engines.blocksparse_plan import BlockPlan, TableBias
from manyheads.engines.blocksparse_tiles import Chunk, Dropout, Geometry, key_numbers
from manyheads.engines.common import Predicate


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of block-sparse attention, apart from its query, key and value.

    The three kinds of plan differ in what a lane and a tile are. One plan for all: a lane is a batch entry and key
    head, its rows are the queries of all the query heads that share it. A plan per head: a lane is a batch entry, a
    tile a head's query block. A plan per batch and head: there is one lane.
    """

    plan: BlockPlan
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    scale: float
    wide: torch.dtype
    predicate: Predicate | None = None
    bias: Tensor | None = None
    table: TableBias | None = None
    drop: Dropout | None = None
    elements: Tensor | None = None  # (batch | 1, heads | 1, query_blocks, query_block, slots * key_block)

    @property
    def shared(self) -> bool:
        return self.plan.index.ndim == 2

    @property
    def blocks(self) -> int:
        return self.plan.index.shape[-2]

    @property
    def elementwise(self) -> bool:
        """Whether a chunk's additive term is as large as its scores."""
        by_class = self.table is None or isinstance(self.table.index, Tensor)
        return self.predicate is not None or self.bias is not None or self.elements is not None or not by_class

    def geometry(self) -> Geometry:
        if self.shared:
            return Geometry(self.plan, self.keys)
        device = self.plan.index.device
        head = torch.arange(self.heads, device=device).repeat_interleave(self.blocks)
        base = head // (self.heads // self.key_heads)
        if self.plan.index.ndim == 4:
            entry = torch.arange(self.batch, device=device).repeat_interleave(len(head))
            base = base.repeat(self.batch) + entry * self.key_heads
        return Geometry(self.plan, self.keys, base * self.keys)

    def to_lanes(self, tensor: Tensor) -> Tensor:
        """(batch, heads, queries, ...) as (lanes, tiles, rows, ...), zeros behind the last query."""
        rest, block = tensor.shape[3:], self.plan.query_block
        if missing := self.blocks * block - self.queries:
            tensor = torch.cat([tensor, tensor.new_zeros(*tensor.shape[:2], missing, *rest)], dim=2)
        if self.shared:
            copies = self.heads // self.key_heads
            tensor = tensor.reshape(self.batch * self.key_heads, copies, self.blocks, block, *rest)
            return tensor.transpose(1, 2).reshape(len(tensor), self.blocks, copies * block, *rest)
        lanes = 1 if self.plan.index.ndim == 4 else self.batch
        return tensor.reshape(lanes, self.batch * self.heads * self.blocks // lanes, block, *rest)

    def from_lanes(self, tensor: Tensor) -> Tensor:
        """(lanes, tiles, rows, ...) back as (batch, heads, queries, ...)."""
        rest = tensor.shape[3:]
        if self.shared:
            split = (self.heads // self.key_heads, self.plan.query_block)
            tensor = tensor.unflatten(2, split).transpose(1, 2)
        size = self.blocks * self.plan.query_block
        return tensor.reshape(self.batch, self.heads, size, *rest)[:, :, : self.queries]

    def key_lanes(self, tensor: Tensor) -> Tensor:
        """(batch, key_heads, keys, dim) as (lanes, keys of the lane, dim)."""
        lanes = self.batch * self.key_heads if self.shared else self.batch if self.plan.index.ndim == 3 else 1
        together = self.batch * self.key_heads // lanes if lanes else 0
        return tensor.reshape(lanes, together * self.keys, tensor.shape[-1])

    def positions(self, chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch, head, query and key of the pairs of a chunk, broadcasting to (lanes, tiles, rows, keys)."""
        block = self.plan.query_block
        lanes = torch.arange(chunk.lanes.start, chunk.lanes.stop, device=device)[:, None, None, None]
        tiles = chunk.group.tiles[chunk.tiles][None, :, None, None]
        keys = key_numbers(chunk, device)[None, :, None, :]
        if self.shared:
            shared_by = self.heads // self.key_heads
            rows = torch.arange(shared_by * block, device=device)[None, None, :, None]
            batch, head = lanes // self.key_heads, lanes % self.key_heads * shared_by + rows // block
            rows = rows % block
        else:
            rows = torch.arange(block, device=device)[None, None, :, None]
            line = tiles // self.blocks
            batch, head = (line // self.heads, line % self.heads) if self.plan.index.ndim == 4 else (lanes, line)
            tiles, keys = tiles % self.blocks, keys % self.keys
        # Rows behind the last query repeat it: they are cut off later and must not index outside.
        return batch, head, (tiles * block + rows).clamp(max=self.queries - 1), keys

    def additive(self, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """The additive term of a chunk, and its rows without keys where there may be some."""
        group, parts, empty = chunk.group, None, None
        copies = self.heads // self.key_heads if self.shared else 1
        if group.mask is not None:
            parts = group.mask.repeat(copies, 1)[None, None]
        if group.empty is not None:
            empty = group.empty.repeat(copies)
        if self.table is not None and isinstance(self.table.index, Tensor):
            parts = _plus(parts, self._class_table(chunk, self.table))
        if not self.elementwise:
            return parts, empty
        batch, head, query, key = self.positions(chunk, group.tiles.device)
        if self.bias is not None:
            parts = _plus(parts, self.bias[_broadcast(self.bias, batch, head, query, key)].to(self.wide))
        if self.elements is not None:
            parts = _plus(parts, self.elements[self._element_index(chunk, batch, head)].to(self.wide))
        if self.table is not None and not isinstance(self.table.index, Tensor):
            heads = head.clamp(max=self.table.table.shape[0] - 1)
            parts = _plus(parts, self.table.table[heads, self.table.index(query, key)].to(self.wide))
        if self.predicate is not None:
            attends = self.predicate(batch, head, query, key)
            if parts is None:
                parts = torch.zeros(attends.shape, dtype=self.wide, device=attends.device)
            parts = torch.where(attends, parts, -torch.inf)
        assert parts is not None
        return parts, (parts == -torch.inf).all(-1)

    def collect(self, grads: dict[str, Tensor], chunk: Chunk, scores: Tensor) -> None:
        """Add the gradient of the scores of a chunk to the gradients of bias, table and elements."""
        device = scores.device
        if "table" in grads and self.table is not None and isinstance(self.table.index, Tensor):
            self._collect_class_table(grads["table"], chunk, scores, self.table)
            return
        batch, head, query, key = self.positions(chunk, device)
        if "bias" in grads:
            where = torch.broadcast_tensors(*_broadcast(grads["bias"], batch, head, query, key), scores)[:4]
            grads["bias"].index_put_(where, scores, accumulate=True)
        if "elements" in grads:
            where = torch.broadcast_tensors(*self._element_index(chunk, batch, head), scores)[:5]
            grads["elements"].index_put_(where, scores, accumulate=True)
        if "table" in grads and self.table is not None and not isinstance(self.table.index, Tensor):
            table = grads["table"]
            entry = head.clamp(max=table.shape[0] - 1) * table.shape[1] + self.table.index(query, key)
            table.view(-1).scatter_add_(0, entry.expand(scores.shape).flatten(), scores.flatten())

    def _lane_heads(self, chunk: Chunk, device: torch.device) -> Tensor:
        """(lanes, copies) query heads of the lanes of a shared plan."""
        copies = self.heads // self.key_heads
        lanes = torch.arange(chunk.lanes.start, chunk.lanes.stop, device=device)
        return (lanes % self.key_heads * copies)[:, None] + torch.arange(copies, device=device)

    def _class_table(self, chunk: Chunk, table: TableBias) -> Tensor:
        assert isinstance(table.index, Tensor)
        entries = table.index[chunk.group.mask_class, :, : chunk.group.keys]
        heads = self._lane_heads(chunk, entries.device).clamp(max=table.table.shape[0] - 1)
        values = table.table.to(self.wide)[:, entries.flatten()].unflatten(1, entries.shape)
        return values[heads].flatten(1, 2)[:, None]

    def _collect_class_table(self, grad: Tensor, chunk: Chunk, scores: Tensor, table: TableBias) -> None:
        assert isinstance(table.index, Tensor)
        entries = table.index[chunk.group.mask_class, :, : chunk.group.keys].flatten()
        heads = self._lane_heads(chunk, entries.device).clamp(max=grad.shape[0] - 1).flatten()
        sums = scores.sum(1).reshape(len(heads), -1)
        lines = grad.new_zeros(len(heads), grad.shape[1]).scatter_add_(1, entries.expand(len(heads), -1), sums)
        grad.index_add_(0, heads, lines)

    def _element_index(self, chunk: Chunk, batch: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        tiles = (chunk.group.tiles[chunk.tiles] % self.blocks)[None, :, None, None]
        rows = torch.arange(self.plan.query_block, device=tiles.device)
        if self.shared:
            rows = rows.repeat(self.heads // self.key_heads)
        slots = torch.arange(chunk.group.keys, device=tiles.device)
        assert self.elements is not None
        where = _broadcast(self.elements, batch, head, tiles, rows[None, None, :, None])
        return *where, slots[None, None, None, :]


def _plus(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else left + right


def _broadcast(tensor: Tensor, *index: Tensor) -> tuple[Tensor, ...]:
    """Index tensors for the leading axes, 0 on those axes of length 1 along which the tensor is broadcast."""
    return tuple(torch.zeros_like(at) if size == 1 else at for size, at in zip(tensor.shape, index, strict=False))
