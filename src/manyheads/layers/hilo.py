"""The layers of a LITv2 block: HiLo attention and deformable token merging, on channels-last maps.

    HiLo:     concat( W_hi WindowAttention(x), W_lo PooledAttention(x) )       high-frequency channels first
    merging:  GELU( BN( W * warp(x, offsets) ) ),   offsets = Conv2x2(x),   W a 2x2 kernel with stride 2

A kernel of 2x2 with stride 2 reads every position once, so a deformable convolution with it is an ordinary convolution
of the map warped by the offsets.

Source: "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213; the merging is that of "Less is More: Pay Less
Attention in Vision Transformers", arXiv 2105.14217.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import accumulation_dtype
from manyheads.ops.hilo import hilo_attention, low_head_count
from manyheads.ops.window import window_attention, window_means


class HiLoAttention(nn.Module):
    """HiLo attention with its projections; each group of heads has its own, as in the authors' code.

    A map whose sides are no multiples of the window is padded with zeros at the bottom and the right *before* the
    projections, for both groups: padded tokens are keys that carry the projections' bias, and they enter the pooled
    means. They are cropped afterwards.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads of both groups together.
        window: s, side of the windows and of the pooling; 1 makes all heads low and thus this ordinary attention.
        alpha: share of the low-frequency heads; ``int(alpha * heads)`` of them, so 0.9 of 12 heads is 10.
        qkv_bias: bias of the input projections (on in all published models).
        scale: factor on the scores of both groups; None means ``head_dim ** -0.5``.
        pad: pad maps that the window does not divide; False makes such maps an error.
        backend: as in ``manyheads.ops.hilo.hilo_attention``.

    State: ``h_qkv``, ``h_proj`` where there are high heads; ``l_q``, ``l_kv``, ``l_proj`` where there are low heads.

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``, ``alpha`` outside [0, 1], ``window`` below 1; in
            ``forward``, another width, or a map that the window does not divide although ``pad`` is off.

    Source: "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213, section 3.

    >>> import torch
    >>> HiLoAttention(96, heads=6, window=2, alpha=0.5)(torch.randn(2, 13, 10, 96)).shape
    torch.Size([2, 13, 10, 96])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 2,
        alpha: int | float = 0.5,
        qkv_bias: bool = True,
        scale: float | None = None,
        pad: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.dim, self.head_dim, self.window, self.pad, self.backend = dim, dim // heads, window, pad, backend
        self.scale = scale
        self.low_heads = low_head_count(heads, alpha, window)
        self.high_heads = heads - self.low_heads
        low, high = self.low_heads * self.head_dim, self.high_heads * self.head_dim
        if low:
            self.l_q = nn.Linear(dim, low, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * low, bias=qkv_bias)
            self.l_proj = nn.Linear(low, low)
        if high:
            self.h_qkv = nn.Linear(dim, 3 * high, bias=qkv_bias)
            self.h_proj = nn.Linear(high, high)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, X, Y, {self.dim}), got shape {tuple(x.shape)}")
        height, width = x.shape[1:3]
        below, right = -height % self.window, -width % self.window
        if below or right:
            if not self.pad:
                raise ValueError(f"window={self.window} does not divide a map of {height} x {width}, and pad is off")
            x = F.pad(x, (0, 0, 0, right, 0, below))
        parts = ([self.high(x)] if self.high_heads else []) + ([self.low(x)] if self.low_heads else [])
        if below or right:
            parts = [part[:, :height, :width] for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def high(self, x: Tensor) -> Tensor:
        """The projected output of the high-frequency heads, (batch, X, Y, high channels), of a map that fits."""
        # Windows become the batch before the projection: that copies C channels, cutting q, k, v apart would copy 3C.
        side = self.window
        rows, columns = x.shape[1] // side, x.shape[2] // side
        windows = rearrange(x, "b (r p) (c q) d -> (b r c) p q d", p=side, q=side)
        slots = rearrange(self.h_qkv(windows), "w p q (slot h d) -> slot w h p q d", slot=3, h=self.high_heads)
        out = window_attention(*slots.unbind(0), window=side, scale=self.scale, backend=self.backend)
        out = self.h_proj(rearrange(out, "w h p q d -> w p q (h d)"))
        return rearrange(out, "(b r c) p q d -> b (r p) (c q) d", r=rows, c=columns)

    def low(self, x: Tensor) -> Tensor:
        """The projected output of the low-frequency heads, (batch, X, Y, low channels), of a map that fits."""
        pooled = x if self.window == 1 else window_means(x, self.window)
        query = rearrange(self.l_q(x), "b x y (h d) -> b h x y d", h=self.low_heads)
        key, value = rearrange(self.l_kv(pooled), "b x y (slot h d) -> slot b h x y d", slot=2, h=self.low_heads)
        options = {"low_heads": self.low_heads, "scale": self.scale, "backend": self.backend}
        out = hilo_attention(query, key, value, window=1, **options)
        return self.l_proj(rearrange(out, "b h x y d -> b x y (h d)"))


class DeformableMerging(nn.Module):
    """Half the sides and a new width: a deformable 2x2 convolution with stride 2, BN, GELU.

    Offsets start at zero, where this is an ordinary convolution. Samples between positions are bilinear, with zeros
    outside the map. A last odd row or column is dropped, as in the authors' dense-prediction code.

    Args:
        dim: channels of the input.
        out_dim: channels of the output.
        drop_odd: drop a last odd row or column; False makes odd maps an error, as the authors' classifier does.

    State: ``offset`` (channel 2t is the shift downwards of tap t, 2t + 1 the shift to the right, taps row-major),
    ``conv``, ``norm``.

    Shape: (batch, X, Y, dim) to (batch, X // 2, Y // 2, out_dim).

    Raises:
        ValueError: in ``forward``, another width, a map below 2 x 2, or an odd map although ``drop_odd`` is off.

    Source: "Less is More: Pay Less Attention in Vision Transformers", arXiv 2105.14217, section 3.3.

    >>> import torch
    >>> DeformableMerging(8, 16)(torch.randn(2, 6, 5, 8)).shape
    torch.Size([2, 3, 2, 16])
    """

    def __init__(self, dim: int, out_dim: int, *, drop_odd: bool = True) -> None:
        super().__init__()
        self.drop_odd = drop_odd
        self.offset = nn.Conv2d(dim, 8, 2, stride=2)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(cast(Tensor, self.offset.bias))
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X2 Y2 out_dim"]:
        if x.ndim != 4 or x.shape[-1] != self.conv.in_channels or min(x.shape[1:3]) < 2:
            wanted = f"(batch, X, Y, {self.conv.in_channels}) with sides of at least 2"
            raise ValueError(f"x must be {wanted}, got shape {tuple(x.shape)}")
        if not self.drop_odd and (x.shape[1] % 2 or x.shape[2] % 2):
            raise ValueError(f"a map of {x.shape[1]} x {x.shape[2]} cannot be merged 2 x 2: its sides must be even")
        maps = x.permute(0, 3, 1, 2)
        warped = _warp(maps, self.offset(maps))
        return F.gelu(self.norm(self.conv(warped))).permute(0, 2, 3, 1)


def _warp(maps: Tensor, offsets: Tensor) -> Tensor:
    """(batch, C, X, Y) sampled at every position plus its offset, (batch, C, X // 2 * 2, Y // 2 * 2)."""
    height, width = maps.shape[2:]
    # Positions need more digits than bfloat16 has, and the sampling kernel knows no half precision on CPUs.
    wide = accumulation_dtype(maps.dtype)
    down, right = rearrange(offsets.to(wide), "b (i j shift) x y -> shift b (x i) (y j)", i=2, j=2)
    down = down + torch.arange(down.shape[1], device=maps.device, dtype=wide)[:, None]
    right = right + torch.arange(right.shape[2], device=maps.device, dtype=wide)
    grid = torch.stack([(2 * right + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)
    return F.grid_sample(maps.to(wide), grid, padding_mode="zeros", align_corners=False).to(maps.dtype)
