"""What the schemes for softmax attention share: their arguments, checked on this rank and compared over the ranks."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.engines.common import check_qkv, resolve_scale
from manyheads.parallel.blocks import Tile, tiles
from manyheads.parallel.layouts import cumulative_lengths, runs, token_index
from manyheads.parallel.wire import Wire


@dataclass
class Plan:
    """Which keys of which rank the queries of a rank see."""

    world: int
    queries: int
    keys: int
    causal: bool
    scale: float
    layout: str
    cu_query: list[int] | None
    cu_key: list[int] | None
    per_sequence: bool
    key_mask: Tensor | None

    def tiles(self, owner: int, holder: int) -> list[Tile]:
        """The pairs of rank ``owner``'s queries and rank ``holder``'s keys that attend."""
        rows = runs(self.queries * self.world, self.world, owner, self.layout, self.cu_query, self.per_sequence)
        columns = runs(self.keys * self.world, self.world, holder, self.layout, self.cu_key, self.per_sequence)
        return tiles(rows, columns, self.causal)

    def mask(self, holder: int) -> Tensor | None:
        """Which of rank ``holder``'s keys are real, (batch, keys)."""
        if self.key_mask is None:
            return None
        tokens, per_sequence = self.keys * self.world, self.per_sequence
        index = token_index(tokens, self.world, layout=self.layout, cu_seqlens=self.cu_key, per_sequence=per_sequence)[
            holder
        ]
        return self.key_mask[:, index.to(self.key_mask.device)]


def make_plan(
    query: Tensor, key: Tensor, value: Tensor, *, wire: Wire, causal: bool, scale: float | None, layout: str,
    cu_seqlens: Any, cu_seqlens_key: Any, per_sequence: bool, key_mask: Tensor | None,
) -> Plan:  # fmt: skip
    """Check this rank's arguments; ValueError or TypeError says what does not fit."""
    check_qkv(query, key, value)
    world, queries, keys = wire.world, query.shape[2], key.shape[2]
    scale = resolve_scale(scale, query.shape[-1])
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if causal and queries != keys:
        raise ValueError(f"causal attention needs as many keys as queries on a rank, got {keys} and {queries}")
    if layout != "contiguous" and not causal:
        raise ValueError(
            f"layout={layout!r} balances causal attention: without causal=True every rank has the same work, take "
            "'contiguous'"
        )
    cu_query = cumulative_lengths(cu_seqlens)
    if cu_query is None and cu_seqlens_key is not None:
        raise ValueError("cu_seqlens_key was given without cu_seqlens")
    if per_sequence and cu_query is None:
        raise ValueError("per_sequence=True lays out packed sequences and needs cu_seqlens")
    cu_key = cu_query if cu_seqlens_key is None else cumulative_lengths(cu_seqlens_key)
    if causal and cu_key != cu_query:
        raise ValueError("causal attention needs the same sequences in queries and keys: drop cu_seqlens_key")
    if cu_query is not None and cu_key is not None:
        if query.shape[0] != 1:
            raise ValueError(f"cu_seqlens packs sequences into a batch of 1, got a batch of {query.shape[0]}")
        if len(cu_query) != len(cu_key):
            raise ValueError(f"{len(cu_query) - 1} query sequences but {len(cu_key) - 1} key sequences")
    if key_mask is not None:
        wanted = (key.shape[0], keys * world)
        if key_mask.dtype != torch.bool or tuple(key_mask.shape) != wanted:
            raise ValueError(
                f"key_mask must be boolean over the whole sequence, (batch, keys of all ranks) = {wanted}, got "
                f"{key_mask.dtype} {tuple(key_mask.shape)}"
            )
        key_mask = key_mask.to(key.device)
    plan = Plan(world, queries, keys, causal, scale, layout, cu_query, cu_key, per_sequence, key_mask)
    plan.tiles(wire.rank, wire.rank)
    return plan


def shared(plan: Plan, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
    """What must be the same on all ranks."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    mask = plan.key_mask
    return {
        "shape of query": list(query.shape),
        "shape of key": list(key.shape),
        "shape of value": list(value.shape),
        "dtype": str(query.dtype),
        "causal": plan.causal,
        "scale": plan.scale,
        "layout": plan.layout,
        "cu_seqlens": plan.cu_query,
        "cu_seqlens_key": plan.cu_key,
        "per_sequence": plan.per_sequence,
        "key_mask": None if mask is None else zlib.crc32(mask.cpu().numpy().tobytes()),
        "whether gradients are wanted": learns,
    }


def pack(*tensors: Tensor) -> Tensor:
    """One contiguous buffer, in a dtype, of tensors that travel together."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unpack(buffer: Tensor, *like: Tensor | tuple[int, ...] | torch.Size) -> list[Tensor]:
    """Views of a packed buffer with the shapes of the tensors that were packed."""
    shapes = [tuple(one.shape) if isinstance(one, Tensor) else tuple(one) for one in like]
    parts = buffer.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes)]
