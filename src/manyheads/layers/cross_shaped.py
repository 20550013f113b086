"""Cross-shaped windows: softmax attention inside stripes of a map, with a convolutional position encoding.

    out = Attention(Q, K, V) + DWConv3x3(V)          both inside a stripe; stripes do not see each other

Half of the channels attend in stripes of full height, the other half in stripes of full width; together they see a
cross. A stripe as large as the map is ordinary attention.

Source: "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", arXiv 2107.00652.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class StripeAttention(nn.Module):
    """Softmax attention inside the stripes of a map, on projected q, k, v.

    Args:
        dim: width of this branch, a multiple of ``heads``.
        heads: heads of this branch.
        stripe: (height, width) of a stripe in tokens.
        attn_drop: dropout of the attention weights.

    Shape: ``qkv`` (3, batch, tokens, dim) of a map (H, W), to (batch, tokens, dim).

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``; in ``forward``, a stripe that does not divide the map.

    Source: "CSWin Transformer", arXiv 2107.00652.

    >>> import torch
    >>> StripeAttention(32, heads=2, stripe=(8, 2))(torch.randn(3, 1, 64, 32), (8, 8)).shape
    torch.Size([1, 64, 32])
    """

    def __init__(self, dim: int, heads: int, stripe: tuple[int, int], *, attn_drop: int | float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.stripe, self.attn_drop = heads, stripe, float(attn_drop)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Float[Tensor, "3 batch tokens dim"], grid: tuple[int, int]) -> Tensor:
        query, key, value = (split_stripes(part, grid, self.stripe) for part in qkv.unbind(0))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        local = self.get_v(stripe_map(value, self.stripe)).flatten(2).transpose(1, 2)
        return merge_stripes(rearrange(out, "b h n d -> b n (h d)") + local, grid, self.stripe)


def stripe_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(batch, tokens, dim) seen as a map (batch, dim, H, W), channels last in memory."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def split_stripes(tokens: Tensor, grid: tuple[int, int], stripe: tuple[int, int]) -> Tensor:
    """(batch, tokens of the map, dim) as (batch * stripes, tokens of a stripe, dim).

    Raises:
        ValueError: the stripe does not divide the map.
    """
    if tuple(grid) == tuple(stripe):
        return tokens
    if grid[0] % stripe[0] or grid[1] % stripe[1]:
        raise ValueError(
            f"stripes of {stripe[0]} x {stripe[1]} tokens do not divide a map of {grid[0]} x {grid[1]}: the split size "
            "must divide the map's side"
        )
    return rearrange(
        tokens,
        "b (r p c q) d -> (b r c) (p q) d",
        r=grid[0] // stripe[0],
        p=stripe[0],
        q=stripe[1],
        c=grid[1] // stripe[1],
    )


def merge_stripes(tokens: Tensor, grid: tuple[int, int], stripe: tuple[int, int]) -> Tensor:
    """The inverse of :func:`split_stripes`."""
    if tuple(grid) == tuple(stripe):
        return tokens
    return rearrange(
        tokens,
        "(b r c) (p q) d -> b (r p c q) d",
        r=grid[0] // stripe[0],
        p=stripe[0],
        q=stripe[1],
        c=grid[1] // stripe[1],
    )
