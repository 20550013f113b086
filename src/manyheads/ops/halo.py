"""Halo attention: the queries of a block share one window of keys, the block grown by a halo on every side.

With block side b, halo h, window side w = b + 2 h and stride s, for the query at (x, y) of its block
(0 <= x, y < b / s) and the window's position (i, j)::

    L = scale q . k_ij + q . (R_h[i - x + w - 1] + R_w[j - y + w - 1])        out = sum_ij softmax_ij(L) v_ij

Keys and values outside the map are zero; by default they take part (their position term stays), as in the published
models. Tables R are (2 w - 1, head_dim), shared by all heads; with stride 2, x and y count the sub-sampled queries.

Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731, section 2.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale

# Scores of one slab of block rows: 4 MiB in float32, which stay in a core's share of the cache.
_SLAB = 1 << 20


def halo_attention(
    query: Float[Tensor, "batch heads query_X query_Y head_dim"],
    key: Float[Tensor, "batch key_heads X Y head_dim"],
    value: Float[Tensor, "batch key_heads X Y value_dim"],
    *,
    block: int,
    halo: int,
    rel_height: Float[Tensor, "offsets head_dim"] | None = None,
    rel_width: Float[Tensor, "offsets head_dim"] | None = None,
    stride: int = 1,
    scale: float | None = None,
    scale_pos_embed: bool = False,
    mask_padding: bool = False,
    mask: Bool[Tensor, "batch X Y"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads query_X query_Y value_dim"]:
    """Blocked local attention with relative positions; parameters and receptive field are independent.

    Args:
        query: (batch, heads, X / stride, Y / stride, head_dim); ``block`` divides X and Y.
        key: (batch, key_heads, X, Y, head_dim); key_heads divides heads.
        value: (batch, key_heads, X, Y, value_dim).
        block: b, side of a block in key positions.
        halo: h, positions that the window reaches beyond the block.
        rel_height, rel_width: tables of relative positions, (2 (b + 2 h) - 1, head_dim); None has no such term.
        stride: 1, or 2 for queries sub-sampled by two ("attention downsampling"); divides ``block``.
        scale: factor on the content scores; None means ``head_dim ** -0.5``.
        scale_pos_embed: let the factor also multiply the position term.
        mask_padding: hide positions outside the map instead of counting them as zeros (advised for new training).
        mask: boolean (batch, X, Y), True for positions that serve as keys; hidden ones take no part at all.
        backend: "reference" (the equation with its gathered tables at once), "blocks" (slab after slab) or "auto".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, a block that does not divide the map, block below 1, halo below 0, a stride
            other than 1 or 2, tables of another length.

    Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.

    >>> import torch
    >>> x, table = torch.randn(2, 4, 16, 8, 8), torch.randn(19, 8)
    >>> halo_attention(x, x, x, block=4, halo=3, rel_height=table, rel_width=table).shape
    torch.Size([2, 4, 16, 8, 8])
    """
    check_choice("backend", backend, ("auto", "reference", "blocks"))
    check_qkv(query, key, value, ndim=5)
    _check(query, key, block, halo, stride, rel_height, rel_width, mask)
    if not query.numel():
        return query.new_zeros(*query.shape[:4], value.shape[-1])
    wide = accumulation_dtype(query.dtype)
    scale = resolve_scale(scale, query.shape[-1])
    keys = _visible(key, mask, mask_padding, block, halo)
    heads = query.shape[1]
    key, value = (repeat_heads(_windows(t.to(wide), block, halo), heads) for t in (key, value))
    side = block // stride
    blocks = rearrange(query.to(wide), "b h (n x) (m y) d -> b h n m x y d", x=side, y=side)
    tables = [None if t is None else _offsets(t.to(wide), side, block + 2 * halo) for t in (rel_height, rel_width)]
    position = scale if scale_pos_embed else 1.0
    rows = blocks.shape[2]
    frugal = backend != "reference" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if frugal:
        scores = blocks[:, :, 0, ..., 0].numel() * (block + 2 * halo) ** 2
        step = max(1, _SLAB // max(1, scores))
        parts = [
            _attend(
                blocks[:, :, n : n + step], key[:, :, n : n + step], value[:, :, n : n + step], tables, scale, position,
                None if keys is None else keys[:, :, n : n + step],
            )
            for n in range(0, rows, step)
        ]  # fmt: skip
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    else:
        out = _attend(blocks, key, value, tables, scale, position, keys)
    return rearrange(out, "b h n m (x y) d -> b h (n x) (m y) d", x=side).to(query.dtype)


def _attend(blocks, key, value, tables, scale, position, keys) -> Tensor:
    """Outputs (b, h, n, m, x * y, d) of the blocks (b, h, n, m, x, y, d) for windows (b, h, n, m, i, j, d)."""
    window = key.shape[4]
    content = (blocks * scale).flatten(4, 5) @ key.flatten(4, 5).mT
    scores = content.view(*blocks.shape[:6], window, window)
    heights, widths = tables
    free = not torch.is_grad_enabled()
    if heights is not None:
        term = position * torch.einsum("bhnmxyd,xid->bhnmxyi", blocks, heights)[..., None]
        scores = scores.add_(term) if free else scores + term
    if widths is not None:
        term = position * torch.einsum("bhnmxyd,yjd->bhnmxyj", blocks, widths)[..., None, :]
        scores = scores.add_(term) if free else scores + term
    scores = scores.flatten(6).flatten(4, 5)
    if keys is None:
        weights = scores.softmax(dim=-1)
    else:
        # A block without keys gets equal scores first and zero weights after, so that no row is all -inf.
        scores = torch.where(keys | ~keys.any(-1, keepdim=True), scores, -torch.inf)
        weights = scores.softmax(dim=-1).masked_fill(~keys, 0)
    return weights @ value.flatten(4, 5)


def _windows(tensor: Tensor, block: int, halo: int) -> Tensor:
    """(b, h, X, Y, d) as overlapping windows (b, h, n, m, i, j, d), zero outside the map."""
    window = block + 2 * halo
    padded = F.pad(tensor, (0, 0, halo, halo, halo, halo))
    return padded.unfold(2, window, block).unfold(3, window, block).permute(0, 1, 2, 3, 5, 6, 4)


def _visible(key: Tensor, mask: Tensor | None, mask_padding: bool, block: int, halo: int) -> Tensor | None:
    """Which window positions are keys, (b, 1, n, m, 1, i * j); None for all of them."""
    if mask is None and not mask_padding:
        return None
    if mask is None:
        mask = torch.ones(1, *key.shape[2:4], dtype=torch.bool, device=key.device)
    inside = mask[:, None, ..., None]
    # Where padding is not masked, positions outside the map are keys although they are not in the mask.
    inside = inside if mask_padding else ~inside
    windows = _windows(inside.to(torch.uint8), block, halo).bool()[..., 0]
    windows = windows if mask_padding else ~windows
    return windows.flatten(4)[:, :, :, :, None]


def _offsets(table: Tensor, side: int, window: int) -> Tensor:
    """The rows R[i - x + w - 1] of a table, (x, i, d)."""
    here = torch.arange(window, device=table.device) + window - 1
    return table[here - torch.arange(side, device=table.device)[:, None]]


def _check(query, key, block, halo, stride, rel_height, rel_width, mask) -> None:
    if block < 1 or halo < 0:
        raise ValueError(f"block={block} must be at least 1 and halo={halo} at least 0")
    if stride not in (1, 2) or block % stride:
        raise ValueError(f"stride={stride} must be 1, or 2 with an even block, got block={block}")
    grid = key.shape[2:4]
    if grid[0] % block or grid[1] % block:
        raise ValueError(f"blocks of {block} x {block} do not divide a map of {grid[0]} x {grid[1]}; pad the map")
    if query.shape[2:4] != (grid[0] // stride, grid[1] // stride):
        wanted = (grid[0] // stride, grid[1] // stride)
        raise ValueError(f"query has a map of {tuple(query.shape[2:4])}, needs {wanted} for stride {stride}")
    length = 2 * (block + 2 * halo) - 1
    for name, table in (("rel_height", rel_height), ("rel_width", rel_width)):
        if table is not None and table.shape != (length, query.shape[-1]):
            wanted = (length, query.shape[-1])
            raise ValueError(
                f"{name} of shape {tuple(table.shape)} must be (2 (block + 2 halo) - 1, head_dim) = {wanted}"
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (key.shape[0], *grid)):
        wanted = (key.shape[0], *grid)
        raise ValueError(f"mask must be boolean of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}")
