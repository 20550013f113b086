"""Dense attention one tile at a time, with its own backward: what SDPA has no fast path for.

For scores ``S = scale * Q K^T + bias`` and an increasing function phi (exp for softmax)::

    Z_i = sum_j phi(S_ij)        lse_i = ln Z_i        P_ij = phi(S_ij) / Z_i        O_i = sum_j P_ij V_j

The forward keeps O and lse only. The backward visits tiles (some heads x some query rows x their visible keys),
computes S again, and for incoming gradients dO and dlse::

    dP = dO V^T         delta_i = sum_e dO_ie O_ie
    dS = phi'(S) / Z * (dP - delta + dlse)        dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO    dbias = dS

(phi' / Z = P for softmax); dbias is summed over the axes along which the bias was broadcast. Without a normaliser Z = 1
and delta and dlse drop out. Nothing of size queries x keys outlives a tile, apart from a mask, a bias and its gradient
that the caller made that large: working memory is a few times ``TILE`` numbers, or 16 query rows of one key/value
head's group where that is more.

Both directions are torch custom operators, so that torch.compile and torch.export see two nodes, not the loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.engines.common import accumulation_dtype
from manyheads.engines.counting import count_inside

TILE = 1 << 20  # scores in a tile: 4 MiB in float32, which stays in a core's share of the cache

Slices = tuple[slice, slice, slice]


def phi(scores: Tensor, normalizer: str) -> Tensor:
    """The function that turns scores into unnormalised weights (softmax excluded: it needs the row maximum)."""
    name = normalizer.removesuffix("_l1")
    if name == "softplus":
        return F.softplus(scores, threshold=40 if scores.dtype == torch.float64 else 20)
    return {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda x: x}[name](scores)


def _phi_and_slope(scores: Tensor, normalizer: str) -> tuple[Tensor, Tensor]:
    name = normalizer.removesuffix("_l1")
    weights = phi(scores, normalizer)
    if name == "softplus":
        return weights, torch.sigmoid(scores)
    if name == "relu":
        return weights, (scores > 0).to(scores.dtype)
    if name == "sigmoid":
        return weights, weights * (1 - weights)
    return weights, torch.ones_like(scores)


def _tiles(query: Tensor, key: Tensor) -> Iterator[Slices]:
    """Slices of batch, key/value heads and query rows whose scores number about TILE."""
    batch, heads, rows, _ = query.shape
    kv_heads, keys = key.shape[1], max(1, key.shape[2])
    width = min(rows, 64) * (heads // kv_heads) * keys
    some_heads = min(kv_heads, max(1, TILE // width))
    some_batch = min(batch, max(1, TILE // (width * kv_heads))) if some_heads == kv_heads else 1
    some_rows = TILE // (some_batch * some_heads * (heads // kv_heads) * keys)
    some_rows = min(rows, max(16, some_rows // 16 * 16))
    for b in range(0, batch, some_batch):
        for h in range(0, kv_heads, some_heads):
            for i in range(0, rows, some_rows):
                yield slice(b, b + some_batch), slice(h, h + some_heads), slice(i, min(rows, i + some_rows))


def _cut(tensor: Tensor, batch: slice, heads: slice, rows: slice, keys: int) -> Tensor:
    """The tile's part of a mask or bias (batch | 1, heads | 1, rows | 1, keys | 1)."""
    cuts = (batch, heads, rows, slice(0, keys))
    return tensor[tuple(cut if size > 1 else slice(None) for cut, size in zip(cuts, tensor.shape))]


def _additive(
    mask: Tensor | None, bias: Tensor | None, part: Slices, groups: int, visible: int, first: int | None, like: Tensor
) -> Tensor | None:
    """Mask, bias and causality of a tile as one additive tensor, or None. ``first``: keys that its first row sees."""
    batch, heads, rows = part
    heads = slice(heads.start * groups, heads.stop * groups)
    total = None
    if bias is not None:
        total = _cut(bias, batch, heads, rows, visible).to(like.dtype)
    hidden = None
    if mask is not None:
        hidden = ~_cut(mask, batch, heads, rows, visible)
    if first is not None:
        last_seen = torch.arange(first, first + rows.stop - rows.start, device=like.device)
        ahead = torch.arange(1, visible + 1, device=like.device) > last_seen[:, None]
        hidden = ahead[None, None] if hidden is None else hidden | ahead
    if hidden is not None:
        total = like.new_zeros(()) if total is None else total
        total = torch.where(hidden, -math.inf, total)
    return total


