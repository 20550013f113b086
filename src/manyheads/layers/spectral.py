"""The layers of SpectFormer: the spectral filter, attention with separate projections, attention of a class token.

Source: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.ops.spectral import resize_filter, spectral_gating


class SpectralGating(nn.Module):
    """A learnt global filter for each channel of a map of fixed size.

    Args:
        dim: channels.
        grid: sides of the map.
        resize: resize the filter for maps of another size, at each call; False makes them an error.

    State: ``complex_weight`` (X, Y // 2 + 1, dim, 2), begun as normal with deviation 0.02.

    Shape: (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: in ``forward``, another width, or a map of another size although ``resize`` is off.

    Source: "SpectFormer", arXiv 2304.06446.

    >>> import torch
    >>> SpectralGating(8, (14, 14))(torch.randn(2, 14, 14, 8)).shape
    torch.Size([2, 14, 14, 8])
    """

    def __init__(self, dim: int, grid: tuple[int, int], *, resize: bool = False) -> None:
        super().__init__()
        if min(dim, *grid) < 1:
            raise ValueError(f"dim={dim} and grid={grid} must be positive")
        self.grid, self.resize = tuple(grid), resize
        self.complex_weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, dim, 2))

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Resize the filter for good, for maps of ``grid``."""
        with torch.no_grad():
            self.complex_weight = nn.Parameter(resize_filter(self.complex_weight, grid).clone())
        self.grid = grid

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        weight = self.complex_weight
        if x.ndim != 4 or x.shape[-1] != weight.shape[2]:
            wanted = f"(batch, {self.grid[0]}, {self.grid[1]}, {weight.shape[2]})"
            raise ValueError(f"x must be {wanted}, got shape {tuple(x.shape)}; unflatten tokens first")
        if tuple(x.shape[1:3]) != self.grid:
            if not self.resize:
                expected = f"{self.grid[0]} x {self.grid[1]}"
                raise ValueError(f"the filter is for maps of {expected}, got {x.shape[1]} x {x.shape[2]}; allow resize")
            weight = resize_filter(weight, (x.shape[1], x.shape[2]))
        return spectral_gating(x, weight)


class FullAttention(nn.Module):
    """Softmax attention over all positions of a map.

    Args:
        dim: width, a multiple of ``heads``.
        heads: attention heads.
        fused: one projection ``qkv`` (order q, k, v), or ``q`` and ``kv`` (order k, v).

    Shape: (batch, X, Y, dim), returned as it came.

    >>> import torch
    >>> FullAttention(8, 2, fused=False)(torch.randn(2, 3, 4, 8)).shape
    torch.Size([2, 3, 4, 8])
    """

    def __init__(self, dim: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.heads, self.fused = heads, fused
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim)
        else:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        projected = self.qkv(x) if self.fused else torch.cat([self.q(x), self.kv(x)], dim=-1)
        query, key, value = rearrange(projected, "b x y (three h d) -> three b h (x y) d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(out, "b h (x y) d -> b x y (h d)", x=x.shape[1]))


class ClassAttention(nn.Module):
    """Attention of the first token to all tokens, itself included.

    Args:
        dim: width, a multiple of ``heads``.
        heads: attention heads.

    Shape: (batch, tokens, dim) to (batch, 1, dim).

    >>> import torch
    >>> ClassAttention(8, 2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 1, 8])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1 dim"]:
        query = rearrange(self.q(x[:, :1]), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(out, "b h n d -> b n (h d)"))


def _check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
