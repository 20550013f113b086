"""Single-head self-attention on some of the channels; the others pass by.

    x1, x2 = split(x)                            p attended channels, C - p that bypass
    q, k, v = split( BN(W x1') ),  x1' = GroupNorm_1(x1)
    y = BN( W_o ReLU( concat( softmax(d^-1/2 q^T k) v,  x2 ) ) )

One head over all N positions, q and k of width d = 16, v of width p; the bypass is not normed, and the ReLU stands in
front of the projection. The residual is the caller's.

Source: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.dense import attention
from manyheads.layers.conv_norm import ConvNorm
from manyheads.layers.fused import folded_tokens, fusible


class SingleHeadAttention(nn.Module):
    """SHSA, without its residual.

    Args:
        dim: channels C.
        partial_dim: p, channels that are attended.
        qk_dim: d, width of query and key.
        heads: 1 is the paper's; more split query, key and value (for comparison with the paper's redundant heads).

    Shape: (batch, dim, X, Y), returned as it came; any X and Y.

    Raises:
        ValueError: ``partial_dim`` outside 1 ... dim, ``qk_dim`` below 1, heads that do not divide both, an input of
            another width.

    Source: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456, section 3.3.

    >>> import torch
    >>> SingleHeadAttention(48, 12)(torch.randn(2, 48, 9, 6)).shape
    torch.Size([2, 48, 9, 6])
    """

    def __init__(self, dim: int, partial_dim: int, *, qk_dim: int = 16, heads: int = 1) -> None:
        super().__init__()
        if not 1 <= partial_dim <= dim:
            raise ValueError(f"partial_dim={partial_dim} must be between 1 and dim={dim}")
        if qk_dim < 1 or heads < 1 or qk_dim % heads or partial_dim % heads:
            raise ValueError(f"heads={heads} must divide qk_dim={qk_dim} and partial_dim={partial_dim}")
        self.dim, self.partial_dim, self.qk_dim, self.heads = dim, partial_dim, qk_dim, heads
        self.pre_norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(dim, dim, gain=0.0))

    def forward(self, x: Float[Tensor, "batch dim X Y"]) -> Float[Tensor, "batch dim X Y"]:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"input must be (batch, {self.dim}, X, Y), got {tuple(x.shape)}")
        fused = self._fused(x)
        if fused is not None:
            return fused
        attended, bypass = x.split([self.partial_dim, self.dim - self.partial_dim], dim=1)
        # Divided before any transpose: torch's batch norm on CPUs returns wrong gradients for one image when what
        # comes back to it is a transposed view.
        slots = self.qkv(self.pre_norm(attended)).split([self.qk_dim, self.qk_dim, self.partial_dim], dim=1)
        query, key, value = (slot.flatten(2).unflatten(1, (self.heads, -1)).mT for slot in slots)
        if torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.float64):
            out = attention(query, key, value)
            assert isinstance(out, Tensor)
        else:
            out = _attend(query, key, value)
        mixed = out.mT.reshape(attended.shape)
        return self.proj[1](F.relu_(torch.cat([mixed, bypass], dim=1)))

    def _fused(self, x: Tensor) -> Tensor | None:
        """The same on (batch, tokens, channels) all the way, norms folded into the projections; None where not fit."""
        if self.heads > 1 or not isinstance(self.qkv, ConvNorm) or not isinstance(self.proj[1], ConvNorm):
            return None
        if not fusible(x, self.pre_norm, self.qkv, *self.proj):
            return None
        width, tokens = self.partial_dim, x.flatten(2).mT
        attended = tokens[..., :width].flatten(1)
        # Statistics alone: factor and shift of the channels are part of the projection.
        normed = F.layer_norm(attended, attended.shape[1:], eps=self.pre_norm.eps).unflatten(1, (-1, width))
        slots = folded_tokens(self.qkv.c, self.qkv.bn, normed, before=self.pre_norm)
        if slots is None:
            return None
        mixed = _attend(*slots.split([self.qk_dim, self.qk_dim, width], dim=-1))
        mixed = torch.cat([mixed, tokens[..., width:]], dim=-1).relu_()
        out = folded_tokens(self.proj[1].c, self.proj[1].bn, mixed)
        return None if out is None else out.mT.unflatten(2, x.shape[2:])


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # So few tokens that the scores of an image stay in the cache: no fused kernel for unequal widths is faster.
    return (query * query.shape[-1] ** -0.5 @ key.mT).softmax(dim=-1) @ value