def _visible(causal: bool, queries: int, keys: int, rows: slice) -> tuple[int, int | None]:
    """How many leading keys a tile can see at all, and how many its first row sees (None: all rows see all)."""
    if not causal:
        return keys, None
    first = keys - queries + rows.start + 1
    return max(0, min(keys, keys - queries + rows.stop)), (None if first >= keys else first)


def _scores(query: Tensor, key: Tensor, extra: Tensor | None, scale: float) -> Tensor:
    """Scores of a tile, (batch, kv_heads, groups, rows, keys); query (batch, kv_heads, groups, rows, width)."""
    batch, kv_heads, groups, rows, width = query.shape
    flat = (query * scale).reshape(batch, kv_heads, groups * rows, width)
    scores = torch.matmul(flat, key.transpose(-2, -1)).view(batch, kv_heads, groups, rows, key.shape[2])
    if extra is not None:
        extra = extra.expand(*(extra.shape[:-2]), rows, key.shape[2])
        if extra.shape[1] == 1:
            scores += extra[:, :, None]
        else:
            scores += extra.unflatten(1, (kv_heads, groups))
    return scores


def _group(tensor: Tensor, kv_heads: int) -> Tensor:
    return tensor.unflatten(1, (kv_heads, tensor.shape[1] // kv_heads))


def _flash_tile(query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, causal: bool, scale: float):
    """One call of the CPU's flash kernel: output and lse of a tile (query in heads, key and value in kv heads)."""
    if extra is not None:
        extra = extra.expand(*extra.shape[:2], query.shape[2], key.shape[2])
    width, value_width = query.shape[-1], value.shape[-1]
    if width < value_width:
        query, key = F.pad(query, (0, value_width - width)), F.pad(key, (0, value_width - width))
    elif value_width < width:
        value = F.pad(value, (0, width - value_width))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=extra, scale=scale
    )
    if extra is not None:
        # The kernel reports 0, not -inf, for rows that see nothing.
        lse = lse.masked_fill((extra == -math.inf).all(-1), -math.inf)
    return out[..., :value_width], lse


def _matmul_tile(query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, scale: float, normalizer: str):
    """A tile by two matrix products in float32: any device, any normaliser."""
    kv_heads = key.shape[1]
    wide = accumulation_dtype(query.dtype)
    scores = _scores(_group(query, kv_heads).to(wide), key.to(wide), extra, scale)
    if normalizer == "softmax":
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp_()
    else:
        hidden = scores == -math.inf
        weights = phi(scores, normalizer).masked_fill_(hidden, 0)
        lse = torch.zeros_like(weights[..., 0])
        if normalizer.endswith("_l1"):
            total = weights.sum(-1)
            lse = total.log()
            weights = weights / total.masked_fill(total == 0, 1)[..., None]
    out = torch.matmul(weights.flatten(2, 3), value.to(wide)).unflatten(2, weights.shape[2:4])
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, bool causal, float scale, str normalizer)"
    " -> (Tensor, Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::dense_forward", mutates_args=(), schema=_SCHEMA)
