"""The fully attentional block: self-attention over tokens, then an attention over channels that gates a conv MLP.

    token mixing:        q = W_q x;  k, v = W_kv x;  y = W_o softmax(q k^T / sqrt d) v
    channel processing:  g = temp sigmoid( softmax_n(W_q u)^T mean_c softmax_n(u) )     a gate for every channel
                         y = g LN( W_2 ( z + gamma DW(z) ) ),    z = W_1 u
                         DW = depthwise 3x3, GELU, BN, depthwise 3x3

No activation stands behind W_1; both softmaxes of the channel attention run over the tokens, and its keys are the
tokens as they are.

Source: "Understanding The Robustness in Vision Transformers", arXiv 2204.12451, as "Robustifying Token Attention for
Vision Transformers", arXiv 2303.11126, builds on it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from manyheads.layers.tap import Grid, TokenAwarePooling, on_channels_last

EPS = 1e-6


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, *, drop: nn.Dropout, fused: bool, gate: Tensor | None = None
) -> Tensor:
    """softmax(gate * query key^T / sqrt(d)) value; the weights go through ``drop``, where they can be seen.

    Args:
        query, key, value: (batch, heads, tokens, head_dim).
        drop: dropout of the weights.
        fused: take torch's kernel, which shows no weights, where there is no gate.
        gate: factors (heads, tokens, tokens) on the logits.
    """
    if fused and gate is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=drop.p if drop.training else 0.0)
    logits = query * query.shape[-1] ** -0.5 @ key.mT
    logits = logits if gate is None else logits * gate
    return drop(logits.softmax(dim=-1)) @ value


class TokenMixing(nn.Module):
    """Multi-head self-attention with one projection for queries and one for keys and values.

    Args:
        dim: width.
        heads: attention heads.
        attn_drop: dropout of the weights.

    Shape: (batch, tokens, dim), returned as it came.

    >>> import torch
    >>> TokenMixing(8, 2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, attn_drop: int | float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.heads, self.fused_attn = heads, True
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(float(attn_drop))

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = softmax_attention(query, key, value, drop=self.attn_drop, fused=self.fused_attn)
        return self.proj(out.transpose(1, 2).flatten(2))


class _DoubleConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(F.gelu(self.conv1(x))))


class _ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = _DoubleConv(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        z = self.fc1(x)
        return self.fc2(z + self.gamma * on_channels_last(self.dwconv, z.unflatten(1, grid)).flatten(1, 2))


class ChannelProcessing(nn.Module):
    """A conv MLP whose output channels are gated by attention over channels.

    Args:
        dim: width.
        heads: groups of channels; a channel's gate looks at its own group.
        hidden: width of the MLP.

    Shape: (batch, H * W, dim) with the grid (H, W), returned as it came.

    >>> import torch
    >>> ChannelProcessing(8, 2, 32)(torch.randn(2, 6, 8), (2, 3)).shape
    torch.Size([2, 6, 8])
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.q = nn.Linear(dim, dim)
        self.mlp_v = _ConvMlp(dim, hidden)
        self.norm_v = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        query = self.q(x).softmax(dim=1).unflatten(-1, (self.heads, -1))
        key = x.softmax(dim=1).unflatten(-1, (self.heads, -1)).mean(-1)
        gate = torch.einsum("bnhc,bnh->bhc", query, key).sigmoid() * self.temperature[:, 0]
        return self.norm_v(self.mlp_v(x, grid)) * gate.flatten(1)[:, None]


class FANBlock(nn.Module):
    """TAP, token mixing and channel processing on a channels-last map, both residual.

    Args:
        dim: width.
        heads: attention heads and channel groups.
        mlp_ratio: hidden width of the channel processing by the width.
        num_scales: scales of TAP; 0 leaves it away (the FAN block as it was).
        attn_drop: dropout of the attention weights.
        drop_path: stochastic depth.

    Shape: (batch, H, W, dim), returned as it came.

    >>> import torch
    >>> FANBlock(8, 2)(torch.randn(2, 3, 4, 8)).shape
    torch.Size([2, 3, 4, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: int | float = 4.0,
        num_scales: int = 4,
        attn_drop: int | float = 0.0,
        drop_path: int | float = 0.0,
    ) -> None:
        super().__init__()
        self.dilation_predictor = TokenAwarePooling(dim, num_scales) if num_scales else None
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = TokenMixing(dim, heads, attn_drop=attn_drop)
        self.mlp = ChannelProcessing(dim, heads, int(dim * mlp_ratio))
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        pooled = x if self.dilation_predictor is None else on_channels_last(self.dilation_predictor, x)
        x, pooled = x.flatten(1, 2), pooled.flatten(1, 2)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(pooled)))
        x = x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x), grid))
        return x.unflatten(1, grid)


class ClassAttention(nn.Module):
    """The first token attends to all, itself included; the result has this one token.

    >>> import torch
    >>> ClassAttention(8, 2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 1, 8])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projected = (self.q(x[:, :1]), self.k(x), self.v(x))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP on the class token; the patches are normed along and, at the end, doubled.

    Args:
        dim: width.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP by the width.
        drop_path: stochastic depth.

    Shape: (batch, 1 + patches, dim), returned as it came.

    >>> import torch
    >>> ClassAttentionBlock(8, 2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: int | float = 4.0, drop_path: int | float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = ClassAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.drop_path(self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], dim=1))
        x = self.norm2(x)
        first = self.gamma2 * self.mlp(x[:, :1])
        return x + self.drop_path(torch.cat([first, x[:, 1:]], dim=1))
