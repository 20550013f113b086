"""Aggregated attention: every position sees its w x w neighbourhood and a pooled map of the whole, in one softmax.

With hats for division by the Euclidean norm, E a learnt query embedding, tau a learnt temperature and L_n the number of
keys that query n sees (neighbours inside the image, plus the pooled ones)::

    Q_n = (q^_n + E) softplus(tau) ln(L_n)                                          length-scaled cosine attention
    (A_local, A_pool) = softmax( [ Q_n . k^_m + beta_m  over neighbours m,  Q_n . k^_p + B_np  over pooled p ] )
    out_n = sum_m ( A_local[n, m] + q^_n . T_m + t_m ) v_m  +  sum_p A_pool[n, p] v_p

T and t (learnable tokens and their bias) add a query-dependent kernel *after* the softmax, with the bare q^. Values are
zero outside the image. With uniform weights the entropy of L_n keys is ln(L_n): scaling by it keeps the sharpness of
the attention where the image, and with it the number of keys, grows. Where nothing is pooled (the last stage), the same
query reads all N keys with L = N, by plain softmax attention: ``length_scaled_cosine_attention``.

Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132, sections 3.1 to 3.3.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, fused_attention, repeat_heads
from manyheads.engines.dense import attention

# Scores against pooled keys that may exist at once, in numbers: 256 MiB in float32. Beyond it the pooled keys are read
# tile by tile and merged with the neighbourhood through the log-sum-exp.
SCORE_LIMIT = 1 << 26


def aggregated_attention(
    query: Float[Tensor, "batch heads X Y head_dim"],
    key: Float[Tensor, "batch key_heads key_X key_Y head_dim"],
    value: Float[Tensor, "batch key_heads key_X key_Y value_dim"],
    pooled_key: Tensor,
    pooled_value: Tensor,
    *,
    window: int = 3,
    temperature: Tensor,
    query_embedding: Tensor | None = None,
    bias_local: Tensor | None = None,
    bias_pool: Tensor | None = None,
    learnable_tokens: Tensor | None = None,
    learnable_bias: Tensor | None = None,
    dropout: int | float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch heads X Y value_dim"]:
    """Attention to the nearest positions and to pooled keys in one softmax, plus a query-dependent local kernel.

    Args:
        query: (batch, heads, X, Y, head_dim); normalised inside, as the keys are.
        key: (batch, key_heads, X, Y, head_dim); key_heads divides heads.
        value: (batch, key_heads, X, Y, value_dim).
        pooled_key: (batch, key_heads, pooled, head_dim), the coarse view; it may come from another map (cross form).
        pooled_value: (batch, key_heads, pooled, value_dim).
        window: w, side of the neighbourhood in positions; odd. It is cut at the borders of the map.
        temperature: tau, (heads, 1, 1), before the softplus.
        query_embedding: E, (heads, 1, head_dim), added to the normalised query in the scores only; None has none.
        bias_local: beta, (heads, w * w), row-major over the neighbourhood.
        bias_pool: B, (heads, X * Y, pooled), the relative position bias of the pooled keys.
        learnable_tokens: T, (heads, head_dim, w * w).
        learnable_bias: t, (heads, 1, w * w).
        dropout: probability with which a weight of the joint softmax is dropped.
        backend: "reference" (the equation on unfolded neighbourhoods), "joint" (shifted maps, one softmax), "merged"
            (the pooled keys tile by tile, merged through the log-sum-exp: memory linear in the positions) or "auto":
            joint, or merged where scores would take more than ``SCORE_LIMIT`` numbers.

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, an even window, dropout outside [0, 1) or with "merged".

    Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132.

    >>> import torch
    >>> x, pooled = torch.randn(2, 3, 8, 6, 24), torch.randn(2, 3, 12, 24)
    >>> aggregated_attention(x, x, x, pooled, pooled, temperature=torch.full((3, 1, 1), 4.15)).shape
    torch.Size([2, 3, 8, 6, 24])
    """
    check_choice("backend", backend, ("auto", "reference", "joint", "merged"))
    _check(query, key, value, pooled_key, pooled_value, window)
    shapes = {
        "temperature": (temperature, (query.shape[1], 1, 1)),
        "query_embedding": (query_embedding, (query.shape[1], 1, query.shape[-1])),
        "bias_local": (bias_local, (query.shape[1], window**2)),
        "bias_pool": (bias_pool, (query.shape[1], query.shape[2] * query.shape[3], pooled_key.shape[2])),
        "learnable_tokens": (learnable_tokens, (query.shape[1], query.shape[-1], window**2)),
        "learnable_bias": (learnable_bias, (query.shape[1], 1, window**2)),
    }
    _check_shapes(shapes)
    if not 0 <= dropout < 1 or (dropout and backend == "merged"):
        raise ValueError(f"dropout={dropout} must be in [0, 1), and 0 where pooled keys are merged tile by tile")
    if backend == "auto":
        scores = query.shape[0] * query.shape[1] * query.shape[2] * query.shape[3] * pooled_key.shape[2]
        backend = "merged" if scores > SCORE_LIMIT and not dropout else "joint"

    wide, heads, grid = accumulation_dtype(query.dtype), query.shape[1], query.shape[2:4]
    unit = F.normalize(query.to(wide), dim=-1)
    near_key, far_key = (repeat_heads(F.normalize(x.to(wide), dim=-1), heads) for x in (key, pooled_key))
    near_value, far_value = (repeat_heads(x.to(wide), heads) for x in (value, pooled_value))
    inside = neighbours_inside(grid, window, query.device)
    scaled = length_scaled_query(unit, temperature.to(wide), inside.sum(-1) + pooled_key.shape[2], query_embedding)
    scores_of, mix = (_unfolded_scores, _unfolded_mix) if backend == "reference" else (_shifted_scores, _shifted_mix)

    local = scores_of(scaled, near_key, window)
    if bias_local is not None:
        local = local + bias_local.to(wide)[:, None, None]
    local = local.masked_fill(~inside, -torch.inf)
    flat = scaled.flatten(2, 3)
    if backend == "merged":
        bias = None if bias_pool is None else bias_pool.to(wide)[None]
        far, far_lse = attention(flat, far_key, far_value, bias=bias, scale=1.0, return_lse=True)
        far, far_lse = far.unflatten(2, grid), far_lse.unflatten(2, grid)
        lse = torch.logaddexp(local.logsumexp(-1), far_lse)
        near, out = (local - lse[..., None]).exp(), (far_lse - lse).exp()[..., None] * far
    else:
        far = flat @ far_key.mT
        if bias_pool is not None:
            far = far + bias_pool.to(wide)
        weights = F.dropout(torch.cat([local.flatten(2, 3), far], dim=-1).softmax(-1), dropout)
        near, far = weights.split([window**2, far.shape[-1]], dim=-1)
        near, out = near.unflatten(2, grid), (far @ far_value).unflatten(2, grid)
    if learnable_tokens is not None:
        near = near + (unit.flatten(2, 3) @ learnable_tokens.to(wide)).unflatten(2, grid)
    if learnable_bias is not None:
        near = near + learnable_bias.to(wide)[:, None]
    return (out + mix(near, near_value, window)).to(query.dtype)


def length_scaled_cosine_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    temperature: Tensor,
    query_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: int | float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention of all queries to all keys by ``softmax( (q^ + E) softplus(tau) ln(N) k^ + B ) v``, N keys.

    Args:
        query: (batch, heads, tokens, head_dim); normalised inside, as the keys are.
        key: (batch, key_heads, keys, head_dim); key_heads divides heads. Another number of keys than of queries is
            cross-attention; it is the keys that set the scale.
        value: (batch, key_heads, keys, value_dim).
        temperature: tau, (heads, 1, 1), before the softplus.
        query_embedding: E, (heads, 1, head_dim), added to the normalised query; None has none.
        bias: B, (heads, tokens, keys), added to the scores; gradients reach it.
        dropout: probability with which an attention weight is dropped.
        backend: of ``manyheads.engines.dense.attention``; with dropout "auto", "sdpa" or "reference".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, dropout outside [0, 1), or a backend that has none.

    Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132, section 3.3.

    >>> import torch
    >>> x = torch.randn(2, 3, 49, 24)
    >>> length_scaled_cosine_attention(x, x, x, temperature=torch.full((3, 1, 1), 4.15)).shape
    torch.Size([2, 3, 49, 24])
    """
    check_qkv(query, key, value)
    shapes = {
        "temperature": (temperature, (query.shape[1], 1, 1)),
        "query_embedding": (query_embedding, (query.shape[1], 1, query.shape[-1])),
        "bias": (bias, (query.shape[1], query.shape[2], key.shape[2])),
    }
    _check_shapes(shapes)
    if not 0 <= dropout < 1 or (dropout and backend not in ("auto", "sdpa", "reference")):
        raise ValueError(f"dropout={dropout} must be in [0, 1), and 0 where backend={backend!r}")
    query, key = cosine_query_and_key(query, key, temperature, query_embedding)
    bias = None if bias is None else bias.to(query.dtype)[None]
    if dropout and backend == "reference":
        wide, heads = accumulation_dtype(query.dtype), query.shape[1]
        scores = query.to(wide) @ repeat_heads(key, heads).to(wide).mT
        weights = (scores if bias is None else scores + bias.to(wide)).softmax(-1)
        return (F.dropout(weights, dropout) @ repeat_heads(value, heads).to(wide)).to(value.dtype)
    if dropout:
        return fused_attention(query, key, value, bias, scale=1.0, dropout=float(dropout))
    return cast(Tensor, attention(query, key, value, bias=bias, scale=1.0, backend=backend))


