"""The three layers of a dual-attention block: window attention, channel-group attention, conv position encoding.

Window attention mixes neighbouring positions, channel attention mixes all positions at a cost linear in their number::

    window:   softmax( D^-1/2 Q K^T ) V           inside every window x window square, without shift or bias
    channel:  V softmax( s Q^T K )^T              in every group of D channels, s = D^-1/2 ("v1") or N^-1/2 ("v2")
    position: x + DWConv3x3(x)

Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.fused import convolve_norm, project
from manyheads.ops.channel import channel_attention
from manyheads.ops.window import window_attention


class ChannelAttention(nn.Module):
    """Channel-group attention with its projections.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: number of channel groups ("N_g" in the paper's figure; heads and groups are the same number).
        flavour: "v1" is DaViT: the fused projection holds V, Q, K in this order, and the scale is ``head_dim ** -0.5``.
            "v2" is the Florence-2 towers: order Q, K, V and scale ``tokens ** -0.5``, so that the logits do not grow
            with the image.
        qkv_bias: whether the fused projection has a bias (all published models have it).
        backend: as in ``manyheads.ops.channel.channel_attention``.

    Shape: (batch, tokens, dim) or channels-last (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``, an unknown flavour, or an input of another width.

    Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645, section 3.2; "Florence-2", arXiv 2311.06242.

    >>> import torch
    >>> ChannelAttention(96, heads=3)(torch.randn(2, 49, 96)).shape
    torch.Size([2, 49, 96])
    """

    def __init__(
        self, dim: int, heads: int, *, flavour: str = "v1", qkv_bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        _check_heads(dim, heads)
        check_choice("flavour", flavour, ("v1", "v2"))
        self.heads, self.flavour, self.backend = heads, flavour, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch *tokens dim"]) -> Float[Tensor, "batch *tokens dim"]:
        _check_width(x, self.proj.in_features)
        tokens = x.flatten(1, -2)
        slots = rearrange(project(self.qkv, tokens), "b n (slot h d) -> slot b h n d", slot=3, h=self.heads).unbind(0)
        if self.flavour == "v1":
            value, query, key = slots
            scale = None
        else:
            query, key, value = slots
            scale = max(tokens.shape[1], 1) ** -0.5
        out = channel_attention(query, key, value, scale=scale, backend=self.backend)
        return project(self.proj, rearrange(out, "b h n d -> b n (h d)")).view(x.shape)


class WindowAttention(nn.Module):
    """Plain softmax attention inside non-overlapping square windows, with its projections.

    A map whose sides are no multiples of the window is padded with zeros at the bottom and the right *before* the
    projection, so padded tokens are keys that carry the projection's bias; they are cropped afterwards.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        window: side of the windows in tokens.
        qkv_bias: whether the fused projection (order Q, K, V) has a bias.

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``, ``window`` below 1, or an input of another width or rank.

    Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645, section 3.1.

    >>> import torch
    >>> WindowAttention(96, heads=3, window=7)(torch.randn(2, 19, 16, 96)).shape
    torch.Size([2, 19, 16, 96])
    """

    def __init__(self, dim: int, heads: int, *, window: int = 7, qkv_bias: bool = True) -> None:
        super().__init__()
        _check_heads(dim, heads)
        if window < 1:
            raise ValueError(f"window must be at least 1 token, got {window}")
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        _check_width(x, self.proj.in_features)
        height, width, window = x.shape[1], x.shape[2], self.window
        below, right = -height % window, -width % window
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        rows, columns = x.shape[1] // window, x.shape[2] // window
        # Windows become the batch before the projection: that copies C channels, cutting q, k, v apart would copy 3C.
        windows = rearrange(x, "b (r p) (c q) d -> (b r c) p q d", p=window, q=window)
        slots = rearrange(project(self.qkv, windows), "w p q (slot h d) -> slot w h p q d", slot=3, h=self.heads)
        out = window_attention(*slots.unbind(0), window=window)
        windows = project(self.proj, rearrange(out, "w h p q d -> w p q (h d)"))
        x = rearrange(windows, "(b r c) p q d -> b (r p) (c q) d", r=rows, c=columns)
        return x[:, :height, :width] if below or right else x


class ConvPositionEncoding(nn.Module):
    """x + DWConv3x3(x), which tells a token where it is by what is beside it.

    Args:
        dim: channels.
        activation: apply GELU to the convolution's branch (off in all released models).

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645, section 3.3.

    >>> import torch
    >>> ConvPositionEncoding(8)(torch.randn(1, 5, 4, 8)).shape
    torch.Size([1, 5, 4, 8])
    """

    centre: Tensor

    def __init__(self, dim: int, *, activation: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = nn.GELU() if activation else nn.Identity()
        centre = torch.zeros(1, 1, 3, 3)
        centre[..., 1, 1] = 1
        self.register_buffer("centre", centre, persistent=False)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        maps = x.permute(0, 3, 1, 2)
        if isinstance(self.act, nn.Identity) and x.dtype in (torch.float32, torch.float64) and not _autocast(x):
            fused = convolve_norm(self.proj, None, maps, residual=True)
            if fused is not None:
                return fused.permute(0, 2, 3, 1)
            # The identity is a kernel too: one pass over memory instead of two. Half precision would round 1 + weight.
            weight = self.proj.weight + self.centre
            maps = F.conv2d(maps, weight, self.proj.bias, padding=1, groups=self.proj.groups)
        else:
            maps = maps + self.act(self.proj(maps))
        return maps.permute(0, 2, 3, 1)


def _autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of heads={heads}")


def _check_width(x: Tensor, dim: int) -> None:
    if x.ndim < 3 or x.shape[-1] != dim:
        raise ValueError(f"input of shape {tuple(x.shape)} has {x.shape[-1]} channels on its last axis, needs {dim}")
