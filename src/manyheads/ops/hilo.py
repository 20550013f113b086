"""HiLo attention: some heads look inside small windows, the others at a pooled map of the whole image.

With s the side of the windows and pool the mean over the s x s positions of a window::

    high heads:  out_i = sum_j softmax_j( scale * q_i . k_j ) v_j              over the tokens j of i's window
    low heads:   out_i = sum_p softmax_p( scale * q_i . pool(k)_p ) pool(v)_p  over all pooled positions p

Pooling commutes with the affine projection in front, so pooling the projected keys, as here, or the layer's input, as
``manyheads.layers.hilo`` does to project less, is the same thing.

Source: "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213, section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import (
    accumulation_dtype,
    check_choice,
    check_qkv,
    fused_attention,
    repeat_heads,
    resolve_scale,
)
from manyheads.ops.window import window_attention, window_means


def hilo_attention(
    query: Float[Tensor, "batch heads X Y head_dim"],
    key: Float[Tensor, "batch key_heads key_X key_Y head_dim"],
    value: Float[Tensor, "batch key_heads key_X key_Y value_dim"],
    *,
    window: int,
    low_heads: int,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads X Y value_dim"]:
    """Window attention in the first heads, attention to the average-pooled map in the last ``low_heads`` heads.

    Args:
        query: (batch, heads, X, Y, head_dim), high-frequency heads first.
        key: (batch, key_heads, X, Y, head_dim); key_heads divides heads. A map of another size than the query's (the
            cross form) is possible where all heads are low.
        value: (batch, key_heads, X, Y, value_dim).
        window: s, side of the windows and of the pooling in tokens; it divides X and Y. With 1 there is nothing to
            pool and nothing in a window: all heads are low, which then is ordinary attention over the map.
        low_heads: how many of the last heads are low-frequency; ``low_head_count`` derives it from the paper's alpha.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        backend: "reference" (the equations), "sdpa" (torch's fused attention for both groups) or "auto".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, a window that does not divide the map (the layer pads its input), heads
            outside 0 ... heads, or a group of query heads that shares key heads with the other group.

    Source: "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213.

    >>> import torch
    >>> x = torch.randn(2, 4, 8, 12, 16)
    >>> hilo_attention(x, x, x, window=2, low_heads=3).shape
    torch.Size([2, 4, 8, 12, 16])
    """
    check_choice("backend", backend, ("auto", "reference", "sdpa"))
    check_qkv(query, key, value, ndim=5)
    heads, shared = query.shape[1], query.shape[1] // key.shape[1]
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if not 0 <= low_heads <= heads:
        raise ValueError(f"low_heads={low_heads} must be between 0 and the {heads} heads of the query")
    high = 0 if window == 1 else heads - low_heads
    if high % shared:
        raise ValueError(f"{high} high heads cut a group of {shared} query heads that share one key head")
    if high and query.shape[2:4] != key.shape[2:4]:
        raise ValueError(
            f"query has a grid {tuple(query.shape[2:4])} but key {tuple(key.shape[2:4])}: high-frequency heads attend "
            "inside the query's own windows; another map can be read where all heads are low"
        )
    for name, tensor in (("query", query), ("key", key)) if high else (("key", key),):
        if tensor.shape[2] % window or tensor.shape[3] % window:
            size = f"{tensor.shape[2]} x {tensor.shape[3]}"
            raise ValueError(f"windows of {window} x {window} do not divide the {name}'s grid of {size}; pad the input")
    scale = resolve_scale(scale, query.shape[-1])
    if 0 in query.shape[2:4]:
        return value.new_zeros(*query.shape[:-1], value.shape[-1])
    split = high // shared
    parts = []
    if high:
        q, k, v = query[:, :high], key[:, :split], value[:, :split]
        parts.append(window_attention(q, k, v, window=window, scale=scale, backend=backend))
    if high < heads:
        q, k, v = query[:, high:], key[:, split:], value[:, split:]
        attend = _reference if backend == "reference" else _sdpa
        out = attend(q.flatten(2, 3), _pool(k, window), _pool(v, window), scale)
        parts.append(out.unflatten(2, query.shape[2:4]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def low_head_count(heads: int, alpha: int | float, window: int) -> int:
    """How many of ``heads`` are low-frequency: alpha times heads, cut off, as in the authors' code; all for window 1.

    Raises:
        ValueError: ``alpha`` outside [0, 1], or a window below 1.

    >>> low_head_count(12, 0.9, 2), low_head_count(12, 0.7, 2), low_head_count(24, 0.5, 1)
    (10, 8, 24)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must be between 0 (all heads high-frequency) and 1 (all low-frequency)")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    return heads if window == 1 else int(alpha * heads)


def _pool(tensor: Tensor, window: int) -> Tensor:
    """(batch, heads, X, Y, dim) as (batch, heads, pooled positions, dim)."""
    return (tensor if window == 1 else window_means(tensor, window)).flatten(2, 3)


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    weights = (scale * torch.einsum("bhid,bhpd->bhip", query.to(wide), key.to(wide))).softmax(dim=-1)
    return torch.einsum("bhip,bhpd->bhid", weights, value.to(wide)).to(query.dtype)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    if not key.shape[2]:  # torch's fused attention divides by the number of keys
        return _reference(query, key, value, scale)
    return fused_attention(query, key, value, scale=scale)
