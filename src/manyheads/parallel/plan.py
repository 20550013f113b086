"""What the schemes for softmax attention share: their arguments, checked on this rank and compared over the ranks."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.engines.common import check_qkv, resolve_scale
from manyheads.parallel.blocks import Tile, span, tiles
from manyheads.parallel.layouts import cumulative_lengths, rank_index, runs
from manyheads.parallel.wire import Wire


class Pairs(NamedTuple):
    """Everything that says which queries of which rank see which keys of which: what it gives is computed once."""

    world: int
    queries: int
    keys: int
    causal: bool
    layout: str
    cu_query: tuple[int, ...] | None
    cu_key: tuple[int, ...] | None
    per_sequence: bool
    window: int | None


@dataclass
class Plan:
    """Which keys of which rank the queries of a rank see."""

    pairs: Pairs
    scale: float
    softcap: float | None
    key_mask: Tensor | None

    @property
    def queries(self) -> int:
        """Queries of a rank."""
        return self.pairs.queries

    @property
    def causal(self) -> bool:
        """Whether later keys are hidden."""
        return self.pairs.causal

    def tiles(self, owner: int, holder: int) -> Sequence[Tile]:
        """The pairs of rank ``owner``'s queries and rank ``holder``'s keys that attend."""
        return _tiles(self.pairs, owner, holder)

    def needed(self, owner: int, hop: int, way: int) -> slice:
        """Rank ``owner``'s rows that the ranks from ``hop`` places away on, one way round, attend with."""
        return _needed(self.pairs, owner, way)[hop]

    def mask(self, holder: int) -> Tensor | None:
        """Which of rank ``holder``'s keys are real, (batch, keys)."""
        if self.key_mask is None:
            return None
        p = self.pairs
        index = rank_index(p.keys * p.world, p.world, holder, p.layout, p.cu_key, p.per_sequence)
        return self.key_mask[:, index.to(self.key_mask.device)]


@functools.lru_cache(maxsize=1 << 14)
def _tiles(p: Pairs, owner: int, holder: int) -> tuple[Tile, ...]:
    rows = runs(p.queries * p.world, p.world, owner, p.layout, p.cu_query, p.per_sequence)
    columns = runs(p.keys * p.world, p.world, holder, p.layout, p.cu_key, p.per_sequence)
    return tuple(tiles(rows, columns, p.causal, p.window))


@functools.lru_cache(maxsize=1 << 12)
def _needed(p: Pairs, owner: int, way: int) -> list[slice]:
    """By hop, the rows that this rank on the journey or one after it attends with."""
    rows, found = slice(0, 0), []
    for hop in range(p.world - 1, -1, -1):
        here = span(_tiles(p, owner, (owner + way * hop) % p.world))
        if here.stop > here.start:
            rows = here if rows.stop == rows.start else slice(min(here.start, rows.start), max(here.stop, rows.stop))
        found.append(rows)
    return found[::-1]


def make_plan(
    query: Tensor, key: Tensor, value: Tensor, *, wire: Wire, causal: bool, scale: float | None, layout: str,
    cu_seqlens: Any, cu_seqlens_key: Any, per_sequence: bool, key_mask: Tensor | None, window: int | None,
    softcap: float | None,
) -> Plan:  # fmt: skip
    """Check this rank's arguments; ValueError or TypeError says what does not fit."""
    check_qkv(query, key, value)
    world, queries, keys = wire.world, query.shape[2], key.shape[2]
    scale = resolve_scale(scale, query.shape[-1])
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if causal and queries != keys:
        raise ValueError(f"causal attention needs as many keys as queries on a rank, got {keys} and {queries}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1 or not causal):
        raise ValueError(f"window must be a positive number of tokens, with causal=True; got {window!r}, {causal=}")
    if window is not None and window >= queries * world:
        window = None
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
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
    of_queries, of_keys = (None if cu is None else tuple(cu) for cu in (cu_query, cu_key))
    pairs = Pairs(world, queries, keys, causal, layout, of_queries, of_keys, per_sequence, window)
    _tiles(pairs, wire.rank, wire.rank)  # raises where tokens do not divide
    return Plan(pairs, scale, softcap, key_mask)


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
        "softcap": plan.softcap,
        "layout": plan.pairs.layout,
        "window": plan.pairs.window,
        "cu_seqlens": plan.pairs.cu_query,
        "cu_seqlens_key": plan.pairs.cu_key,
        "per_sequence": plan.pairs.per_sequence,
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
