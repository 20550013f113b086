"""Agent attention with its projections, agent biases and diversity convolution.

    A = pool(Q) to p x p;   out = proj( merge_heads(agent_attention(Q, K, V, A, B1, B2)) + DWConv3x3(V) )
    B1 = bilinear(an) + ah + aw     (agents x keys)          B2 = ( bilinear(na) + ha + wa )^T     (queries x agents)

Agents are averages of the projected queries over a grid laid on the map. The biases say which agent stands for which
place: a coarse 7 x 7 map, stretched, plus one value per row and one per column.

Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from manyheads.layers.cross_shaped import merge_stripes, split_stripes, stripe_map
from manyheads.layers.kept import kept
from manyheads.ops.agent import agent_attention

COARSE = 7


class AgentBias(nn.Module):
    """The agents' biases B1 and B2 of a map.

    Args:
        heads: attention heads.
        agents: m, a perfect square p x p.
        grid: (H, W) of the queries' map, for which rows and columns have values.
        key_grid: (H, W) of the keys' map; None means that of the queries.
        class_token: one more column of B1 and row of B2, for a class token before the map's tokens.
        any_size: resize the biases to whatever map comes; False makes another map an error.
        agent_grid: the agents pooled instead of p x p, with biases resized (needs ``any_size``).

    Raises:
        ValueError: ``agents`` is no square; ``agent_grid`` without ``any_size``.

    Source: "Agent Attention", arXiv 2312.08874, section 4.2.

    >>> b1, b2 = AgentBias(3, 9, (14, 14)).biases((14, 14), (14, 14))
    >>> b1.shape, b2.shape
    (torch.Size([3, 9, 196]), torch.Size([3, 196, 9]))
    """

    def __init__(
        self,
        heads: int,
        agents: int,
        grid: tuple[int, int],
        *,
        key_grid: tuple[int, int] | None = None,
        class_token: bool = False,
        any_size: bool = False,
        agent_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        side = isqrt(max(agents, 0))
        if agents < 1 or side * side != agents:
            raise ValueError(f"agents={agents} must be a perfect square, because agents lie on a square grid")
        if agent_grid is not None and not any_size:
            raise ValueError(f"agent_grid={agent_grid} resizes the biases, which needs any_size")
        self.side, self.any_size = side, any_size
        self.grid: tuple[int, int] = grid
        self.key_grid: tuple[int, int] = key_grid or grid
        self.agent_grid: tuple[int, int] = agent_grid or (side, side)
        (rows, columns), (key_rows, key_columns) = self.grid, self.key_grid

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(trunc_normal_(torch.empty(shape), std=0.02))

        self.an_bias, self.na_bias = (table(heads, agents, COARSE, COARSE) for _ in range(2))
        self.ah_bias, self.aw_bias = table(1, heads, agents, key_rows, 1), table(1, heads, agents, 1, key_columns)
        self.ha_bias, self.wa_bias = table(1, heads, rows, 1, agents), table(1, heads, 1, columns, agents)
        self.ac_bias = table(1, heads, agents, 1) if class_token else None
        self.ca_bias = table(1, heads, 1, agents) if class_token else None

    def biases(self, grid: tuple[int, int], key_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """B1 (heads, agents, keys) and B2 (heads, queries, agents) for these maps; made once in evaluation.

        Raises:
            ValueError: a map of another size, unless ``any_size``.
        """
        if not self.any_size and (tuple(grid), tuple(key_grid)) != (self.grid, self.key_grid):
            raise ValueError(
                f"the agent biases are of a map of {self.grid[0]} x {self.grid[1]} tokens, got {grid[0]} x {grid[1]}; "
                "set_input_size of the model resizes them, or allow any_size"
            )
        tables = [table for name, table in self.named_parameters(recurse=False) if name.endswith("_bias")]
        return kept(self, tables, (tuple(grid), tuple(key_grid)), lambda: self._stretched(grid, key_grid))

    def _stretched(self, grid: tuple[int, int], key_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        first = _stretch(self.an_bias, key_grid) + _stretch((self.ah_bias + self.aw_bias)[0], key_grid)
        lines = (self.ha_bias + self.wa_bias)[0].permute(0, 3, 1, 2)
        second = _stretch(self.na_bias, grid) + _stretch(lines, grid)
        first, second = (self._to_agent_grid(bias.flatten(2)) for bias in (first, second))
        second = second.transpose(1, 2)
        if self.ac_bias is not None and self.ca_bias is not None:
            first = torch.cat([self.ac_bias[0], first], dim=2)
            second = torch.cat([self.ca_bias[0], second], dim=1)
        return first, second

    def _to_agent_grid(self, bias: Tensor) -> Tensor:
        if self.agent_grid == (self.side, self.side):
            return bias
        squares = rearrange(bias, "h (p q) n -> h n p q", p=self.side)
        return rearrange(_stretch(squares, self.agent_grid), "h n p q -> h (p q) n")


class AgentAttention(AgentBias):
    """Agent attention as a layer on the tokens of a map.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        grid: (H, W) of the map.
        agents: m, a perfect square.
        class_token: the first token stands outside of the map; it attends but is not pooled and not convolved.
        fused: one projection ``qkv`` (DeiT, Swin) or ``q`` and ``kv`` (PVT).
        reduction: keys and values come from a map this many times smaller (PVT's option; needs ``fused=False``).
        qkv_bias: bias of the input projections.
        any_size: see :class:`AgentBias`.
        agent_grid: see :class:`AgentBias`.
        attn_drop: dropout of both softmaxes' weights.
        proj_drop: dropout of the output.

    Shape: (batch, tokens, dim), returned as it came; tokens are H W, one more with a class token.

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``, ``agents`` no square, a reduction that does not divide the
            grid or comes with ``fused``; in ``forward``, another width, tokens that do not fill the map, a map of
            another size (unless ``any_size``).

    Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874, section 4.

    >>> import torch
    >>> AgentAttention(96, heads=3, grid=(14, 12), agents=9)(torch.randn(2, 168, 96)).shape
    torch.Size([2, 168, 96])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        *,
        agents: int = 49,
        class_token: bool = False,
        fused: bool = True,
        reduction: int = 1,
        qkv_bias: bool = True,
        any_size: bool = False,
        agent_grid: tuple[int, int] | None = None,
        attn_drop: int | float = 0.0,
        proj_drop: int | float = 0.0,
    ) -> None:
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if reduction < 1 or grid[0] % reduction or grid[1] % reduction or (reduction > 1 and (fused or class_token)):
            raise ValueError(
                f"reduction={reduction} must divide the map of {grid[0]} x {grid[1]}, and above 1 needs fused=False "
                "and no class token"
            )
        key_grid = (grid[0] // reduction, grid[1] // reduction)
        super().__init__(
            heads, agents, grid, key_grid=key_grid, class_token=class_token, any_size=any_size, agent_grid=agent_grid
        )
        self.dim, self.heads, self.class_token, self.reduction = dim, heads, class_token, reduction
        self.attn_drop = float(attn_drop)
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.fused = fused
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        grid = self.grid if grid is None else grid
        first = int(self.class_token)
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] != grid[0] * grid[1] + first:
            extra = " and a class token" if first else ""
            raise ValueError(
                f"x must be (batch, tokens, {self.dim}) with {grid[0]} x {grid[1]} tokens{extra}, got {tuple(x.shape)}"
            )
        query, key, value, key_grid = self._project(x, grid)
        agents = F.adaptive_avg_pool2d(stripe_map(query[:, first:], grid), self.agent_grid).flatten(2).transpose(1, 2)
        b1, b2 = self.biases(grid, key_grid)
        q, k, v, a = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (query, key, value, agents))
        dropout = self.attn_drop if self.training else 0.0
        out = agent_attention(q, k, v, a, agent_bias=b1, query_bias=b2, dropout=dropout)
        out = rearrange(out, "b h n d -> b n (h d)")
        maps = stripe_map(value[:, first:], key_grid)
        if key_grid != grid:
            maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
        local = self.dwc(maps).flatten(2).transpose(1, 2)
        out = torch.cat([out[:, :1], out[:, 1:] + local], dim=1) if first else out + local
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        if self.fused:
            return *self.qkv(x).chunk(3, dim=-1), grid
        source, key_grid = x, grid
        if self.reduction > 1:
            reduced = self.sr(stripe_map(x, grid))
            key_grid = (reduced.shape[2], reduced.shape[3])
            source = self.norm(reduced.flatten(2).transpose(1, 2))
        return self.q(x), *self.kv(source).chunk(2, dim=-1), key_grid