def cosine_query_and_key(
    query: Tensor, key: Tensor, temperature: Tensor, query_embedding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Q and k^, whose plain products are the scores of length-scaled cosine attention to all keys.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, key_heads, keys, head_dim).
        temperature: tau, (heads, 1, 1).
        query_embedding: E, (heads, 1, head_dim).

    >>> import math, torch
    >>> query, key = cosine_query_and_key(*torch.ones(2, 1, 1, 7, 4), torch.zeros(1, 1, 1))
    >>> [round((query @ key.mT)[0, 0, 0, 0].item(), 4), round(math.log(2) * math.log(7), 4)]
    [1.3488, 1.3488]
    """
    wide = accumulation_dtype(query.dtype)
    unit = F.normalize(query.to(wide), dim=-1)
    scaled = length_scaled_query(unit, temperature.to(wide), key.shape[2], query_embedding)
    return scaled.to(query.dtype), F.normalize(key.to(wide), dim=-1).to(key.dtype)


def length_scaled_query(
    unit_query: Tensor, temperature: Tensor, lengths: Tensor | int, query_embedding: Tensor | None = None
) -> Tensor:
    """Q = (q^ + E) softplus(tau) ln(L), the query of length-scaled cosine attention.

    Args:
        unit_query: q^, (batch, heads, ..., head_dim), of Euclidean norm 1.
        temperature: tau, (heads, 1, 1).
        lengths: L, how many keys each query sees, broadcasting to the positions (...), or one number for all.
        query_embedding: E, (heads, 1, head_dim).

    >>> import torch
    >>> q = length_scaled_query(torch.tensor([[[[1.0, 0.0]]]]), torch.zeros(1, 1, 1), 49)
    >>> [round(x, 4) for x in q.flatten().tolist()]  # ln 2 times ln 49
    [2.6976, 0.0]
    """
    tail = unit_query.ndim - 3
    heads = temperature.shape[0]
    factor = F.softplus(temperature).view(heads, *[1] * (tail + 1))
    logs = torch.as_tensor(lengths, device=unit_query.device).to(unit_query.dtype).log()
    if query_embedding is not None:
        unit_query = unit_query + query_embedding.to(unit_query.dtype).view(heads, *[1] * tail, -1)
    return unit_query * (factor * logs[..., None])


def neighbours_inside(grid: tuple[int, ...], window: int, device: torch.device) -> Tensor:
    """(X, Y, w * w), True where the neighbour lies inside the map.

    >>> neighbours_inside((2, 3), 3, torch.device("cpu")).sum(-1).tolist()
    [[4, 6, 4], [4, 6, 4]]
    """
    offsets = torch.arange(window, device=device) - window // 2
    rows, columns = (torch.arange(side, device=device)[:, None] + offsets for side in grid)
    rows, columns = (rows >= 0) & (rows < grid[0]), (columns >= 0) & (columns < grid[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(-2)


def _check_shapes(shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check(query: Tensor, key: Tensor, value: Tensor, pooled_key: Tensor, pooled_value: Tensor, window: int) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window={window} must be odd, so that it has a centre")
    check_qkv(query, key, value, ndim=5)
    if query.shape[2:4] != key.shape[2:4]:
        raise ValueError(f"query has a grid {tuple(query.shape[2:4])} but key {tuple(key.shape[2:4])}")
    try:
        check_qkv(query.flatten(2, 3), pooled_key, pooled_value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"pooled_key and pooled_value: {error}") from None
    if pooled_key.shape[1] != key.shape[1] or pooled_value.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"pooled_key has {pooled_key.shape[1]} heads and pooled_value width {pooled_value.shape[-1]}, "
            f"key and value {key.shape[1]} and {value.shape[-1]}"
        )


def _padded(x: Tensor, window: int) -> Tensor:
    reach = window // 2
    return F.pad(x, (0, 0, reach, reach, reach, reach))


def _unfolded_scores(scaled: Tensor, key: Tensor, window: int) -> Tensor:
    patches = _padded(key, window).unfold(2, window, 1).unfold(3, window, 1).flatten(-2)
    return torch.einsum("bhxyd,bhxydm->bhxym", scaled, patches)


def _unfolded_mix(weights: Tensor, value: Tensor, window: int) -> Tensor:
    patches = _padded(value, window).unfold(2, window, 1).unfold(3, window, 1).flatten(-2)
    return torch.einsum("bhxym,bhxydm->bhxyd", weights, patches)


def _shifted(x: Tensor, window: int) -> list[Tensor]:
    """One view of the padded map for each neighbour; all share memory, where unfolding would hold w * w copies."""
    padded, (height, width) = _padded(x, window), x.shape[2:4]
    return [padded[:, :, i : i + height, j : j + width] for i in range(window) for j in range(window)]


def _shifted_scores(scaled: Tensor, key: Tensor, window: int) -> Tensor:
    scaled = scaled.contiguous()
    return torch.stack([(scaled * near).sum(-1) for near in _shifted(key, window)], dim=-1)


def _shifted_mix(weights: Tensor, value: Tensor, window: int) -> Tensor:
    out = torch.zeros_like(value, memory_format=torch.contiguous_format)
    for weight, near in zip(weights.unbind(-1), _shifted(value, window)):
        out = torch.addcmul(out, weight[..., None], near)
    return out