def dense_forward(query, key, value, mask, bias, causal, scale, normalizer):
    """Output (batch, heads, queries, value_dim) and lse (batch, heads, queries); lse is 0 without a normaliser."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    out = query.new_zeros(batch, heads, queries, value.shape[-1])
    empty = -math.inf if normalizer == "softmax" or normalizer.endswith("_l1") else 0.0
    lse = query.new_full((batch, heads, queries), empty, dtype=accumulation_dtype(query.dtype))
    if (out.numel() == 0 and lse.numel() == 0) or keys == 0:
        return out, lse
    flash = query.device.type == "cpu" and normalizer == "softmax"
    square = causal and mask is None and bias is None and queries == keys
    if flash and (square or (mask is None and bias is None and not causal)):
        return tuple(t.contiguous() for t in _flash_tile(query, key, value, None, square, scale))
    groups = heads // kv_heads
    for b, h, i in _tiles(query, key):
        visible, first = _visible(causal, queries, keys, i)
        if visible == 0:
            continue
        wide = query if flash else query.new_empty(0, dtype=lse.dtype)
        extra = _additive(mask, bias, (b, h, i), groups, visible, first, wide)
        at = (b, slice(h.start * groups, h.stop * groups), i)
        tile = (query[at], key[b, h, :visible], value[b, h, :visible], extra)
        result = _flash_tile(*tile, False, scale) if flash else _matmul_tile(*tile, scale, normalizer)
        out[at], lse[at] = result
    return out, lse


@dense_forward.register_fake
def _(query, key, value, mask, bias, causal, scale, normalizer):
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


_SCHEMA = (
    "(Tensor grad, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? mask,"
    " Tensor? bias, bool causal, float scale, str normalizer, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::dense_backward", mutates_args=(), schema=_SCHEMA)
def dense_backward(grad, grad_lse, query, key, value, out, lse, mask, bias, causal, scale, normalizer, bias_grad):
    """Gradients of query, key, value and bias (empty where it is not asked for)."""
    queries, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    groups = query.shape[1] // kv_heads
    wide = accumulation_dtype(query.dtype)
    d_query, d_key, d_value = (torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format)
                               for t in (query, key, value))  # fmt: skip
    d_bias = query.new_zeros(bias.shape if bias_grad else (0,), dtype=wide)
    if keys == 0 or query.numel() == 0:
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), _cast(d_bias, bias)
    normalized = normalizer == "softmax" or normalizer.endswith("_l1")
    for b, h, i in _tiles(query, key):
        visible, first = _visible(causal, queries, keys, i)
        if visible == 0:
            continue
        at = (b, slice(h.start * groups, h.stop * groups), i)
        extra = _additive(mask, bias, (b, h, i), groups, visible, first, query.new_empty(0, dtype=wide))
        some_kv = (b, h, slice(0, visible))
        q, do, o = (_group(t[at].to(wide), h.stop - h.start if h.stop <= kv_heads else kv_heads - h.start)
                    for t in (query, grad, out))  # fmt: skip
        k, v = key[some_kv].to(wide), value[some_kv].to(wide)
        scores = _scores(q, k, extra, scale)
        d_weights = torch.matmul(do.flatten(2, 3), v.transpose(-2, -1)).view_as(scores)
        if normalized:
            log_z = _group(lse[at], q.shape[1])[..., None]
            empty = log_z == -math.inf
            shift = _group(grad_lse[at].to(wide), q.shape[1])[..., None] - (do * o).sum(-1, keepdim=True)
            d_weights += shift.masked_fill(empty, 0)
        if normalizer == "softmax":
            weights = (scores - log_z.masked_fill(empty, math.inf)).exp_()
            d_scores = d_weights.mul_(weights)
        else:
            hidden = scores == -math.inf
            weights, slope = (t.masked_fill_(hidden, 0) for t in _phi_and_slope(scores, normalizer))
            if normalized:
                inverse = log_z.masked_fill(empty, math.inf).neg().exp()
                weights, slope = weights * inverse, slope * inverse
            d_scores = d_weights.mul_(slope)
        flat, flat_grad = d_scores.flatten(2, 3), do.flatten(2, 3)
        d_query[at] = torch.matmul(flat, k).mul_(scale).view_as(q).flatten(1, 2)
        d_key[some_kv] += torch.matmul(flat.transpose(-2, -1), q.flatten(2, 3)).mul_(scale)
        d_value[some_kv] += torch.matmul(weights.flatten(2, 3).transpose(-2, -1), flat_grad)
        if bias_grad:
            part = _cut(d_bias, b, at[1], i, visible)
            part += d_scores.flatten(1, 2).sum_to_size(part.shape)
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), _cast(d_bias, bias)


def _cast(d_bias: Tensor, bias: Tensor | None) -> Tensor:
    return d_bias if bias is None else d_bias.to(bias.dtype)


@dense_backward.register_fake
def _(grad, grad_lse, query, key, value, out, lse, mask, bias, causal, scale, normalizer, bias_grad):
    d_bias = query.new_empty(bias.shape if bias_grad else (0,), dtype=(query if bias is None else bias).dtype)
    if bias is None:
        d_bias = d_bias.to(accumulation_dtype(query.dtype))
    return *(t.new_empty(t.shape) for t in (query, key, value)), d_bias


def _save(ctx, inputs, output) -> None:
    query, key, value, mask, bias, ctx.causal, ctx.scale, ctx.normalizer = inputs
    ctx.save_for_backward(query, key, value, mask, bias, *output)


def _backward(ctx, grad, grad_lse):
    query, key, value, mask, bias, out, lse = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[4]
    options = (ctx.causal, ctx.scale, ctx.normalizer, bias_grad)
    grads = dense_backward(grad, grad_lse, query, key, value, out, lse, mask, bias, *options)
    return *grads[:3], None, grads[3] if bias_grad else None, None, None, None


dense_forward.register_autograd(_backward, setup_context=_save)