class AgentStripeAttention(AgentBias):
    """Agent attention inside the stripes of a map, on projected q, k, v, with CSwin's local position encoding.

    Args:
        dim: width of this branch, a multiple of ``heads``.
        heads: heads of this branch.
        stripe: (height, width) of a stripe in tokens; the map's own size for one stripe.
        agents: m of each stripe, a perfect square.
        attn_drop: dropout of both softmaxes' weights.

    Shape: ``qkv`` (3, batch, tokens, dim) of a map (H, W), to (batch, tokens, dim).

    Raises:
        ValueError: ``agents`` is no square; in ``forward``, a stripe that does not divide the map.

    Source: "Agent Attention", arXiv 2312.08874 (Agent-CSwin).

    >>> import torch
    >>> AgentStripeAttention(32, heads=2, stripe=(8, 2), agents=4)(torch.randn(3, 1, 64, 32), (8, 8)).shape
    torch.Size([1, 64, 32])
    """

    def __init__(
        self, dim: int, heads: int, stripe: tuple[int, int], *, agents: int = 49, attn_drop: int | float = 0.0
    ) -> None:
        super().__init__(heads, agents, stripe)
        if dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        self.heads, self.stripe, self.attn_drop = heads, stripe, float(attn_drop)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, qkv: Float[Tensor, "3 batch tokens dim"], grid: tuple[int, int]) -> Tensor:
        query, key, value = (split_stripes(part, grid, self.stripe) for part in qkv.unbind(0))
        agents = F.adaptive_avg_pool2d(stripe_map(query, self.stripe), self.agent_grid).flatten(2).transpose(1, 2)
        b1, b2 = self.biases(self.stripe, self.stripe)
        q, k, v, a = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (query, key, value, agents))
        dropout = self.attn_drop if self.training else 0.0
        out = agent_attention(q, k, v, a, agent_bias=b1, query_bias=b2, dropout=dropout)
        local = self.get_v(stripe_map(value, self.stripe)).flatten(2).transpose(1, 2)
        return merge_stripes(rearrange(out, "b h n d -> b n (h d)") + local, grid, self.stripe)


def _stretch(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The last two axes, bilinearly between the centres of the cells."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
