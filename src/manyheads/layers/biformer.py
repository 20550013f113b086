"""The attention layers of a BiFormer block, on channels-last maps.

    bi-level routing:  W_o( BRA(q, k, v) + DWConv5x5(v) )           regions choose regions, tokens attend inside them
    full attention:    W_o( softmax(D^-1/2 q k^T) v + DWConv5x5(u) )    u is the input, or v, or nothing is added
    convolution:       Conv1x1, DWConv5x5, Conv1x1                   no attention at all

Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.ops.bilevel_routing import POOLINGS, bilevel_routing_attention, region_means

FORMULATIONS = ("legacy", "current")
LEPES = ("input", "value", "none")


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention with its projections and LePE, the depthwise convolution of the values.

    Args:
        dim: width C.
        heads: attention heads; they divide ``dim`` and ``qk_dim``.
        regions: n, regions per side.
        topk: k, regions that each region attends to.
        formulation: "legacy" is the one of all T/S/B checkpoints: exactly n x n regions, the *input* filled up with
            zeros to multiples of n, so that filling carries the projection's bias, enters the region means, and
            attends. "current" fills up *after* the projection; see ``bilevel_routing_attention``. They agree where n
            divides both sides.
        auto_pad: fill up maps whose sides n does not divide (legacy), and lower n and ``topk`` on maps with fewer
            positions than n along a side (current). False makes such maps an error.
        qk_dim: width of query and key; None means ``dim``.
        scale: factor on token scores and soft routing; None means ``qk_dim ** -0.5``, the full width.
        lepe_kernel: side of the LePE convolution; 0 leaves it away.
        param_routing: route by one learnt linear map of the region means; needs ``diff_routing``.
        soft_routing, diff_routing, kv_downsample, kv_size: as in ``bilevel_routing_attention``.
        output_projection: False leaves W_o away ("qkv" attention parameters instead of "qkvo").
        backend: as in ``bilevel_routing_attention``.

    Shape: (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: heads that do not divide a width; ``topk`` outside 1 ... n * n; ``param_routing`` without
            ``diff_routing``; ``diff_routing`` without ``soft_routing``; an unknown formulation or pooling; in
            ``forward``, another width, or a map that n does not divide although ``auto_pad`` is off.

    Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810, section 3.2.

    >>> import torch
    >>> BiLevelRoutingAttention(64, heads=2, regions=4, topk=3)(torch.randn(2, 14, 16, 64)).shape
    torch.Size([2, 14, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        regions: int = 7,
        topk: int = 4,
        formulation: str = "legacy",
        auto_pad: bool = True,
        qk_dim: int | None = None,
        scale: float | None = None,
        lepe_kernel: int = 5,
        param_routing: bool = False,
        soft_routing: bool = False,
        diff_routing: bool = False,
        kv_downsample: str = "identity",
        kv_size: int | None = None,
        output_projection: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        _check_heads(heads, dim=dim, qk_dim=qk_dim)
        check_choice("formulation", formulation, FORMULATIONS)
        check_choice("kv_downsample", kv_downsample, POOLINGS)
        if regions < 1 or not 1 <= topk <= regions**2:
            raise ValueError(f"topk={topk} regions cannot be chosen of regions={regions} x {regions}")
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True needs diff_routing=True: its weights would get no gradient")
        if diff_routing and not soft_routing:
            raise ValueError("diff_routing=True needs soft_routing=True: hard differentiable routing is not defined")
        self.dim, self.qk_dim, self.heads = dim, qk_dim, heads
        self.regions, self.topk, self.formulation, self.auto_pad = regions, topk, formulation, auto_pad
        self.options = {
            "scale": scale or qk_dim**-0.5,
            "soft_routing": soft_routing,
            "diff_routing": diff_routing,
            "kv_downsample": kv_downsample,
            "kv_size": None if kv_downsample == "identity" else kv_size,
            "backend": backend,
        }
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim)
        self.router = nn.Linear(qk_dim, qk_dim) if param_routing else None
        self.lepe = _depthwise(dim, lepe_kernel)
        self.wo = nn.Linear(dim, dim) if output_projection else nn.Identity()

    def forward(self, x: Float[Tensor, "batch x y dim"]) -> Float[Tensor, "batch x y dim"]:
        _check_map(x, self.dim)
        height, width = x.shape[1:3]
        regions, topk = self._fit(height, width)
        if self.formulation == "legacy":
            x = F.pad(x, (0, 0, 0, -width % self.regions, 0, -height % self.regions))
        query, key, value = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        maps = [rearrange(t, "b x y (h d) -> b h x y d", h=self.heads) for t in (query, key, value)]
        descriptors = self.descriptors(maps[0], maps[1], regions)
        out = bilevel_routing_attention(*maps, regions=regions, topk=topk, descriptors=descriptors, **self.options)
        out = rearrange(cast(Tensor, out), "b h x y d -> b x y (h d)")
        if self.lepe is not None:
            out = out + _convolve(self.lepe, value)
        return self.wo(out[:, :height, :width])

    def descriptors(self, query: Tensor, key: Tensor, regions: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """What regions are compared by, (batch, regions, qk_dim) for query and key; None means the region means."""
        if self.router is None:
            return None
        query_means, key_means = (region_means(tensor, regions).to(tensor.dtype) for tensor in (query, key))
        return self.router(query_means), self.router(key_means)

    def _fit(self, height: int, width: int) -> tuple[tuple[int, int], int]:
        n = self.regions
        if self.formulation == "legacy":
            if not self.auto_pad and (height % n or width % n):
                raise ValueError(f"regions={n} does not divide a map of {height} x {width}; set auto_pad=True")
            return (n, n), self.topk
        if not self.auto_pad:
            return (n, n), self.topk
        fitting = min(n, height), min(n, width)
        count = -(-height // (height // fitting[0])) * -(-width // (width // fitting[1]))
        return fitting, min(self.topk, count)


class FullAttention(nn.Module):
    """Attention of every position to every position, as in BiFormer's last stage.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads; 8 in all published models, whatever the width.
        lepe: what the added depthwise convolution reads: the layer's "input" (T/S/B and STL), the "value"
            (STL-nchw), or "none" for no convolution.
        lepe_kernel: side of that convolution; 0 leaves it away.
        qkv_bias: bias of the fused projection (order q, k, v); none in the published models.

    Shape: (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``heads`` does not divide ``dim``, an unknown ``lepe``, or an input of another width.

    Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810, section 4.

    >>> import torch
    >>> FullAttention(64)(torch.randn(2, 7, 7, 64)).shape
    torch.Size([2, 7, 7, 64])
    """

    def __init__(
        self, dim: int, heads: int = 8, *, lepe: str = "input", lepe_kernel: int = 5, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        _check_heads(heads, dim=dim)
        check_choice("lepe", lepe, LEPES)
        self.dim, self.heads, self.lepe_source = dim, heads, lepe
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.lepe = None if lepe == "none" else _depthwise(dim, lepe_kernel)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch x y dim"]) -> Float[Tensor, "batch x y dim"]:
        _check_map(x, self.dim)
        qkv = self.qkv(x)
        query, key, value = rearrange(qkv, "b x y (slot h d) -> slot b h (x y) d", slot=3, h=self.heads).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value)
        out = rearrange(out, "b h (x y) d -> b x y (h d)", x=x.shape[1])
        if self.lepe is not None:
            out = out + _convolve(self.lepe, x if self.lepe_source == "input" else qkv[..., 2 * self.dim :])
        return self.proj(out)


class AxialAttention(nn.Module):
    """Every position attends along its row, or along its column: the pattern that BiFormer is compared with.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        axis: 0 attends along columns (over X), 1 along rows (over Y).

    Shape: (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``heads`` does not divide ``dim``, another axis, or an input of another width.

    Source: "Axial Attention in Multidimensional Transformers", arXiv 1912.12180.

    >>> import torch
    >>> AxialAttention(64, 2, axis=1)(torch.randn(2, 7, 5, 64)).shape
    torch.Size([2, 7, 5, 64])
    """

    def __init__(self, dim: int, heads: int, *, axis: int) -> None:
        super().__init__()
        _check_heads(heads, dim=dim)
        if axis not in (0, 1):
            raise ValueError(f"axis={axis} must be 0 (columns) or 1 (rows)")
        self.dim, self.heads, self.axis = dim, heads, axis
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch x y dim"]) -> Float[Tensor, "batch x y dim"]:
        _check_map(x, self.dim)
        pattern = "b x y (slot h d) -> slot b y h x d" if self.axis == 0 else "b x y (slot h d) -> slot b x h y d"
        out = F.scaled_dot_product_attention(*rearrange(self.qkv(x), pattern, slot=3, h=self.heads).unbind(0))
        return self.proj(rearrange(out, "b y h x d -> b x y (h d)" if self.axis == 0 else "b x h y d -> b x y (h d)"))


class ConvMixer(nn.Module):
    """Conv1x1, DWConv5x5, Conv1x1 in the place of attention (``topk=0`` of the authors' code).

    Shape: (batch, X, Y, dim), returned as it came.

    Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.

    >>> import torch
    >>> ConvMixer(8)(torch.randn(1, 5, 4, 8)).shape
    torch.Size([1, 5, 4, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.mix = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch x y dim"]) -> Float[Tensor, "batch x y dim"]:
        return self.proj_out(_convolve(self.mix, self.proj_in(x)))


def _depthwise(dim: int, kernel: int) -> nn.Conv2d | None:
    if kernel and kernel % 2 == 0:
        raise ValueError(f"lepe_kernel={kernel} must be odd, so that the convolution keeps the map's size")
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim) if kernel else None


def _convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    return convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _check_heads(heads: int, **widths: int) -> None:
    for name, width in widths.items():
        if heads < 1 or width % heads:
            raise ValueError(f"{name}={width} is not a multiple of heads={heads}")


def _check_map(x: Tensor, dim: int) -> None:
    if x.ndim != 4 or x.shape[-1] != dim or not x.shape[1] * x.shape[2]:
        raise ValueError(f"input must be a map (batch, X, Y, {dim}), got {tuple(x.shape)}")
