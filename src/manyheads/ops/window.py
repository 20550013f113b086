"""Window attention: the grid is cut into equal windows and every token attends to the tokens of its own window.

    out_i = sum_j softmax_j( scale * q_i . k_j ) v_j        over the tokens j of i's window

Source: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030, section 3.2;
without shifts and position bias it is the spatial half of DaViT, arXiv 2204.03645.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.engines.common import (
    accumulation_dtype,
    check_choice,
    check_qkv,
    fused_attention,
    repeat_heads,
    resolve_scale,
)


def window_attention(
    query: Float[Tensor, "batch heads X Y head_dim"],
    key: Float[Tensor, "batch key_heads X Y head_dim"],
    value: Float[Tensor, "batch key_heads X Y value_dim"],
    *,
    window: int | tuple[int, int],
    mask: Bool[Tensor, "batch X Y"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads X Y value_dim"]:
    """Softmax attention inside non-overlapping windows of a grid, at a cost linear in the number of tokens.

    Args:
        query: (batch, heads, X, Y, head_dim); window sizes divide X and Y (pad the input of the layer otherwise).
        key: (batch, key_heads, X, Y, head_dim); key_heads divides heads.
        value: (batch, key_heads, X, Y, value_dim).
        window: tokens per window along X and Y; one integer for square windows.
        mask: boolean (batch, X, Y), True for tokens that serve as keys. DaViT lets padded tokens serve, so it gives
            none; a window without any key gives zeros.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        backend: "reference" (the equation as an einsum), "sdpa" (torch's fused attention over all windows at once)
            or "auto".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, or windows that do not divide the grid.

    Source: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.

    >>> import torch
    >>> x = torch.randn(2, 3, 14, 21, 32)
    >>> window_attention(x, x, x, window=7).shape
    torch.Size([2, 3, 14, 21, 32])
    """
    check_choice("backend", backend, ("auto", "reference", "sdpa"))
    check_qkv(query, key, value, ndim=5)
    if query.shape[2:4] != key.shape[2:4]:
        raise ValueError(f"query has a grid {tuple(query.shape[2:4])} but key {tuple(key.shape[2:4])}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (query.shape[0], *query.shape[2:4])):
        wanted = (query.shape[0], *query.shape[2:4])
        raise ValueError(f"mask must be boolean of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    grid = query.shape[2:4]
    scale = resolve_scale(scale, query.shape[-1])
    keys = None
    if mask is not None:
        keys = window_partition(mask[:, None, ..., None], window)[..., 0][:, :, None]
    attend = _reference if backend == "reference" else fused_attention
    query, key, value = (window_partition(tensor, window) for tensor in (query, key, value))
    out = attend(query, key, value, keys, scale=scale)
    return window_merge(out, window, grid)


def window_partition(tensor: Tensor, window: int | tuple[int, int]) -> Tensor:
    """(batch, heads, X, Y, dim) as (batch * windows, heads, tokens of a window, dim), both in row-major order.

    Raises:
        ValueError: windows that do not divide the grid.
    """
    tall, wide = _sizes(window, tensor.shape[2:4])
    return rearrange(tensor, "b h (nx wx) (ny wy) d -> (b nx ny) h (wx wy) d", wx=tall, wy=wide)


def window_merge(windows: Tensor, window: int | tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`window_partition` for a grid (X, Y)."""
    tall, wide = _sizes(window, grid)
    across, down = grid[1] // wide, grid[0] // tall
    return rearrange(windows, "(b nx ny) h (wx wy) d -> b h (nx wx) (ny wy) d", nx=down, ny=across, wx=tall, wy=wide)


def window_means(tensor: Tensor, window: int | tuple[int, int]) -> Tensor:
    """The mean of every window of maps (..., X, Y, dim), as (..., X / window, Y / window, dim).

    Raises:
        ValueError: windows that do not divide the map.

    >>> window_means(torch.arange(8.0).view(2, 4, 1), 2).flatten().tolist()
    [2.5, 4.5]
    """
    tall, wide = _sizes(window, tensor.shape[-3:-1])
    # Whole rows are added, then whole columns: torch's mean over two inner axes takes ten times as long on a CPU.
    total = tensor.to(accumulation_dtype(tensor.dtype))
    total = functools.reduce(torch.add, total.unflatten(-3, (tensor.shape[-3] // tall, tall)).unbind(-3))
    total = functools.reduce(torch.add, total.unflatten(-2, (tensor.shape[-2] // wide, wide)).unbind(-2))
    return (total / (tall * wide)).to(tensor.dtype)


def _sizes(window: int | tuple[int, int], grid: tuple[int, ...]) -> tuple[int, int]:
    tall, wide = (window, window) if isinstance(window, int) else window
    if tall < 1 or wide < 1:
        raise ValueError(f"window must be positive, got {window}")
    if grid[0] % tall or grid[1] % wide:
        raise ValueError(f"windows of {tall} x {wide} do not divide a grid of {grid[0]} x {grid[1]}; pad the input")
    return tall, wide


def _reference(query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, scale: float) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = scale * torch.einsum("bhid,bhjd->bhij", query.to(wide), key.to(wide))
    if keys is not None:
        # A window without keys gets equal scores first and zero weights after, so that no row is all -inf.
        scores = torch.where(keys | ~keys.any(-1, keepdim=True), scores, -torch.inf)
    weights = scores.softmax(dim=-1)
    if keys is not None:
        weights = weights.masked_fill(~keys, 0)
    return torch.einsum("bhij,bhjd->bhid", weights, value.to(wide)).to(query.dtype)
