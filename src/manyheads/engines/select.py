"""Attention over selected keys: every query names the K keys that it reads.

For query n of head h with the list I = index[h, n] (entries below zero are no key)::

    out_n = sum_{j in I} softmax_{j in I}( scale * q_n . k_j + bias ) v_j

A key that is listed twice counts twice. Cost and memory traffic follow K, not the number of keys, which is what makes
decoding from a long cache cheap. Query heads of one group that share a list read each row once.

Source: the sparse decoding attention of "Post-Training Sparse Attention with Double Sparsity", arXiv 2408.07092.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.counting import count_inside
from manyheads.engines.select_bags import bag_backward, bag_forward, suits_bags, uncounted
from manyheads.engines.select_top import top_positions

MANY = 1 << 12  # scores from which a search of their own is faster than torch's
TILE = 1 << 18  # gathered numbers in a tile: 1 MiB of keys and as much of values in float32


def select_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    index: Int64[Tensor, "batch index_heads queries selected"],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query over the keys it lists.

    Args:
        query: (batch, heads, queries, head_dim); in decoding, one to a few queries.
        key: (batch, kv_heads, keys, head_dim), the cache; kv_heads divides heads.
        value: (batch, kv_heads, keys, value_dim).
        index: int64 (batch, index_heads, queries, selected), key positions, negative for "none". index_heads is 1
            (one list for all heads), kv_heads (one for each group) or heads. On CPU a position beyond the keys
            raises; on a GPU it is read as "none", since looking would stall the queue.
        bias: floating-point tensor that broadcasts to (batch, heads, queries, selected), added to the scaled scores
            in the order of ``index``; gradients reach it.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp (batch, heads, queries), -inf for a query without keys.
        backend: "reference" (gathers everything at once), "gather" (tile by tile: contiguous rows, then small
            products, or without copies as ``select_bags`` says; memory bounded by the tile, forward and backward),
            "triton" (GPU) or "auto".

    Returns:
        The output (batch, heads, queries, value_dim), or the pair (output, lse). Queries that list no key give zeros.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, or positions beyond the keys (CPU).

    Source: "Post-Training Sparse Attention with Double Sparsity", arXiv 2408.07092, section 3.

    >>> import torch
    >>> q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 100, 8)
    >>> best = torch.tensor([5, 17, 99]).expand(1, 2, 1, 3)
    >>> select_attention(q, k, k, best).shape
    torch.Size([1, 4, 1, 8])
    """
    check_choice("backend", backend, ("auto", "reference", "gather", "triton"))
    check_qkv(query, key, value)
    _check(query, key, index, bias)
    scale = resolve_scale(scale, query.shape[-1])
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    if backend == "auto":
        backend = "triton" if query.is_cuda and query.dtype != torch.float64 else "gather"
    if backend == "reference":
        out, lse = _reference(query, key, value, index, bias, scale)
    elif backend == "gather":
        out, lse = select_forward(query, key, value, index, bias, scale)
    else:
        from manyheads.engines.triton.select import select_triton

        out, lse = select_triton(query, key, value, index, bias, scale)
    return (out, lse) if return_lse else out


