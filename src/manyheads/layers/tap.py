"""Token-aware average pooling (TAP): every token looks at its surroundings, at a distance that it chooses, and then
takes part in attention.

For a map x (batch, C, H, W) and K scales, neighbourhoods of 3 x 3 samples with dilation s::

    w   = softmax_s( Conv_2( BN( Conv_1(x) ) ) / tau )          (batch, K, H, W): one weight for all channels
    p_0 = x;   p_s[i, j] = 1/9 sum_{a, b in (-s, 0, s)} x[i + a, j + b],   zeros outside the map
    TAP(x) = sum_s w_s p_s

The divisor is 9 at the border too. In a block, TAP stands in front of the norm of the attention branch only:
``x <- x + Attn(LN(TAP(x)))``.

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import check_choice

Grid = tuple[int, int]


def token_aware_pooling(
    x: Float[Tensor, "batch channels H W"],
    weights: Float[Tensor, "batch scales H W"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "batch channels H W"]:
    """The mixture of all scales: ``sum_s weights[:, s] * p_s``.

    Args:
        x: map of any sides.
        weights: for every position the weight of each scale; scale s reads samples s positions apart.
        backend: "reference" (all nine samples of a neighbourhood side by side, as the authors do), "depthwise" (a
            depthwise convolution for each scale, which copies nothing) or "auto".

    Raises:
        ValueError: weights of another batch or map, or of no scale.

    Source: arXiv 2303.11126, equation 3.

    >>> import torch
    >>> x = torch.ones(1, 1, 3, 3)
    >>> token_aware_pooling(x, torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3))[0, 0, 0] * 9
    tensor([4., 6., 4.])
    """
    check_choice("backend", backend, ("auto", "reference", "depthwise"))
    if x.ndim != 4 or weights.ndim != 4 or x.shape[0] != weights.shape[0] or x.shape[2:] != weights.shape[2:]:
        raise ValueError(
            f"weights must be (batch, scales, H, W) of the map {tuple(x.shape)}, got {tuple(weights.shape)}"
        )
    if weights.shape[1] < 1:
        raise ValueError("weights need at least one scale, got 0")
    pool = _nine_samples if backend == "reference" else _depthwise
    out = x * weights[:, :1]
    for scale in range(1, weights.shape[1]):
        out = out + pool(x, scale) * (weights[:, scale : scale + 1] / 9)
    return out


def _nine_samples(x: Tensor, scale: int) -> Tensor:
    """9 p_s"""
    samples = F.unfold(x, 3, dilation=scale, padding=scale)
    return samples.unflatten(1, (x.shape[1], 9)).sum(2).view_as(x)


def _depthwise(x: Tensor, scale: int) -> Tensor:
    ones = x.new_ones(x.shape[1], 1, 3, 3)
    return F.conv2d(x, ones, padding=scale, dilation=scale, groups=x.shape[1])


class TokenAwarePooling(nn.Module):
    """TAP with the small network that predicts the weights of the scales.

    Args:
        dim: channels C.
        num_scales: K; scale 0 is the token itself.
        temperature: tau; small ones make the choice of a scale sharper.

    Shape: (batch, dim, H, W), returned as it came; any H and W.

    Raises:
        ValueError: no scale, a temperature that is not positive, an input of another width.

    Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126, section 3.1.

    >>> import torch
    >>> TokenAwarePooling(8)(torch.randn(2, 8, 5, 7)).shape
    torch.Size([2, 8, 5, 7])
    """

    def __init__(self, dim: int, num_scales: int = 4, *, temperature: int | float = 1.0) -> None:
        super().__init__()
        if num_scales < 1:
            raise ValueError(f"num_scales={num_scales} must be at least 1")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive")
        self.dim, self.num_scales, self.temperature = dim, num_scales, float(temperature)
        self.proj = nn.Sequential(
            nn.Conv2d(dim, num_scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(num_scales),
            nn.Conv2d(num_scales, num_scales, 3, padding=1, bias=False),
        )

    def scale_weights(self, x: Float[Tensor, "batch dim H W"]) -> Float[Tensor, "batch scales H W"]:
        """How much of each scale every position takes; sums to 1 over the scales."""
        return (self.proj(x) / self.temperature).softmax(dim=1)

    def forward(self, x: Float[Tensor, "batch dim H W"]) -> Float[Tensor, "batch dim H W"]:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"input must be (batch, {self.dim}, H, W), got {tuple(x.shape)}")
        return token_aware_pooling(x, self.scale_weights(x))


class PooledNorm(nn.Module):
    """TAP and then the norm, on tokens: what replaces the norm in front of attention in any block.

    ``x + Attn(norm(x))`` becomes ``x + Attn(norm(TAP(x)))`` with this module in place of ``norm``. Tokens in front of
    the patches (class, registers) pass by the pooling.

    Args:
        norm: the norm that stood there.
        dim: width of the tokens.
        grid: rows and columns of the map; None takes the square that the tokens make.
        prefix: how many tokens stand in front of the patches; where exactly the grid's tokens come, they have none.
        num_scales, temperature: of ``TokenAwarePooling``.

    Shape: (batch, prefix + H * W, dim), or a map (batch, H, W, dim); returned as it came.

    Raises:
        ValueError: tokens that are neither the grid's nor, without a grid, a square.

    >>> import torch
    >>> PooledNorm(torch.nn.LayerNorm(8), 8, prefix=1)(torch.randn(2, 17, 8)).shape
    torch.Size([2, 17, 8])
    """

    def __init__(
        self,
        norm: nn.Module,
        dim: int,
        *,
        grid: Grid | None = None,
        prefix: int = 0,
        num_scales: int = 4,
        temperature: int | float = 1.0,
    ) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.pool = TokenAwarePooling(dim, num_scales, temperature=temperature)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.norm(on_channels_last(self.pool, x))
        bare = self.grid is not None and x.shape[1] == self.grid[0] * self.grid[1]
        first, patches = x.split([0 if bare else self.prefix, x.shape[1] - (0 if bare else self.prefix)], dim=1)
        pooled = on_channels_last(self.pool, patches.unflatten(1, grid_of(patches.shape[1], self.grid))).flatten(1, 2)
        return self.norm(torch.cat([first, pooled], dim=1) if first.shape[1] else pooled)


def grid_of(tokens: int, grid: Grid | None = None) -> Grid:
    """The map that the tokens are: ``grid`` if it has as many positions, else a square.

    Raises:
        ValueError: neither fits.

    >>> grid_of(196), grid_of(6, (2, 3))
    ((14, 14), (2, 3))
    """
    if grid is not None and grid[0] * grid[1] == tokens:
        return grid
    side = round(tokens**0.5)
    if side * side != tokens:
        known = "no grid was given" if grid is None else f"the grid is {grid[0]} x {grid[1]}"
        raise ValueError(f"{tokens} tokens make no square map, and {known}")
    return side, side


def on_channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of maps (batch, C, H, W), on a map (batch, H, W, C)."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
