"""Block-sparse softmax attention in tiles, forward and backward, on any device.

For a query tile with rows i and its listed keys j::

    S_ij = scale * q_i . k_j + bias_ij        lse_i = log sum_j exp S_ij        out_i = sum_j exp(S_ij - lse_i) v_j

Backward, with P = exp(S - lse) computed again and delta_i = out_i . dout_i::

    dS = P * (dout v^T - delta + dlse)        dq = scale * dS k        dk = scale * dS^T q        dv = P^T dout

Nothing larger than a chunk of tiles is ever held: the scores of about `SCORES` pairs and the keys of about `GATHERED`
numbers. Tiles are chosen by the caller so that a tile's keys stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.engines.blocksparse_plan import BlockPlan, Group
from manyheads.engines.common import accumulation_dtype

SCORES = 1 << 18  # scores held at a time by the batched products: 1 MiB in float32, one core's second-level cache
GATHERED = 1 << 20  # numbers gathered at a time


@dataclass(frozen=True, eq=False)
class Geometry:
    """A plan laid over lanes of keys.

    Attributes:
        plan: tiles and their key blocks.
        keys: key tokens that the plan's block numbers count.
        base: (tiles,) added to the key numbers of each tile, where one lane holds the keys of several heads.
    """

    plan: BlockPlan
    keys: int
    base: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tiles of a group: all that is looked at together."""

    group: Group
    lanes: slice  # of the (batch x key heads) axis
    tiles: slice  # within the group
    rows: Tensor | None  # (tiles, keys) key numbers; None where a slab view serves


@dataclass(frozen=True)
class Dropout:
    """Dropout on the weights that draws the same numbers forward and backward, so that no mask is kept."""

    probability: float
    seed: int

    def keep(self, scores: Tensor, turn: int) -> Tensor:
        """What the weights of the turn-th chunk are multiplied with: 0 or 1 / (1 - probability)."""
        numbers = torch.Generator(scores.device).manual_seed(self.seed + turn)
        keep = torch.empty_like(scores).bernoulli_(1 - self.probability, generator=numbers)
        return keep.div_(1 - self.probability) if self.probability < 1 else keep


# What is added to the scores of a chunk, broadcastable to (lanes, tiles, rows, keys), and which rows it leaves empty.
Additive = Callable[[Chunk], tuple[Tensor | None, Tensor | None]]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    geometry: Geometry,
    scale: float,
    additive: Additive,
    *,
    by_scores: bool,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of query (lanes, tiles, rows, dim) over key, value (lanes, keys, dim)."""
    wide = accumulation_dtype(query.dtype)
    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=wide, device=query.device)
    fused = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and drop is None
    for turn, chunk in enumerate(chunks(query, key, geometry, by_scores=by_scores or not fused)):
        q, k, v = _take_tiles(query, chunk), take_keys(key, chunk), take_keys(value, chunk)
        extra, empty = additive(chunk)
        o, l = _sdpa(q, k, v, extra, scale) if fused else _softmax(q, k, v, extra, scale, wide, drop, turn)
        if fused and empty is not None:
            # The fused kernel reports a log-sum-exp of 0 for rows without keys.
            l = l.masked_fill(empty, -torch.inf)
        _put_tiles(out, o, chunk)
        _put_tiles(lse, l, chunk)
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    scale: float,
    additive: Additive,
    collect: Callable[[Chunk, Tensor], None] | None = None,
    drop: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key, value in the accumulation dtype; ``collect`` gets those of each chunk's scores."""
    wide = accumulation_dtype(query.dtype)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)
    # A row without keys has lse -inf; +inf makes its weights exp(-inf) = 0.
    shift = torch.where(lse == -torch.inf, torch.inf, lse)
    dq = torch.zeros(query.shape, dtype=wide, device=query.device)
    dk = torch.zeros(key.shape, dtype=wide, device=key.device)
    dv = torch.zeros(value.shape, dtype=wide, device=value.device)
    # The CPU's fused backward knows neither a gradient through lse nor one of the scores.
    fused = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and drop is None and collect is None
    fused = fused and key.shape[1] > 0 and (grad_lse is None or not grad_lse.any())
    for turn, chunk in enumerate(chunks(query, key, geometry, by_scores=True)):
        q, do = _take_tiles(query, chunk).to(wide), _take_tiles(grad_out, chunk).to(wide)
        k, v = take_keys(key, chunk).to(wide), take_keys(value, chunk).to(wide)
        extra, _ = additive(chunk)
        if fused:
            o, rows = _take_tiles(out, chunk).to(wide), _take_tiles(shift, chunk)
            parts = _sdpa_backward(do, q, k, v, o, rows, extra, scale)
            _put_tiles(dq, parts[0], chunk)
            _add_keys(dk, parts[1], chunk)
            _add_keys(dv, parts[2], chunk)
            continue
        weights = torch.matmul(q * scale, k.transpose(-2, -1))
        if extra is not None:
            weights += extra
        weights -= _take_tiles(shift, chunk)[..., None]
        weights.exp_()
        grads = torch.matmul(do, v.transpose(-2, -1))
        kept = weights
        if drop is not None:
            keep = drop.keep(weights, turn)
            kept, grads = weights * keep, grads * keep
        grads -= _take_tiles(delta, chunk)[..., None]
        grads *= weights
        if collect is not None:
            collect(chunk, grads)
        _put_tiles(dq, torch.matmul(grads, k) * scale, chunk)
        _add_keys(dk, torch.matmul(grads.transpose(-2, -1), q) * scale, chunk)
        _add_keys(dv, torch.matmul(kept.transpose(-2, -1), do), chunk)
    return dq, dk, dv


