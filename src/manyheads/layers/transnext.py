"""TransNeXt's attention layers, on channels-last maps of any size.

    aggregated:  k_p, v_p = W_kv LN(AvgPool(GELU(W_sr x))),   q = W_q x,   k, v = W_kv x,   then aggregated attention
    plain:       softmax( (q^ + E) softplus(tau) ln(N) k^T + B ) v,  for the last stage, where nothing is pooled
    bias:        B = MLP(log-spaced distance of query and key), so a table for any pair of sizes

Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from manyheads.engines.common import both_sides, check_choice
from manyheads.layers.kept import kept
from manyheads.layers.mixture_of_heads import HeadRouter
from manyheads.ops.aggregated import aggregated_attention, cosine_query_and_key, length_scaled_cosine_attention
from manyheads.ops.mixture_of_heads import mixture_of_heads_attention
from manyheads.ops.window import window_means

Grid = tuple[int, int]
BIASES = ("extrapolate", "interpolate")
# softplus(tau) begins at 1 / 0.24.
TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)


class PositionBias(nn.Module):
    """B, the position bias of every query on a map against every cell of the map pooled to another size.

    Per axis, with c the distance of a query from the centre of a cell and R the side at pre-training,
    ``sign(c') log2(1 + |c'|) / 3`` where ``c' = 8 c / (R - 1)``, goes through an MLP (2, 512, heads; ReLU). Distances
    repeat, so the MLP runs once for each pair of distances that occurs. In evaluation without gradients the table of
    the last size is kept until a weight changes.

    Args:
        heads: attention heads.
        side: R, the stage's side at pre-training, or one for each axis; None takes each map's own sides.
        base: the map for which the table is made before it is resized, where ``mode`` is "interpolate".
        mode: "extrapolate" evaluates the MLP at the actual distances, "interpolate" evaluates it for ``base`` and
            resizes the table bilinearly, first along the keys, then along the queries.

    State: ``cpb_fc1``, ``cpb_fc2``.

    Raises:
        ValueError: ``side`` below 2, an unknown mode, or "interpolate" without ``base``.

    >>> PositionBias(2)((8, 6), (4, 3)).shape
    torch.Size([2, 48, 12])
    """

    def __init__(
        self,
        heads: int,
        *,
        side: int | Grid | None = None,
        base: tuple[Grid, Grid] | None = None,
        mode: str = "extrapolate",
    ) -> None:
        super().__init__()
        check_choice("mode", mode, BIASES)
        if side is not None and min(both_sides(side)) < 2:
            raise ValueError(
                f"side={side} at pre-training must be at least 2, because distances are divided by side - 1"
            )
        if mode == "interpolate" and base is None:
            raise ValueError("mode='interpolate' needs base, the sizes of the map and of the pooled map to resize from")
        self.side, self.base, self.mode = side, base, mode
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, heads)

    def forward(self, grid: Grid, pooled: Grid) -> Float[Tensor, "heads tokens pooled"]:
        return kept(self, list(self.parameters()), (grid, pooled), lambda: self._table(grid, pooled))

    def _table(self, grid: Grid, pooled: Grid) -> Tensor:
        if self.base is None or self.mode == "extrapolate" or self.base == (grid, pooled):
            return self._evaluate(grid, pooled)
        (height, width), (rows, columns) = self.base
        table = self._evaluate(*self.base).unflatten(2, (rows, columns))
        table = F.interpolate(table, size=pooled, mode="bilinear").flatten(2).mT
        table = F.interpolate(table.unflatten(2, (height, width)), size=grid, mode="bilinear")
        return table.flatten(2).mT

    def _evaluate(self, grid: Grid, pooled: Grid) -> Tensor:
        weight = self.cpb_fc1.weight
        units = grid if self.side is None else both_sides(self.side)
        down, below = self._axis(grid[0], pooled[0], units[0])
        right, beside = self._axis(grid[1], pooled[1], units[1])
        # The first layer is linear in each axis, so only the sums are as many as the pairs of distances.
        vertical, horizontal = (
            values.to(weight.dtype)[:, None] * weight[:, axis] for axis, values in enumerate((down, right))
        )
        table = self.cpb_fc2(F.relu(vertical[:, None] + horizontal + self.cpb_fc1.bias))
        bias = table[below[:, None, :, None], beside[None, :, None, :]]
        return rearrange(bias, "x y r c h -> h (x y) (r c)")

    def _axis(self, side: int, cells: int, unit: int) -> tuple[Tensor, Tensor]:
        """The log-spaced distances that occur on one axis, and which of them each (query, cell) has."""
        device = self.cpb_fc1.weight.device
        # Cells as adaptive pooling cuts them; twice their centres are whole numbers, and so are twice all distances.
        centres = [cell * side // cells + -(-(cell + 1) * side // cells) - 1 for cell in range(cells)]
        step = 1 if any((centre - centres[0]) % 2 for centre in centres) else 2
        lowest = -max(centres)
        distances = torch.arange(lowest, 2 * (side - 1) - min(centres) + 1, step, device=device)
        index = 2 * torch.arange(side, device=device)[:, None] - torch.tensor(centres, device=device) - lowest
        scaled = distances.float() / 2 * 8 / max(unit - 1, 1)
        return scaled.sign() * (1 + scaled.abs()).log2() / 3, index // step


class AggregatedAttention(nn.Module):
    """Aggregated attention with its projections, its pooled branch and its position biases.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        window: side of the neighbourhood, odd.
        sr_ratio: the pooled map has ``side // sr_ratio`` cells a side.
        fixed_pool_size: cells a side whatever the map ("linear inference mode"); None follows ``sr_ratio``.
        pretrain_side: R of the position bias, the stage's side at pre-training, or one for each axis; None takes each
            map's own sides.
        base: map sides for which the position bias is made before it is resized ("interpolate").
        position_bias: "extrapolate" or "interpolate", see ``PositionBias``.
        qkv_bias: bias of the input projections.
        attn_drop: dropout on the joint attention weights.
        routing: (shared, active) for mixture-of-head attention: every position uses the first ``shared`` heads and the
            ``active`` best of the others, each with a gate of its own (arXiv 2410.11842). All heads are computed, for a
            head reads 9 neighbours and a small pooled map as cheaply as its queries are sorted. None has no gates.
        backend: as in ``manyheads.ops.aggregated.aggregated_attention``.

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``, an even window; in ``forward``, another width, a map with
            a side below ``sr_ratio``, or ``fixed_pool_size`` that is not below the shorter side.

    Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132, section 3.

    >>> import torch
    >>> AggregatedAttention(48, heads=2, sr_ratio=4)(torch.randn(2, 13, 8, 48)).shape
    torch.Size([2, 13, 8, 48])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 3,
        sr_ratio: int = 1,
        fixed_pool_size: int | None = None,
        pretrain_side: int | Grid | None = None,
        base: Grid | None = None,
        position_bias: str = "extrapolate",
        qkv_bias: bool = True,
        attn_drop: int | float = 0.0,
        routing: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_heads(dim, heads)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window={window} must be odd, so that it has a centre")
        if sr_ratio < 1 or (fixed_pool_size is not None and fixed_pool_size < 1):
            raise ValueError(f"sr_ratio={sr_ratio} and fixed_pool_size={fixed_pool_size} must be positive")
        self.heads, self.window, self.sr_ratio, self.fixed_pool_size = heads, window, sr_ratio, fixed_pool_size
        self.attn_drop, self.backend = attn_drop, backend
        self.router = None if routing is None else HeadRouter(dim, heads, shared=routing[0], active=routing[1])
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), TEMPERATURE))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, dim // heads))
        self.relative_pos_bias_local = nn.Parameter(torch.empty(heads, window**2))
        self.learnable_tokens = nn.Parameter(torch.empty(heads, dim // heads, window**2))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, window**2))
        for tensor, std in (
            (self.query_embedding, 0.02),
            (self.relative_pos_bias_local, 4e-4),
            (self.learnable_tokens, 0.02),
        ):
            trunc_normal_(tensor, std=std)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        # A table that is evaluated at the actual distances needs no base, whose map may be too small to pool.
        sizes = (base, self.pooled_size(base)) if base is not None and position_bias == "interpolate" else None
        self.position = PositionBias(heads, side=pretrain_side, base=sizes, mode=position_bias)

    def pooled_size(self, grid: Grid) -> Grid:
        """Cells of the pooled map of a map of ``grid`` positions.

        Raises:
            ValueError: a side below ``sr_ratio``, or a fixed size that is not below the shorter side.
        """
        if self.fixed_pool_size is None:
            if min(grid) < self.sr_ratio:
                raise ValueError(f"a map of {grid[0]} x {grid[1]} is smaller than sr_ratio={self.sr_ratio}")
            return grid[0] // self.sr_ratio, grid[1] // self.sr_ratio
        if self.fixed_pool_size >= min(grid):
            raise ValueError(
                f"fixed_pool_size={self.fixed_pool_size} must be below both sides of {grid[0]} x {grid[1]}"
            )
        return self.fixed_pool_size, self.fixed_pool_size

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        _check_width(x, self.proj.in_features)
        grid = (x.shape[1], x.shape[2])
        pooled = self.pooled_size(grid)
        query = rearrange(self.q(x), "b x y (h d) -> b h x y d", h=self.heads)
        key, value = rearrange(self.kv(x), "b x y (two h d) -> two b h x y d", two=2, h=self.heads)
        coarse = self.kv(self.norm(_adaptive_means(F.gelu(self.sr(x)), pooled)))
        far_key, far_value = rearrange(coarse, "b x y (two h d) -> two b h (x y) d", two=2, h=self.heads)
        out = aggregated_attention(
            query,
            key,
            value,
            far_key,
            far_value,
            window=self.window,
            temperature=self.temperature,
            query_embedding=self.query_embedding,
            bias_local=self.relative_pos_bias_local,
            bias_pool=self.position(grid, pooled),
            learnable_tokens=self.learnable_tokens,
            learnable_bias=self.learnable_bias,
            dropout=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        if self.router is not None:
            out = out * rearrange(self.router(x).gates, "b x y h -> b h x y 1")
        return self.proj(rearrange(out, "b h x y d -> b x y (h d)"))


class CosineAttention(nn.Module):
    """Length-scaled cosine attention over the whole map, with its projections and its position bias.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        pretrain_side, base, position_bias: as in ``AggregatedAttention``.
        qkv_bias: bias of the fused input projection (order q, k, v).
        attn_drop: dropout on the attention weights.
        routing: as in ``AggregatedAttention``; on large maps, heads that few positions chose read for these alone.

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``dim`` is not a multiple of ``heads``; in ``forward``, another width.

    Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132, section 3.3.

    >>> import torch
    >>> CosineAttention(48, heads=2)(torch.randn(2, 7, 5, 48)).shape
    torch.Size([2, 7, 5, 48])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        pretrain_side: int | Grid | None = None,
        base: Grid | None = None,
        position_bias: str = "extrapolate",
        qkv_bias: bool = True,
        attn_drop: int | float = 0.0,
        routing: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        _check_heads(dim, heads)
        self.heads, self.attn_drop = heads, attn_drop
        self.router = None if routing is None else HeadRouter(dim, heads, shared=routing[0], active=routing[1])
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), TEMPERATURE))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, dim // heads))
        trunc_normal_(self.query_embedding, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        sizes = None if base is None else (base, base)
        self.position = PositionBias(heads, side=pretrain_side, base=sizes, mode=position_bias)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        _check_width(x, self.proj.in_features)
        grid = (x.shape[1], x.shape[2])
        query, key, value = rearrange(self.qkv(x), "b x y (three h d) -> three b h (x y) d", three=3, h=self.heads)
        bias = self.position(grid, grid)
        gates = None if self.router is None else rearrange(self.router(x).gates, "b x y h -> b h (x y)")
        dropout = self.attn_drop if self.training else 0.0
        if gates is not None and not dropout:
            query, key = cosine_query_and_key(query, key, self.temperature, self.query_embedding)
            out = mixture_of_heads_attention(query, key, value, gates, bias=bias.to(value.dtype)[None], scale=1.0)
        else:
            learnt = {"temperature": self.temperature, "query_embedding": self.query_embedding, "bias": bias}
            out = length_scaled_cosine_attention(query, key, value, **learnt, dropout=dropout)
            out = out if gates is None else out * gates[..., None]
        return self.proj(rearrange(out, "b h (x y) d -> b x y (h d)", x=grid[0]))


def _adaptive_means(x: Tensor, pooled: Grid) -> Tensor:
    """Adaptive average pooling of a channels-last map."""
    if x.shape[1] % pooled[0] or x.shape[2] % pooled[1]:
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), pooled).permute(0, 2, 3, 1)
    return window_means(x, (x.shape[1] // pooled[0], x.shape[2] // pooled[1]))


def _check_heads(dim: int, heads: int) -> None:
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not a multiple of heads={heads}")


def _check_width(x: Tensor, dim: int) -> None:
    if x.ndim != 4 or x.shape[-1] != dim:
        raise ValueError(f"x must be (batch, X, Y, {dim}), got shape {tuple(x.shape)}")
