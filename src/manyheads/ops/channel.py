"""Channel-group attention: the D channels of a head attend to each other, the N positions being their features.

For every head (channel group)::

    A[i, j] = softmax_j( scale * sum_n query[n, i] * key[n, j] )        (D x D, whatever N)
    out[n, i] = sum_j A[i, j] * value[n, j]

Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, resolve_scale


def channel_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads value_tokens head_dim"],
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads value_tokens head_dim"]:
    """Global attention at a cost linear in the number of tokens: channels attend to channels.

    Args:
        query: (batch, heads, tokens, head_dim); a head is a channel group.
        key: same shape as the query.
        value: (batch, heads, value_tokens, head_dim); value_tokens may differ from tokens (cross form).
        scale: factor on the channel scores; None means ``head_dim ** -0.5`` (DaViT). The "v2" flavour of the
            Florence-2 towers uses ``tokens ** -0.5``.
        mask: boolean (batch, tokens), True for real tokens: padded positions do not enter the sums and, where value
            has as many tokens, give zeros.
        backend: "reference" (the equation as an einsum), "fused" (two batched matrix products, sums over
            positions in float32 whatever the dtype) or "auto".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, or grouped key/value heads, which channel groups do not have.

    Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645, section 3.2.

    >>> import torch
    >>> x = torch.randn(2, 3, 49, 32)
    >>> channel_attention(x, x, x).shape
    torch.Size([2, 3, 49, 32])
    """
    check_choice("backend", backend, ("auto", "reference", "fused"))
    _check(query, key, value, mask)
    scale = resolve_scale(scale, query.shape[-1])
    if mask is not None:
        key = key.masked_fill(~mask[:, None, :, None], 0)
    out = (_reference if backend == "reference" else _fused)(query, key, value, scale)
    if mask is not None and value.shape[2] == mask.shape[1]:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out


def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    scores = scale * torch.einsum("bhni,bhnj->bhij", query.to(wide), key.to(wide))
    return torch.einsum("bhij,bhnj->bhni", scores.softmax(dim=-1), value.to(wide)).to(query.dtype)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # The sum runs over thousands of positions: half precision keeps it in float32. The D x D softmax is tiny.
    wide = accumulation_dtype(query.dtype)
    scores = torch.matmul((query * scale).to(wide).transpose(-2, -1), key.to(wide))
    weights = scores.softmax(dim=-1).to(value.dtype)
    return torch.matmul(value, weights.transpose(-2, -1))


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if isinstance(value, Tensor) and isinstance(key, Tensor) and value.ndim == key.ndim == 4:
        check_qkv(query, key, value[:, :, :1].expand(-1, -1, key.shape[2], -1) if value.shape[2] else key)
    else:
        check_qkv(query, key, value)
    if query.shape != key.shape:
        raise ValueError(f"channel attention pairs positions of query {tuple(query.shape)} and key {tuple(key.shape)}")
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(f"value has {value.shape[-1]} channels a head but key has {key.shape[-1]}")
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (query.shape[0], query.shape[2])):
        wanted = (query.shape[0], query.shape[2])
        raise ValueError(f"mask must be boolean of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}")
