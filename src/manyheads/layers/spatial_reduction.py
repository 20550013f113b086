"""Softmax attention whose keys and values come from a map made smaller by a convolution.

    out = proj( Attention( q(x), kv( LN( Conv_{r x r, stride r}(x) ) ) ) )

Source: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", arXiv 2102.12122.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.layers.cross_shaped import stripe_map


class SpatialReductionAttention(nn.Module):
    """Spatial-reduction attention with its projections.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        reduction: r; 1 is ordinary attention.
        qkv_bias: bias of the input projections.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.

    Shape: (batch, tokens, dim) of a map (H, W), returned as it came; rows and columns that r leaves over are not keys.

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``, a map smaller than the reduction.

    Source: "Pyramid Vision Transformer", arXiv 2102.12122, section 3.3.

    >>> import torch
    >>> SpatialReductionAttention(64, heads=2, reduction=4)(torch.randn(1, 64, 64), (8, 8)).shape
    torch.Size([1, 64, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        reduction: int = 1,
        qkv_bias: bool = True,
        attn_drop: int | float = 0.0,
        proj_drop: int | float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.reduction, self.attn_drop = heads, reduction, float(attn_drop)
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        source = x
        if self.reduction > 1:
            if min(grid) < self.reduction:
                raise ValueError(f"a map of {grid[0]} x {grid[1]} is smaller than the reduction of {self.reduction}")
            source = self.norm(self.sr(stripe_map(x, grid)).flatten(2).transpose(1, 2))
        query = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        key, value = rearrange(self.kv(source), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))
