"""A convolution with the batch norm behind it, which become one convolution for deployment.

    y = g (W x - m) / s + b  =  (g W / s) x + (b - g m / s),        s = sqrt(v + eps)

with the running mean m and variance v. A residual depthwise convolution x + W x becomes one by adding 1 to its centre.

Sources: "SHViT: Single-Head Vision Transformer", arXiv 2401.16456; "LeViT", arXiv 2104.01136.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from manyheads.layers.fused import add, convolve_norm, fusible, norm_affine


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm (keys ``c`` and ``bn``).

    Args:
        dim, out_dim: channels in and out.
        kernel_size, stride, groups: of the convolution; odd kernels are padded by half their size.
        gain: initial weight of the norm; 0 starts a residual branch as nothing.

    Shape: (batch, dim, X, Y) to (batch, out_dim, ceil(X / stride), ceil(Y / stride)).

    >>> import torch
    >>> layer = ConvNorm(4, 8, 3, stride=2).eval()
    >>> x = torch.randn(1, 4, 7, 6)
    >>> torch.testing.assert_close(layer.fuse()(x), layer(x))
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        gain: int | float = 1.0,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        return normed(self.c, self.bn, x, act)

    def fuse(self) -> FusedConv:
        """The same as one convolution with a bias, for evaluation."""
        return fold_norm(self.c, self.bn)


class FusedConv(nn.Conv2d):
    """What ``fold_norm`` makes: a convolution with a bias."""

    def forward(self, input: Tensor, act: nn.Module | None = None) -> Tensor:
        fused = convolve_norm(self, None, input, act)
        if fused is not None:
            return fused
        out = convolve(self, input)
        return act(out) if act else out


class Residual(nn.Module):
    """x + m(x), with stochastic depth of the branch."""

    def __init__(self, m: nn.Module, *, drop_path: int | float = 0.0) -> None:
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self._depthwise() and not self.training and fusible(x, self.m, self.drop_path):
            branch: Any = self.m
            fused = convolve_norm(branch.c, branch.bn, x, residual=True)
            if fused is not None:
                return fused
        return add(x, self.drop_path(self.m(x)))

    def _depthwise(self) -> bool:
        return isinstance(self.m, ConvNorm) and self.m.c.groups == self.m.c.in_channels

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """One depthwise convolution for x + depthwise(x); other branches stay."""
        if not self._depthwise():
            return self
        branch: Any = self.m
        fused = branch.fuse()
        fused.weight[:, :, fused.weight.shape[2] // 2, fused.weight.shape[3] // 2] += 1
        return fused


@torch.no_grad()
def fold_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> FusedConv:
    """A convolution (square, padded by half its kernel or not at all) and its batch norm as one, for evaluation."""
    factor, shift = norm_affine(norm)
    kernel, padded = convolution.kernel_size[0], bool(convolution.padding[0])
    fused = FusedConv(
        convolution.in_channels, convolution.out_channels, kernel, convolution.stride[0], kernel // 2 * padded,
        groups=convolution.groups, device=convolution.weight.device, dtype=convolution.weight.dtype,
    )  # fmt: skip
    assert fused.bias is not None
    fused.weight.copy_(convolution.weight * factor[:, None, None, None])
    fused.bias.copy_(shift if convolution.bias is None else shift + factor * convolution.bias)
    return fused.train(convolution.training)


def normed(convolution: nn.Conv2d, norm: Any, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """act(norm(convolution(x))), in evaluation as one kernel (``manyheads.layers.fused``)."""
    fused = convolve_norm(convolution, norm, x, act)
    if fused is not None:
        return fused
    x = convolve(convolution, x)
    x = norm(x) if norm else x
    return act(x) if act else x


def convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution, as a matrix product where it is one and the map lies channels-last in memory."""
    plain = convolution.kernel_size == (1, 1) and convolution.stride == (1, 1) and convolution.groups == 1
    if plain and not torch.is_grad_enabled():
        return pointwise(convolution, x)
    return F.conv2d(
        x, convolution.weight, convolution.bias, convolution.stride, convolution.padding, 1, convolution.groups
    )  # fmt: skip


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution as the matrix product that it is on a channels-last map, from and to (batch, dim, X, Y)."""
    weight = convolution.weight[:, :, 0, 0]
    return F.linear(x.permute(0, 2, 3, 1), weight, convolution.bias).permute(0, 3, 1, 2)
