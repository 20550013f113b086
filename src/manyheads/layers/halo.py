"""Halo attention with its projections, as it replaces the 3 x 3 convolution of a bottleneck.

    q = W_q x (every stride-th position),   [k | v] of head after head = W_kv x,   no biases, no output projection

Maps that the block does not divide are padded with zeros at the bottom and the right: more of the zeros that surround
the map anyway. They are cropped afterwards.

Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import make_divisible, trunc_normal_
from torch import Tensor, nn

from manyheads.layers.conv_norm import normed
from manyheads.ops.halo import halo_attention


class RelativePositions(nn.Module):
    """The two tables of relative positions.

    Args:
        window: side of the key window.
        head_dim: width of a query.
    """

    def __init__(self, window: int, head_dim: int) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim))
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=head_dim**-0.5)


class HaloAttention(nn.Module):
    """Halo attention on a map, from ``dim`` to ``out_dim`` channels.

    Args:
        dim: input channels.
        out_dim: output channels (all heads' values); None keeps ``dim``.
        block, halo: as in ``manyheads.ops.halo.halo_attention``.
        heads: attention heads.
        head_dim: width of query and key; None is ``round8(out_dim * qk_ratio) / heads``.
        qk_ratio: width of all queries by ``out_dim``.
        stride: 1 or 2. An odd block cannot be sub-sampled: it attends at stride 1 and pools 2 x 2 means.
        scale_pos_embed, mask_padding: as in the operator.
        pad: pad maps that the block does not divide; False refuses them.
        ceil: keep the last row and column of an odd map when pooling, as strided convolutions do; False drops them, as
            timm does.

    Shape: (batch, dim, X, Y) to (batch, out_dim, ceil(X / stride), ceil(Y / stride)).

    Raises:
        ValueError: heads that do not divide the widths, another stride, block below 1, halo below 0; in ``forward``, an
            input of another width, and with ``pad=False`` a map that the block does not divide.

    Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.

    >>> import torch
    >>> HaloAttention(16, 32, block=4, halo=1, heads=2, stride=2)(torch.randn(2, 16, 8, 10)).shape
    torch.Size([2, 32, 4, 5])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        block: int,
        halo: int,
        heads: int = 8,
        head_dim: int | None = None,
        qk_ratio: int | float = 1.0,
        stride: int = 1,
        scale_pos_embed: bool = False,
        mask_padding: bool = False,
        pad: bool = True,
        ceil: bool = True,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        width = make_divisible(out_dim * qk_ratio, 8) if head_dim is None else head_dim * heads
        if heads < 1 or out_dim % heads or width % heads:
            raise ValueError(f"heads={heads} must divide out_dim={out_dim} and the width of all queries, {width}")
        if block < 1 or halo < 0 or stride not in (1, 2):
            raise ValueError(f"block={block} must be at least 1, halo={halo} at least 0, stride={stride} 1 or 2")
        self.block, self.halo, self.heads, self.head_dim, self.pad = block, halo, heads, width // heads, pad
        self.scale_pos_embed, self.mask_padding = scale_pos_embed, mask_padding
        self.pool, self.ceil = stride == 2 and block % 2 == 1, ceil
        self.stride = 1 if self.pool else stride
        self.q = nn.Conv2d(dim, width, 1, stride=self.stride, bias=False)
        self.kv = nn.Conv2d(dim, width + out_dim, 1, bias=False)
        self.pos_embed = RelativePositions(block + 2 * halo, self.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal projections of variance 1 / dim."""
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.in_channels**-0.5)

    def forward(self, x: Float[Tensor, "batch dim X Y"]) -> Float[Tensor, "batch out_dim rows columns"]:
        if x.ndim != 4 or x.shape[1] != self.q.in_channels:
            raise ValueError(f"input must be (batch, {self.q.in_channels}, X, Y), got {tuple(x.shape)}")
        height, width = x.shape[2:]
        below, right = -height % self.block, -width % self.block
        mask = None
        if below or right:
            if not self.pad:
                raise ValueError(f"a map of {height} x {width} is no multiple of the block, {self.block}")
            if self.mask_padding:
                inside = x.new_ones(x.shape[0], height, width, dtype=torch.bool)
                mask = F.pad(inside, (0, right, 0, below))
            x = F.pad(x, (0, right, 0, below))
        query = self._heads(normed(self.q, None, x))
        key, value = self._heads(normed(self.kv, None, x)).tensor_split([self.head_dim], dim=-1)
        out = halo_attention(
            query, key, value, block=self.block, halo=self.halo, stride=self.stride, mask=mask,
            rel_height=self.pos_embed.height_rel.to(query.dtype), rel_width=self.pos_embed.width_rel.to(query.dtype),
            scale_pos_embed=self.scale_pos_embed, mask_padding=self.mask_padding,
        )  # fmt: skip
        maps = out.permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)
        maps = maps[:, :, : -(-height // self.stride), : -(-width // self.stride)]
        # A single row stays in any case: there would be no map without it.
        return F.avg_pool2d(maps, 2, ceil_mode=self.ceil or min(height, width) < 2) if self.pool else maps

    def _heads(self, maps: Tensor) -> Tensor:
        """(batch, heads * d, X, Y) as (batch, heads, X, Y, d)."""
        return maps.permute(0, 2, 3, 1).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
