"""Swin's window attention: windows of w x w tokens, shifted by s in every other block.

    out = softmax( scale Q K^T + table[query - key] + (-100 between what the shift brought together) ) V

Source: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from manyheads.layers.relative_bias import flat_to_offsets
from manyheads.ops.multi_axis import relative_bias

APART = -100.0


class ShiftedWindowAttention(nn.Module):
    """Window attention with relative position bias, cyclic shift and its projections.

    A map that windows do not divide is padded with zeros at the bottom and the right before the projection; padded
    tokens are ordinary keys, as in the authors' dense-prediction code.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        window: w, side of the windows.
        shift: s, how far the windows are shifted to the bottom right; 0 does not.
        qkv_bias: bias of the fused projection.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.

    Shape: (batch, tokens, dim) of a map (H, W), returned as it came.

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``, a window below 1, a shift outside [0, window).

    Source: "Swin Transformer", arXiv 2103.14030, section 3.2.

    >>> import torch
    >>> ShiftedWindowAttention(32, heads=2, window=4, shift=2)(torch.randn(1, 90, 32), (9, 10)).shape
    torch.Size([1, 90, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 7,
        shift: int = 0,
        qkv_bias: bool = True,
        attn_drop: int | float = 0.0,
        proj_drop: int | float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"window={window} must be positive and shift={shift} at least 0 and below it")
        self.heads, self.window, self.shift, self.attn_drop = heads, window, shift, float(attn_drop)
        self.relative_position_bias_table = nn.Parameter(
            trunc_normal_(torch.empty((2 * window - 1) ** 2, heads), std=0.02)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        side, (rows, columns) = self.window, grid
        maps = x.unflatten(1, grid)
        below, right = -rows % side, -columns % side
        if below or right:
            maps = F.pad(maps, (0, 0, 0, right, 0, below))
        if self.shift:
            maps = maps.roll((-self.shift, -self.shift), (1, 2))
        down, across = maps.shape[1] // side, maps.shape[2] // side
        windows = rearrange(maps, "b (r p) (c q) d -> (b r c) (p q) d", p=side, q=side)
        query, key, value = rearrange(self.qkv(windows), "w n (slot h d) -> slot w h n d", slot=3, h=self.heads)
        bias = relative_bias(flat_to_offsets(self.relative_position_bias_table, (side, side)), side)
        dropout = self.attn_drop if self.training else 0.0
        if self.shift:
            # The regions differ from window to window, the same in every sample: samples become an axis of their own.
            bias = bias + self._apart(down, across).to(bias)[:, None]
            bias = bias.repeat(x.shape[0], 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout)
        windows = self.proj_drop(self.proj(rearrange(out, "w h n d -> w n (h d)")))
        maps = rearrange(windows, "(b r c) (p q) d -> b (r p) (c q) d", r=down, c=across, p=side)
        if self.shift:
            maps = maps.roll((self.shift, self.shift), (1, 2))
        return maps[:, :rows, :columns].flatten(1, 2)

    def _apart(self, down: int, across: int) -> Tensor:
        """(windows, tokens, tokens), -100 where two tokens of a window come from different ends of the map."""
        side, device = self.window, self.relative_position_bias_table.device
        regions = []
        for count in (down, across):
            place = torch.arange(count * side, device=device)
            regions.append((place >= count * side - side).int() + (place >= count * side - self.shift).int())
        region = regions[0][:, None] * 3 + regions[1]
        windows = rearrange(region, "(r p) (c q) -> (r c) (p q)", p=side, q=side)
        return torch.where(windows[:, :, None] == windows[:, None], 0.0, APART)