def select_top_tokens(scores: Float[Tensor, "*axes keys"], count: int) -> Int64[Tensor, "*axes selected"]:
    """Positions of the ``count`` largest scores, ascending; hidden keys (score -inf) come out as -1.

    Ascending positions make the gathering walk memory forwards.

    Raises:
        ValueError: a count below 1.

    >>> import torch
    >>> select_top_tokens(torch.tensor([[0.1, 3.0, float("-inf"), 2.0]]), 2)
    tensor([[1, 3]])
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    count = min(count, scores.shape[-1])
    if scores.is_cpu and scores.numel() >= MANY and count:
        return top_positions(scores, count)
    best, index = scores.topk(count, dim=-1, sorted=False)
    return index.masked_fill(best == -math.inf, -1).sort(dim=-1).values


def select_blocks(
    scores: Float[Tensor, "*axes blocks"], count: int, *, block_size: int, keys: int
) -> Int64[Tensor, "*axes selected"]:
    """Key positions of the ``count`` best blocks, block b holding keys ``b * block_size`` and following.

    Args:
        scores: (..., blocks), for instance queries times block centroids; -inf hides a block.
        count: blocks to keep.
        block_size: keys in a block.
        keys: number of keys; positions at or beyond it (in a last block that is not full) come out as -1.

    Raises:
        ValueError: a count or block size below 1, or blocks that do not cover the keys.

    >>> import torch
    >>> select_blocks(torch.tensor([[0.0, 5.0, 1.0]]), 1, block_size=4, keys=10)
    tensor([[4, 5, 6, 7]])
    """
    if block_size < 1 or scores.shape[-1] != -(-keys // block_size):
        raise ValueError(f"{keys} keys in blocks of {block_size} do not make {scores.shape[-1]} blocks")
    blocks = select_top_tokens(scores, count)
    index = blocks[..., None] * block_size + torch.arange(block_size, device=scores.device)
    return index.masked_fill((index < 0) | (index >= keys) | (blocks < 0)[..., None], -1).flatten(-2)


def _check(query: Tensor, key: Tensor, index: Tensor, bias: Tensor | None) -> None:
    heads, kv_heads = query.shape[1], key.shape[1]
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        raise TypeError(f"index must be an int64 tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    fits = index.ndim == 4 and (index.shape[0], index.shape[2]) == (query.shape[0], query.shape[2])
    if not fits or index.shape[1] not in (1, kv_heads, heads):
        wanted = f"({query.shape[0]}, 1 | {kv_heads} | {heads}, {query.shape[2]}, selected)"
        raise ValueError(f"index must have shape {wanted}, got {tuple(index.shape)}")
    if index.device != query.device:
        raise ValueError(f"index is on {index.device} but query on {query.device}")
    if bias is not None:
        full = (query.shape[0], heads, query.shape[2], index.shape[3])
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError("bias must be a floating-point tensor")
        if bias.ndim > 4 or any(n not in (1, m) for n, m in zip(reversed(bias.shape), reversed(full))):
            raise ValueError(f"bias of shape {tuple(bias.shape)} does not broadcast to {full}")


def _check_range(index: Tensor, keys: int) -> None:
    if index.device.type == "cpu" and index.numel() and int(index.max()) >= keys:
        raise ValueError(f"index names key {int(index.max())} of {keys} keys")


def _reference(query, key, value, index, bias, scale):
    if not torch.compiler.is_compiling():
        _check_range(index, key.shape[2])
    wide, heads = accumulation_dtype(query.dtype), query.shape[1]
    batch, _, queries, selected = index.shape
    index = repeat_heads(index, heads)
    seen = (index >= 0) & (index < key.shape[2])
    flat = torch.where(seen, index, 0).flatten(2)[..., None]

    def rows(tensor: Tensor) -> Tensor:
        if tensor.shape[2] == 0:
            return tensor.new_zeros(batch, heads, queries, selected, tensor.shape[3], dtype=wide)
        tensor = repeat_heads(tensor, heads).to(wide)
        return tensor.gather(2, flat.expand(-1, -1, -1, tensor.shape[3])).unflatten(2, (queries, selected))

    scores = scale * torch.einsum("bhnd,bhnkd->bhnk", query.to(wide), rows(key))
    if bias is not None:
        scores = scores + bias.to(wide)
        seen = seen & (scores != -math.inf)
    scores = torch.where(seen, scores, 0)
    peak = torch.where(seen, scores.detach(), -math.inf)
    peak = peak.amax(-1, keepdim=True) if selected else scores.new_full((*scores.shape[:3], 1), -math.inf)
    peak = torch.where(peak == -math.inf, 0, peak)
    weights = torch.where(seen, (scores - peak).exp(), 0)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    out = torch.einsum("bhnk,bhnke->bhne", weights / total, rows(value))
    return out.to(query.dtype), torch.where(empty, -math.inf, peak + total.log())[..., 0]


# ---- gather: rows = (batch, list head, query); the heads that share a list are the rows of one small product ----


def to_rows(tensor: Tensor, lists: int) -> Tensor:
    """(batch, lists * shared, queries, width) -> (batch * lists * queries, shared, width)."""
    shared = tensor.shape[1] // lists
    return tensor.unflatten(1, (lists, shared)).transpose(2, 3).flatten(0, 2)


def from_rows(rows: Tensor, batch: int, lists: int, queries: int) -> Tensor:
    """The inverse of ``to_rows``."""
    return rows.unflatten(0, (batch, lists, queries)).transpose(2, 3).flatten(1, 2).contiguous()


def list_heads(index: Tensor, heads: int, kv_heads: int) -> int:
    """Lists that have to be gathered one by one: one for each kv head, or for each head where heads differ."""
    return heads if index.shape[1] == heads else kv_heads


def _plan(query: Tensor, key: Tensor, index: Tensor, bias: Tensor | None):
    """Lists, positions by row (0 for none), which of them count, the (batch, kv head) of each row, bias by row."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    _check_range(index, keys)
    lists = list_heads(index, heads, kv_heads)
    index = index.expand(batch, lists, queries, index.shape[3]).flatten(0, 2)
    seen = (index >= 0) & (index < keys)
    rows = torch.arange(batch * lists, device=index.device).repeat_interleave(queries)
    owner = (rows // lists, rows % lists // (lists // kv_heads))
    if bias is not None:
        bias = to_rows(bias.expand(batch, heads, queries, index.shape[1]), lists)
    return lists, torch.where(seen, index, 0), seen, owner, bias


class _Rows:
    """All rows of a (batch, heads, tokens, width) tensor as one matrix without a copy, whatever its strides.

    A slice of a preallocated cache, or a transposed projection, must not be copied to read a few of its rows.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor if tensor.stride(3) == 1 else tensor.contiguous()
        steps = [0 if size == 1 else step for size, step in zip(tensor.shape[:3], tensor.stride())]
        unit = math.gcd(*steps) or 1
        last = sum((size - 1) * step for size, step in zip(tensor.shape, steps)) // unit
        self.matrix = tensor.as_strided((last + 1, tensor.shape[3]), (unit, 1), tensor.storage_offset())
        self.steps = [step // unit for step in steps]

    def numbers(self, positions: Tensor, owner: tuple[Tensor, Tensor], at: slice) -> Tensor:
        """Row numbers of the positions of a tile, flat."""
        base = owner[0][at] * self.steps[0] + owner[1][at] * self.steps[1]
        return (base[:, None] + positions[at] * self.steps[2]).flatten()

    def take(self, positions: Tensor, owner: tuple[Tensor, Tensor], at: slice, dtype: torch.dtype) -> Tensor:
        rows = self.matrix.index_select(0, self.numbers(positions, owner, at))
        return rows.view(-1, positions.shape[1], rows.shape[1]).to(dtype)


def _tiles(rows: int, numbers_per_row: int) -> Iterator[slice]:
    size = max(1, TILE // max(1, numbers_per_row))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def _tile_scores(query: Tensor, keys: Tensor, seen: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = torch.matmul(query * scale, keys.transpose(1, 2))
    if bias is not None:
        scores += bias
    return scores.masked_fill_(~seen[:, None], -math.inf)


_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor index, Tensor? bias, float scale) -> (Tensor, Tensor)"


@partial(count_inside, more=lambda q, k, v, index, *_: uncounted(q, k, v, index, backward=False))
@torch.library.custom_op("manyheads::select_forward", mutates_args=(), schema=_SCHEMA)
def select_forward(query, key, value, index, bias, scale):
    """Output and lse of the "gather" backend."""
    batch, heads, queries, width = query.shape
    wide = accumulation_dtype(query.dtype)
    if query.numel() == 0 or index.numel() == 0 or key.shape[2] == 0:
        _check_range(index, key.shape[2])
        out = query.new_zeros(batch, heads, queries, value.shape[-1])
        return out, query.new_full((batch, heads, queries), -math.inf, dtype=wide)
    if suits_bags(query, key, index):
        _check_range(index, key.shape[2])
        return bag_forward(query, key, value, index, bias, scale)
    lists, positions, seen, owner, bias = _plan(query, key, index, bias)
    rows, key_rows, value_rows = to_rows(query, lists), _Rows(key), _Rows(value)
    out = rows.new_empty(*rows.shape[:2], value.shape[-1])
    lse = rows.new_empty(rows.shape[:2], dtype=wide)
    for at in _tiles(len(rows), positions.shape[1] * max(width, value.shape[-1])):
        keys = key_rows.take(positions, owner, at, wide)
        scores = _tile_scores(rows[at].to(wide), keys, seen[at], None if bias is None else bias[at], scale)
        lse[at] = log = scores.logsumexp(-1)
        weights = (scores - log.masked_fill(log == -math.inf, 0)[..., None]).exp_()
        values = value_rows.take(positions, owner, at, wide)
        out[at] = torch.matmul(weights, values).to(out.dtype)
    return from_rows(out, batch, lists, queries), from_rows(lse[..., None], batch, lists, queries)[..., 0].contiguous()


@select_forward.register_fake
def _(query, key, value, index, bias, scale):
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


_SCHEMA = (
    "(Tensor grad, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor index, Tensor? bias, Tensor out,"
    " Tensor lse, float scale, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)


@partial(count_inside, more=lambda _, __, q, k, v, index, *___: uncounted(q, k, v, index, backward=True))
@torch.library.custom_op("manyheads::select_backward", mutates_args=(), schema=_SCHEMA)
def select_backward(grad, grad_lse, query, key, value, index, bias, out, lse, scale, bias_grad):
    """Gradients of query, key, value and (where asked for) bias: scores again from the saved lse, rows added back."""
    batch, _, queries, width = query.shape
    wide = accumulation_dtype(query.dtype)
    shape = bias.shape if bias_grad else (0,)
    d_bias = query.new_zeros(shape, dtype=wide if bias is None else bias.dtype)
    if query.numel() == 0 or index.numel() == 0 or key.shape[2] == 0:
        return *(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)), d_bias
    if suits_bags(query, key, index):
        *grads, d_scores = bag_backward(grad, grad_lse, query, key, value, index, bias, out, lse, scale)
        d_bias = d_scores.sum_to_size(shape).to(d_bias.dtype) if bias_grad and d_scores is not None else d_bias
        return *grads, d_bias
    lists, positions, seen, owner, bias_rows = _plan(query, key, index, bias)
    rows, grads, outs = (to_rows(t, lists) for t in (query, grad, out))
    logs, log_grads = (to_rows(t[..., None], lists)[..., 0] for t in (lse, grad_lse))
    key_rows, value_rows = _Rows(key), _Rows(value)
    d_rows = torch.empty_like(rows, dtype=wide)
    d_key, d_value = (torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (key, value))
    d_key_rows, d_value_rows = _Rows(d_key), _Rows(d_value)
    selected = positions.shape[1]
    d_scores_rows = rows.new_empty(*rows.shape[:2], selected, dtype=wide) if bias_grad else None
    for at in _tiles(len(rows), selected * max(width, value.shape[-1])):
        keys, values = (t.take(positions, owner, at, wide) for t in (key_rows, value_rows))
        q, do = rows[at].to(wide), grads[at].to(wide)
        scores = _tile_scores(q, keys, seen[at], None if bias_rows is None else bias_rows[at], scale)
        empty = logs[at] == -math.inf
        weights = (scores - logs[at].masked_fill(empty, math.inf)[..., None]).exp_()
        d_scores = torch.matmul(do, values.transpose(1, 2))
        d_scores += (log_grads[at].to(wide).masked_fill(empty, 0) - (do * outs[at]).sum(-1))[..., None]
        d_scores *= weights
        d_rows[at] = torch.matmul(d_scores, keys).mul_(scale)
        for rows_of, parts in (
            (d_key_rows, torch.matmul(d_scores.transpose(1, 2), q).mul_(scale)),
            (d_value_rows, torch.matmul(weights.transpose(1, 2), do)),
        ):
            rows_of.matrix.index_add_(0, rows_of.numbers(positions, owner, at), parts.flatten(0, 1))
        if d_scores_rows is not None:
            d_scores_rows[at] = d_scores
    if d_scores_rows is not None:
        d_bias = from_rows(d_scores_rows, batch, lists, queries).sum_to_size(shape).to(d_bias.dtype)
    d_query = from_rows(d_rows, batch, lists, queries).to(query.dtype)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias


@select_backward.register_fake
def _(grad, grad_lse, query, key, value, index, bias, out, lse, scale, bias_grad):
    dtype = accumulation_dtype(query.dtype) if bias is None else bias.dtype
    d_bias = query.new_empty(bias.shape if bias is not None and bias_grad else (0,), dtype=dtype)
    return *(t.new_empty(t.shape) for t in (query, key, value)), d_bias


def _save(ctx, inputs, output) -> None:
    query, key, value, index, bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, index, bias, *output)


def _backward(ctx, grad, grad_lse):
    bias_grad = ctx.saved_tensors[4] is not None and ctx.needs_input_grad[4]
    grads = select_backward(grad, grad_lse, *ctx.saved_tensors, ctx.scale, bias_grad)
    return *grads[:3], None, grads[3] if bias_grad else None, None


select_forward.register_autograd(_backward, setup_context=_save)