def chunks(query: Tensor, key: Tensor, geometry: Geometry, *, by_scores: bool) -> Iterator[Chunk]:
    """The work in pieces: whole tiles, several at a time while they stay small, never more than the bounds above."""
    plan, lanes, rows, width = geometry.plan, query.shape[0], query.shape[2], key.shape[-1]
    if not lanes or not rows:
        return
    for group in plan.groups(geometry.keys, accumulation_dtype(query.dtype)):
        viewed = group.slab is not None and geometry.base is None
        tile = group.keys * (rows if by_scores else width)
        budget = (
            max(1, (SCORES if by_scores else GATHERED) // tile) if by_scores or not viewed else lanes * len(group.tiles)
        )
        held = min(lanes, budget)
        some = max(1, budget // held)
        for start in range(0, len(group.tiles), some):
            tiles = slice(start, min(start + some, len(group.tiles)))
            numbers = None if viewed else _gathered(group, tiles, geometry)
            for lane in range(0, lanes, held):
                yield Chunk(group, slice(lane, min(lane + held, lanes)), tiles, numbers)


def _gathered(group: Group, tiles: slice, geometry: Geometry) -> Tensor:
    numbers, size = group.blocks[tiles], geometry.plan.key_block
    if size > 1:
        numbers = (numbers[..., None] * size + torch.arange(size, device=numbers.device)).flatten(-2)[:, : group.keys]
    return numbers if geometry.base is None else numbers + geometry.base[group.tiles[tiles], None]


def key_numbers(chunk: Chunk, device: torch.device) -> Tensor:
    """(tiles, keys) key numbers of a chunk, also where a view serves the keys themselves."""
    if chunk.rows is not None:
        return chunk.rows
    assert chunk.group.slab is not None
    first, step = chunk.group.slab
    starts = first + step * torch.arange(chunk.tiles.start, chunk.tiles.stop, device=device)
    return starts[:, None] + torch.arange(chunk.group.keys, device=device)


def _take_tiles(tensor: Tensor, chunk: Chunk) -> Tensor:
    """(lanes, tiles, ...) of the chunk: a view where its tiles are consecutive."""
    first, tensor = chunk.group.first, tensor[chunk.lanes]
    if first is not None:
        return tensor[:, first + chunk.tiles.start : first + chunk.tiles.stop]
    return tensor.index_select(1, chunk.group.tiles[chunk.tiles])


def _put_tiles(target: Tensor, tiles: Tensor, chunk: Chunk) -> None:
    first, target = chunk.group.first, target[chunk.lanes]
    if first is not None:
        target[:, first + chunk.tiles.start : first + chunk.tiles.stop] = tiles
    else:
        target.index_copy_(1, chunk.group.tiles[chunk.tiles], tiles.to(target.dtype))


def take_keys(tensor: Tensor, chunk: Chunk) -> Tensor:
    """(lanes, tiles, keys, dim) of the chunk: overlapping views of consecutive keys, or a gather."""
    tensor = tensor[chunk.lanes]
    if chunk.rows is not None:
        return tensor.index_select(1, chunk.rows.flatten()).unflatten(1, chunk.rows.shape)
    assert chunk.group.slab is not None
    first, step = chunk.group.slab
    first, number = first + chunk.tiles.start * step, chunk.tiles.stop - chunk.tiles.start
    slab = tensor[:, first : first + (number - 1) * step + chunk.group.keys]
    return slab.unfold(1, chunk.group.keys, step).transpose(-2, -1)


def _add_keys(target: Tensor, parts: Tensor, chunk: Chunk) -> None:
    target = target[chunk.lanes]
    if chunk.rows is not None:
        target.index_add_(1, chunk.rows.flatten(), parts.flatten(1, 2))
        return
    assert chunk.group.slab is not None
    first, step = chunk.group.slab
    first, number, keys = first + chunk.tiles.start * step, parts.shape[1], chunk.group.keys
    if number == 1:
        target[:, first : first + keys] += parts[:, 0]
        return
    # The slabs of neighbouring tiles overlap, but their pieces of `step` keys at the same place do not.
    for at in range(0, keys, step):
        size = min(step, keys - at)
        stop = first + at + (number - 1) * step + size
        target[:, first + at : stop].unfold(1, size, step).transpose(-2, -1).add_(parts[:, :, at : at + size])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if extra is not None:
        extra = extra.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=extra, scale=scale)


def _sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, shift: Tensor, extra: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if extra is not None:
        extra = extra.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, shift, 0.0, False, attn_mask=extra, scale=scale
    )


def _softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: Tensor | None,
    scale: float,
    wide: torch.dtype,
    drop: Dropout | None,
    turn: int,
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q.to(wide) * scale, k.to(wide).transpose(-2, -1))
    if extra is not None:
        scores += extra
    lse = scores.logsumexp(-1)
    scores -= torch.where(lse == -torch.inf, torch.inf, lse)[..., None]
    scores.exp_()
    if drop is not None:
        scores *= drop.keep(scores, turn)
    return torch.matmul(scores, v.to(wide)).to(q.dtype), lse
