"""Dense attention: every query weighs every key that its mask lets it see.

For query i and key j of one head::

    S_ij = scale * q_i . k_j + bias_ij                        (hidden pairs take no part)
    w_ij = phi(S_ij) / Z_i        out_i = sum_j w_ij v_j        lse_i = ln Z_i

with phi = exp and Z_i the row's sum for softmax; ``normalizer`` names the other choices.
Source: "Attention Is All You Need", arXiv 1706.03762; recomputation in the backward as in "FlashAttention",
arXiv 2205.14135.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.engines.common import (
    Predicate,
    accumulation_dtype,
    check_choice,
    check_qkv,
    repeat_heads,
    resolve_scale,
    shares_keys,
)
from manyheads.engines.dense_blocked import TILE, dense_forward, phi

BACKENDS = ("auto", "reference", "sdpa", "blocked", "flex")
NORMALIZERS = (
    "softmax",
    "softmax_plus_one",
    "softplus_l1",
    "relu_l1",
    "sigmoid_l1",
    "softplus",
    "relu",
    "sigmoid",
    "none",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | Predicate | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    normalizer: str = "softmax",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of all queries over all keys, with mask, bias, other normalisers and the log-sum-exp.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); kv_heads divides heads.
        value: (batch, kv_heads, keys, value_dim).
        mask: boolean tensor that broadcasts to (batch, heads, queries, keys), True where a pair attends, or a
            predicate ``f(batch, head, query, key) -> bool`` on integer tensors. Queries that see no key give zeros.
        bias: floating-point tensor that broadcasts to (batch, heads, queries, keys), added to the scaled scores;
            gradients reach it.
        causal: query i sees key j when ``j - i <= keys - queries``: the last query sees the last key.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        normalizer: "softmax"; "softmax_plus_one" (1 is added to the softmax denominator, so that a head can attend
            to nothing); "softplus", "relu", "sigmoid", "none" (the function of the score is the weight), and
            "softplus_l1", "relu_l1", "sigmoid_l1" (divided by the row's sum).
        cu_seqlens: for a packed batch (batch must be 1), the int32 cumulative lengths 0, n1, n1 + n2, ... of the
            sequences lying one after another along the query axis; sequences do not see each other. Mask, predicate
            and bias are given in packed coordinates.
        cu_seqlens_key: the same for the keys; None means the lengths of the queries.
        return_lse: also return the natural log of the row's normaliser, (batch, heads, queries), float32 (float64
            for float64 inputs), -inf for a row without keys; differentiable.
        backend: "reference" (the equations), "sdpa" (torch's fused attention; softmax without lse only), "blocked"
            (tile by tile with its own backward; any option), "flex" (compiled FlexAttention; softmax, on CPU
            forward only and without lse) or "auto". Second derivatives need "reference".

    Returns:
        The output (batch, heads, queries, value_dim), or the pair (output, lse).

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, an unknown name, or a backend that cannot do what is asked.

    Source: "Attention Is All You Need", arXiv 1706.03762.

    >>> import torch
    >>> q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    >>> out, lse = attention(q, k, k, causal=True, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 3, 8]), torch.Size([1, 4, 3]))
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_qkv(query, key, value)
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if isinstance(mask, Tensor):
        mask = _four_axes("mask", mask, full)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True attends), got {mask.dtype}; additive terms go into bias")
    elif mask is not None and not callable(mask):
        raise TypeError(f"mask must be a boolean tensor or a predicate, got {type(mask).__name__}")
    if bias is not None:
        bias = _four_axes("bias", bias, full)
        if not bias.is_floating_point():
            raise TypeError(f"bias must be a floating-point tensor, got {bias.dtype}")
    if return_lse and normalizer not in ("softmax", "softmax_plus_one") and not normalizer.endswith("_l1"):
        raise ValueError(f"return_lse: normalizer={normalizer!r} has no normalising sum")
    scale = resolve_scale(scale, query.shape[-1])
    if cu_seqlens is not None or cu_seqlens_key is not None:
        return _packed(query, key, value, mask, bias, causal, scale, normalizer, cu_seqlens, cu_seqlens_key,
                       return_lse, backend)  # fmt: skip
    return _attention(query, key, value, mask, bias, causal, scale, normalizer, return_lse, backend)


def _attention(query, key, value, mask, bias, causal, scale, normalizer, return_lse, backend) -> Any:
    if normalizer == "softmax_plus_one" and backend != "reference":
        # 1 / (1 + Z) = sigmoid(ln Z) / Z: the softmax path gives this one too.
        out, lse = _attention(query, key, value, mask, bias, causal, scale, "softmax", True, backend)
        out = (out * torch.sigmoid(lse)[..., None]).to(query.dtype)
        return (out, F.softplus(lse)) if return_lse else out
    if backend == "auto":
        backend = _choose(query, key, value, mask, bias, normalizer, return_lse)
    if backend == "flex":
        return _flex(query, key, value, mask, bias, causal, scale, normalizer, return_lse)
    if callable(mask) and not isinstance(mask, Tensor):
        return _by_rows(query, key, value, mask, bias, causal, scale, normalizer, return_lse, backend)
    if backend == "sdpa":
        if normalizer != "softmax" or return_lse:
            raise ValueError("backend='sdpa' computes softmax without its log-sum-exp; take 'blocked' or 'auto'")
        return _sdpa(query, key, value, mask, bias, causal, scale)
    if backend == "blocked":
        out, lse = dense_forward(query, key, value, mask, bias, causal, scale, normalizer)
    else:
        out, lse = _reference(query, key, value, mask, bias, causal, scale, normalizer)
    return (out, lse) if return_lse else out


def _choose(query, key, value, mask, bias, normalizer, return_lse) -> str:
    learns = torch.is_grad_enabled() and bias is not None and bias.requires_grad
    if normalizer != "softmax":
        return "blocked"
    if query.device.type == "cuda" and query.dtype != torch.float64 and query.shape[2] >= 128:
        if learns or return_lse or (callable(mask) and not isinstance(mask, Tensor)):
            return "flex"
        return "sdpa"
    return "blocked" if learns or return_lse else "sdpa"


def _reference(query, key, value, mask, bias, causal, scale, normalizer):
    wide = accumulation_dtype(query.dtype)
    heads = query.shape[1]
    scores = scale * query.to(wide) @ repeat_heads(key, heads).to(wide).transpose(-2, -1)
    seen = torch.ones((), dtype=torch.bool, device=query.device)
    if bias is not None:
        scores = scores + bias.to(wide)
        seen = scores != -math.inf
    if mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & _causal_mask(query.shape[2], key.shape[2], query.device)
    scores = torch.where(seen, scores, 0)
    if normalizer.startswith("softmax"):
        floor = 0 if normalizer == "softmax_plus_one" else -math.inf
        peak = torch.where(seen, scores.detach(), floor)
        peak = F.pad(peak, (0, 1), value=floor).amax(-1, keepdim=True)
        peak = torch.where(peak == -math.inf, 0, peak)
        weights = torch.where(seen, (scores - peak).exp(), 0)
        total = weights.sum(-1, keepdim=True)
        if normalizer == "softmax_plus_one":
            total = total + (-peak).exp()
    else:
        peak = scores.new_zeros(*scores.shape[:3], 1)
        weights = torch.where(seen, phi(scores, normalizer), 0)
        total = weights.sum(-1, keepdim=True) if normalizer.endswith("_l1") else torch.ones_like(peak)
    empty = total == 0
    total = torch.where(empty, 1, total)
    out = (weights / total) @ repeat_heads(value, heads).to(wide)
    lse = torch.where(empty, -math.inf, peak + total.log())
    return out.to(query.dtype), lse[..., 0]


def _sdpa(query, key, value, mask, bias, causal, scale):
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    if keys == 0 or query.numel() == 0:  # the fused kernels divide by the number of keys
        return _reference(query, key, value, mask, bias, causal, scale, "softmax")[0]
    causal = causal and (queries > 1 or keys < 1)
    square = causal and queries == keys and mask is None and bias is None
    if causal and not square:
        ahead = _causal_mask(queries, keys, query.device)
        mask = ahead if mask is None else mask & ahead
    if bias is not None:
        mask = bias.to(query.dtype) if mask is None else torch.where(mask, bias.to(query.dtype), -math.inf)
    groups, value_width, width = heads // key.shape[1], value.shape[-1], query.shape[-1]
    if width != value_width:  # padding is cheaper than the kernel for unequal widths, which keeps all scores
        query, key, value = (F.pad(t, (0, max(width, value_width) - t.shape[-1])) for t in (query, key, value))
    if groups > 1 and mask is None and not square:
        # The heads of a group read the same keys: as further queries of one head they read them once.
        out = F.scaled_dot_product_attention(_fold(query, groups), key, value, scale=scale)
        out = out.unflatten(2, (groups, queries)).flatten(1, 2)
    else:
        grouped = {"enable_gqa": True} if groups > 1 else {}
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=square, scale=scale, **grouped
        )
    return out[..., :value_width]


def _fold(tensor: Tensor, groups: int) -> Tensor:
    """(batch, kv_heads * groups, queries, width) -> (batch, kv_heads, groups * queries, width)."""
    return tensor.unflatten(1, (-1, groups)).flatten(2, 3)


def _by_rows(query, key, value, predicate, bias, causal, scale, normalizer, return_lse, backend):
    """A predicate becomes masks of some query rows at a time."""
    queries, keys = query.shape[2], key.shape[2]
    rows = max(64, TILE * 16 // max(1, keys))
    outs, lses = [], []
    for start in range(0, max(1, queries), rows):
        at = slice(start, min(queries, start + rows))
        mask = _predicate_mask(predicate, query.shape[0], query.shape[1], at, keys, query.device)
        visible = max(0, min(keys, keys - queries + at.stop)) if causal else keys
        some_bias = None if bias is None else bias[:, :, at if bias.shape[2] > 1 else slice(None)]
        if some_bias is not None and some_bias.shape[3] > 1:
            some_bias = some_bias[..., :visible]
        result = _attention(query[:, :, at], key[:, :, :visible], value[:, :, :visible], mask[..., :visible],
                            some_bias, causal, scale, normalizer, return_lse, backend)  # fmt: skip
        outs.append(result[0] if return_lse else result)
        lses += [result[1]] if return_lse else []
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return (out, torch.cat(lses, dim=2)) if return_lse else out


def _predicate_mask(predicate: Predicate, batch: int, heads: int, rows: slice, keys: int, device) -> Tensor:
    b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=device).view(1, -1, 1, 1)
    i = torch.arange(rows.start, rows.stop, device=device).view(1, 1, -1, 1)
    mask = predicate(b, h, i, torch.arange(keys, device=device).view(1, 1, 1, -1))
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"the predicate given as mask must return a boolean tensor, got {getattr(mask, 'dtype', mask)}")
    return mask.expand(*mask.shape[:2], rows.stop - rows.start, keys)


def _causal_mask(queries: int, keys: int, device) -> Tensor:
    rows, columns = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return columns <= rows[:, None] + (keys - queries)


def _four_axes(name: str, tensor: Tensor, full: tuple[int, ...]) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim <= 4 and all(size in (1, wanted) for size, wanted in zip(reversed(tensor.shape), reversed(full)))
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to (batch, heads, queries, keys) = {full}"
        )
    return tensor[(None,) * (4 - tensor.ndim)]


def _packed(
    query, key, value, mask, bias, causal, scale, normalizer, cu_seqlens, cu_seqlens_key, return_lse, backend
) -> Any:
    if cu_seqlens is None:
        raise ValueError("cu_seqlens_key was given without cu_seqlens")
    cu_seqlens_key = cu_seqlens if cu_seqlens_key is None else cu_seqlens_key
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch has batch size 1, got query of shape {tuple(query.shape)}")
    for name, lengths in (("cu_seqlens", cu_seqlens), ("cu_seqlens_key", cu_seqlens_key)):
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64) or lengths.ndim != 1:
            raise TypeError(f"{name} must be a 1-D int32 tensor of cumulative lengths")
    if cu_seqlens.shape != cu_seqlens_key.shape:
        raise ValueError(f"{len(cu_seqlens) - 1} query sequences but {len(cu_seqlens_key) - 1} key sequences")
    if torch.compiler.is_compiling() or backend == "flex" or (backend == "auto" and query.device.type == "cuda"):
        # Reading the lengths would break the graph (or wait for the GPU): a predicate asks on the device.
        belongs = _same_sequence(cu_seqlens, cu_seqlens_key, mask, causal, query.shape[2], key.shape[2])
        return _attention(query, key, value, belongs, bias, False, scale, normalizer, return_lse, backend)
    starts, key_starts = _checked_lengths(cu_seqlens, query.shape[2]), _checked_lengths(cu_seqlens_key, key.shape[2])
    outs, lses = [], []
    for i, j, m, n in zip(starts[:-1], starts[1:], key_starts[:-1], key_starts[1:]):
        part_mask, part_bias = (_window(t, slice(i, j), slice(m, n)) for t in (mask, bias))
        result = _attention(query[:, :, i:j], key[:, :, m:n], value[:, :, m:n], part_mask, part_bias, causal, scale,
                            normalizer, return_lse, backend)  # fmt: skip
        outs.append(result[0] if return_lse else result)
        lses += [result[1]] if return_lse else []
    out = torch.cat(outs, dim=2)
    return (out, torch.cat(lses, dim=2)) if return_lse else out


def _checked_lengths(lengths: Tensor, tokens: int) -> list[int]:
    starts = lengths.tolist()
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != tokens or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"cumulative lengths must rise from 0 to the {tokens} packed tokens, got {starts}")
    return starts


def _window(what, rows: slice, columns: slice):
    """The part of a mask, predicate or bias that belongs to one sequence of a packed batch."""
    if what is None:
        return None
    if isinstance(what, Tensor):
        what = what[:, :, rows] if what.shape[2] > 1 else what
        return what[..., columns] if what.shape[3] > 1 else what
    return lambda b, h, i, j: what(b, h, i + rows.start, j + columns.start)


def _same_sequence(cu: Tensor, cu_key: Tensor, mask, causal: bool, queries: int, keys: int) -> Predicate:
    of_query = torch.searchsorted(cu, torch.arange(queries, device=cu.device, dtype=cu.dtype), right=True) - 1
    of_key = torch.searchsorted(cu_key, torch.arange(keys, device=cu.device, dtype=cu_key.dtype), right=True) - 1
    # Distance of a token from the end of its sequence: causality aligns the two ends.
    query_left = cu[of_query + 1] - torch.arange(queries, device=cu.device)
    key_left = cu_key[of_key + 1] - torch.arange(keys, device=cu.device)
    return functools.partial(_belongs, of_query, of_key, query_left, key_left, mask, causal)


def _belongs(of_query, of_key, query_left, key_left, mask, causal, b, h, i, j):
    same = of_query[i] == of_key[j]
    if causal:
        same = same & (key_left[j] >= query_left[i])
    if isinstance(mask, Tensor):
        same = same & _lookup(mask, b, h, i, j)
    elif mask is not None:
        same = same & mask(b, h, i, j)
    return same


def _lookup(tensor: Tensor, *index: Tensor) -> Tensor:
    return tensor[tuple(at if size > 1 else torch.zeros_like(at) for at, size in zip(index, tensor.shape))]


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(query, key, value, mask, bias, causal, scale, normalizer, return_lse):
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    if normalizer != "softmax":
        raise ValueError(f"backend='flex' computes softmax, not normalizer={normalizer!r}; take 'blocked' or 'auto'")
    queries, keys = query.shape[2], key.shape[2]
    if keys == 0 or query.numel() == 0:
        result = _reference(query, key, value, None, None, False, scale, normalizer)
        return result if return_lse else result[0]
    cpu = query.device.type == "cpu"
    tensors = [t for t in (query, key, value, bias) if t is not None]
    if cpu and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError("backend='flex' has no backward on CPU; take 'blocked' or 'auto'")
    if cpu and return_lse:
        raise ValueError("backend='flex' gives no log-sum-exp on CPU; take 'blocked' or 'auto'")
    seen = (lambda b, h, i, j: _lookup(mask, b, h, i, j)) if isinstance(mask, Tensor) else mask
    if causal and seen is None:
        seen = lambda b, h, i, j: j <= i + (keys - queries)  # noqa: E731
    elif causal:
        inner = seen
        seen = lambda b, h, i, j: (j <= i + (keys - queries)) & inner(b, h, i, j)  # noqa: E731

    block_mask = None
    if seen is not None:
        batch_axis, head_axis = (query.shape[0], query.shape[1]) if mask is not None else (None, None)
        if isinstance(mask, Tensor):
            batch_axis = batch_axis if mask.shape[0] > 1 else None
            head_axis = head_axis if mask.shape[1] > 1 else None
        block_mask = create_block_mask(seen, batch_axis, head_axis, queries, keys, device=query.device)
    score_mod = None if bias is None else lambda score, b, h, i, j: score + _lookup(bias, b, h, i, j)
    call = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    options = {"score_mod": score_mod, "block_mask": block_mask, "scale": scale,
               "enable_gqa": shares_keys(query, key)}  # fmt: skip
    if not return_lse:
        return call(query, key, value, **options)
    out, aux = call(query, key, value, return_aux=AuxRequest(lse=True), **options)
    return out, aux.lse
