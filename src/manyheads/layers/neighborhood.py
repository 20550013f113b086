"""Neighborhood attention as a layer: projections around the operator, with the keys of the authors' checkpoints.

Sources: "Neighborhood Attention Transformer", arXiv 2204.07143; "Dilated Neighborhood Attention Transformer",
arXiv 2209.15001.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from manyheads.ops.neighborhood import neighborhood_attention


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention on channels-last input of one, two or three axes.

    State: ``qkv.weight|bias``, ``proj.weight|bias`` and, with a bias table, ``rpb`` (heads, 2 window - 1, ...).

    Args:
        dim: channels of input and output.
        num_heads: heads; divides ``dim``.
        kernel_size: window, one integer or one per axis.
        axes: number of axes of the grid, 1, 2 or 3.
        dilation: distance between neighbours, one integer or one per axis.
        stride: queries that share a window, one integer or one per axis.
        causal: whether later tokens are hidden, for all axes or one per axis.
        rel_pos_bias: learn a relative position bias, which every published NAT and DiNAT has.
        qkv_bias: give the input projection a bias.
        qk_scale: factor on the scores; None means ``head_dim ** -0.5``.
        attn_drop: dropout on the attention weights.
        proj_drop: dropout on the output.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, or ``axes`` is not 1, 2 or 3.

    Source: "Neighborhood Attention Transformer", arXiv 2204.07143.

    >>> layer = NeighborhoodAttention(32, 4, kernel_size=3, rel_pos_bias=True)
    >>> layer(torch.randn(1, 9, 7, 32)).shape
    torch.Size([1, 9, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int | Sequence[int],
        axes: int = 2,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if axes not in (1, 2, 3):
            raise ValueError(f"axes must be 1, 2 or 3, got {axes}")
        self.num_heads, self.axes, self.scale, self.attn_drop = num_heads, axes, qk_scale, attn_drop
        self.window = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
        self.stride = stride if isinstance(stride, int) else tuple(stride)
        self.dilation = dilation if isinstance(dilation, int) else tuple(dilation)
        self.causal = causal if isinstance(causal, bool) else tuple(causal)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * size - 1 for size in self.window)))
            nn.init.trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *grid, dim) to the same shape; window times dilation must fit the grid."""
        if x.ndim != self.axes + 2:
            raise ValueError(f"x must be (batch, {self.axes} axes, dim), got shape {tuple(x.shape)}")
        query, key, value = rearrange(self.qkv(x), "b ... (three h d) -> three b h ... d", three=3, h=self.num_heads)
        out = neighborhood_attention(
            query,
            key,
            value,
            window=self.window,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            rel_pos_bias=self.rpb,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(rearrange(out, "b h ... d -> b ... (h d)")))
