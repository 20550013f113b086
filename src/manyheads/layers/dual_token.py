"""The layers of DualToken-ViT: a handful of position-aware tokens that carry the whole image to every position.

The global tokens G, a T x T grid, live beside the map X and are handed from block to block::

    X_ds  = X halved M times by (depthwise 3x3, 1x1, mean of 2x2), then resized to T x T        step-wise downsampling
    X_ga  = MSA(LN(X_ds))                                                                        aggregation
    G_new = alpha MLP(LN(G)) + (1 - alpha) X_ga                                                  enrichment
    X_gl  = MSA(queries LN(X), keys and values G_new)                                            broadcast

at a cost linear in the positions, since there are always T^2 keys. The block adds X_gl to the output of a convolution
and ends with a feed-forward layer whose branch is gated over channels and positions (bi-dimensional attention).

Sources: "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", arXiv 2309.12424, for
which no code was published: the form of the downsampling, the mixing MLP and the absent residuals are this library's
reading of it, which reproduces the published sizes; "LightViT", arXiv 2207.05557, for the gates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.engines.dense import BACKENDS, attention

MLPS = ("mix", "normal")
RESIZES = ("bilinear", "adaptive")
EPS = 1e-6


class HalvingStep(nn.Module):
    """Depthwise 3x3 convolution, 1x1 convolution, mean of 2x2 positions (fewer at odd borders).

    Args:
        dim: channels.
        factor: side of the squares that are averaged.

    Shape: channels-last (batch, X, Y, dim) to (batch, ceil(X / factor), ceil(Y / factor), dim).

    >>> import torch
    >>> HalvingStep(8)(torch.randn(2, 7, 6, 8)).shape
    torch.Size([2, 4, 3, 8])
    """

    def __init__(self, dim: int, *, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pw = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X2 Y2 dim"]:
        maps = self.dw(x.permute(0, 3, 1, 2))
        # Mean and 1x1 convolution commute, and the mean leaves a quarter of the positions.
        maps = F.avg_pool2d(maps, self.factor, ceil_mode=True)
        return F.linear(maps.permute(0, 2, 3, 1), self.pw.weight[:, :, 0, 0], self.pw.bias)


class PositionAwareTokens(nn.Module):
    """The position-aware token module: aggregation, enrichment, broadcast.

    Args:
        dim: channels, a multiple of ``heads``.
        heads: of both attentions.
        steps: M, how often the map is halved before it is aggregated.
        token_size: T, side of the grid of global tokens.
        mlp: how G is transformed: "mix" (over tokens, then over channels) or "normal" (over channels only).
        alpha: share of the old G in the new one.
        resize: how a halved map that is not T x T becomes so: "bilinear" (half-pixel centres, no smoothing) or
            "adaptive" (means of T x T cells, which see all of a large map).
        backend: of both attentions, as in ``manyheads.engines.dense.attention``.

    Shape: map (batch, X, Y, dim) and tokens (batch, T^2, dim) to both again; any X and Y.

    Raises:
        ValueError: heads that do not divide ``dim``, an empty grid, an alpha outside [0, 1], unknown words; in
            ``forward``, other widths, an empty map or another number of tokens.

    Source: "DualToken-ViT", arXiv 2309.12424, section 3.

    >>> import torch
    >>> module = PositionAwareTokens(8, 2, steps=1, token_size=3)
    >>> spread, tokens = module(torch.randn(2, 6, 5, 8), torch.randn(2, 9, 8))
    >>> spread.shape, tokens.shape
    (torch.Size([2, 6, 5, 8]), torch.Size([2, 9, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        steps: int = 0,
        token_size: int = 7,
        mlp: str = "mix",
        alpha: int | float = 0.1,
        resize: str = "bilinear",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        check_choice("mlp", mlp, MLPS)
        check_choice("resize", resize, RESIZES)
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if token_size < 1 or steps < 0:
            raise ValueError(f"token_size={token_size} must be at least 1 and steps={steps} at least 0")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be between 0 and 1")
        self.dim, self.heads, self.token_size, self.backend = dim, heads, token_size, backend
        self.mlp, self.alpha, self.resize = mlp, alpha, resize
        self.down = nn.ModuleList(HalvingStep(dim) for _ in range(steps))
        self.norm_ds = nn.LayerNorm(dim, eps=EPS)
        self.agg_qkv, self.agg_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_g = nn.LayerNorm(dim, eps=EPS)
        if mlp == "mix":
            self.token_fc, self.channel_fc = nn.Linear(token_size**2, token_size**2), nn.Linear(dim, dim)
        else:
            self.fc1, self.fc2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_x = nn.LayerNorm(dim, eps=EPS)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch X Y dim"], tokens: Float[Tensor, "batch T2 dim"]
    ) -> tuple[Float[Tensor, "batch X Y dim"], Float[Tensor, "batch T2 dim"]]:
        """What the tokens tell every position (to be added to the map), and the new tokens."""
        if x.ndim != 4 or x.shape[3] != self.dim or not x.shape[1] * x.shape[2]:
            raise ValueError(f"x must be a map (batch, X, Y, {self.dim}), got {tuple(x.shape)}")
        wanted = (x.shape[0], self.token_size**2, self.dim)
        if tuple(tokens.shape) != wanted:
            raise ValueError(f"tokens must be (batch, token_size squared, dim) = {wanted}, got {tuple(tokens.shape)}")
        tokens = self.enrich(tokens, self.aggregate(x))
        return self.broadcast(x, tokens), tokens

    def aggregate(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch T2 dim"]:
        """X_ga: the map shrunk to T x T positions, which then attend to each other."""
        for step in self.down:
            x = step(x)
        if tuple(x.shape[1:3]) != (self.token_size, self.token_size):
            maps, size = x.permute(0, 3, 1, 2), (self.token_size, self.token_size)
            if self.resize == "adaptive":
                maps = F.adaptive_avg_pool2d(maps, size)
            else:
                maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            x = maps.permute(0, 2, 3, 1)
        qkv = self.agg_qkv(self.norm_ds(x.flatten(1, 2)))
        return self.agg_proj(self._attend(*qkv.chunk(3, dim=-1)))

    def enrich(
        self, tokens: Float[Tensor, "batch T2 dim"], aggregated: Float[Tensor, "batch T2 dim"]
    ) -> Float[Tensor, "batch T2 dim"]:
        """G_new, in the precision of G also under autocast: the tokens accumulate through all blocks."""
        normed = self.norm_g(tokens)
        if self.mlp == "mix":
            old = self.channel_fc(F.gelu(self.token_fc(normed.mT)).mT)
        else:
            old = self.fc2(F.gelu(self.fc1(normed)))
        return torch.lerp(aggregated.to(tokens.dtype), old.to(tokens.dtype), self.alpha)

    def broadcast(
        self, x: Float[Tensor, "batch X Y dim"], tokens: Float[Tensor, "batch T2 dim"]
    ) -> Float[Tensor, "batch X Y dim"]:
        """X_gl: every position reads the tokens."""
        key, value = self.kv(tokens).chunk(2, dim=-1)
        out = self._attend(self.q(self.norm_x(x)).flatten(1, 2), key, value)
        return self.proj(out).view(x.shape)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (query, key, value)]
        out = attention(*heads, backend=self.backend)
        assert isinstance(out, Tensor)
        return rearrange(out, "b h n d -> b n (h d)")


class BiDimensionalAttention(nn.Module):
    """Gates over channels and over positions, from means and from the positions themselves.

        n = LN(f),   a = GELU(W_g mean(n)),   b = GELU(W_l n)
        f * sigmoid(W_c a) * sigmoid(w_s [b, a])

    Args:
        dim: channels.
        reduction: a and b have ``dim // reduction`` channels.

    Shape: (batch, X, Y, dim), returned as it came.

    Source: "LightViT: Towards Light-Weight Convolution-Free Vision Transformers", arXiv 2207.05557.

    >>> import torch
    >>> BiDimensionalAttention(8)(torch.randn(2, 3, 4, 8)).shape
    torch.Size([2, 3, 4, 8])
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        if not 1 <= reduction <= dim:
            raise ValueError(f"reduction={reduction} must be between 1 and dim={dim}")
        self.reduced = dim // reduction
        self.norm = nn.LayerNorm(dim)
        self.global_reduce, self.local_reduce = nn.Linear(dim, self.reduced), nn.Linear(dim, self.reduced)
        self.channel_select, self.spatial_select = nn.Linear(self.reduced, dim), nn.Linear(2 * self.reduced, 1)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        normed = self.norm(x)
        everywhere = F.gelu(self.global_reduce(normed.mean((1, 2), keepdim=True)))
        here = F.gelu(self.local_reduce(normed))
        # The part of w_s that reads a is the same at every position.
        of_here, of_everywhere = self.spatial_select.weight.split(self.reduced, dim=1)
        where = F.linear(here, of_here) + F.linear(everywhere, of_everywhere, self.spatial_select.bias)
        return x * self.channel_select(everywhere).sigmoid() * where.sigmoid()
