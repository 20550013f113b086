"""`manyheads compare`: the working operators that serve a pattern, against dense attention, on one shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads import catalog
from manyheads.bench.speed import measure, with_backward

DENSE = "dense"


@dataclass(frozen=True)
class Shape:
    """What the user wants to run: one of ``catalog.PATTERNS`` and the sizes of query, key and value."""

    pattern: str
    length: int
    batch: int = 1
    heads: int = 8
    head_dim: int = 64

    @property
    def causal(self) -> bool:
        """Whether later tokens of the same sequence are hidden."""
        return self.pattern == "causal-self"

    @property
    def grid(self) -> tuple[int, int]:
        """The most square map of ``length`` positions, for operators on images."""
        rows = next(rows for rows in range(int(self.length**0.5), 0, -1) if self.length % rows == 0)
        return rows, self.length // rows


@dataclass(frozen=True)
class Row:
    """One operator's times; ratios say how many times faster than dense attention it is.

    Attributes:
        name: slug of the system, or "dense".
        settings: the operating point that was timed.
        forward: median seconds of a forward pass.
        training: median seconds of a forward and backward pass.
        forward_ratio: dense forward time over this one.
        training_ratio: dense training time over this one.
        peak_bytes: most bytes held at once during forward and backward, beyond the inputs.
    """

    name: str
    settings: str
    forward: float
    training: float
    forward_ratio: float
    training_ratio: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self)


def run_contest(
    shape: Shape, *, device: torch.device, dtype: torch.dtype = torch.float32, repeats: int = 5, budget: float = 30.0
) -> list[Row]:
    """Time all of them on the same inputs, in turn, in this process; fastest training first, dense among them.

    Args:
        shape: pattern and sizes.
        device: where to run.
        dtype: of query, key and value.
        repeats: calls of each operator, of which the median counts.
        budget: seconds after which no further round is started.

    Raises:
        ValueError: unknown pattern.
    """
    chosen = contestants(shape)
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.heads, shape.length, shape.head_dim)
    inputs = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(3)]
    functions: dict[str, Callable[..., object]] = {name: function for name, (_, function) in chosen.items()}
    with torch.no_grad():
        forward = measure(functions, inputs, repeats=repeats, budget=budget / 2, memory=False)
    trained: dict[str, Callable[..., object]] = {
        name: with_backward(function) for name, (_, function) in chosen.items()
    }
    training = measure(trained, inputs, repeats=repeats, budget=budget / 2)
    rows = [
        Row(
            name,
            settings,
            forward[name].seconds,
            training[name].seconds,
            forward[DENSE].seconds / forward[name].seconds,
            training[DENSE].seconds / training[name].seconds,
            training[name].peak_bytes,
        )
        for name, (settings, _) in chosen.items()
    ]
    return sorted(rows, key=lambda row: row.training)


def contestants(shape: Shape) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name to (operating point, function of query, key and value) for every working operator that serves the shape.

    The operating points are the papers' own, cut down where the input is smaller.
    """
    serving = {system.slug for system in catalog.systems(pattern=shape.pattern, state="works")}
    if shape.length < 2:
        serving -= {"neighborhood_attention"}  # a window is at least two tokens
    if shape.heads < 2:
        serving -= {"moh"}  # a choice is between two heads at least
    build = {
        "neighborhood_attention": _neighborhood,
        "lightning_attention": _lightning,
        "agent_attention": _agents,
        "davit": _channel,
        "dependency_vit": _reversed,
        "biformer": _bilevel_routing,
        "halonet": _halo,
        "inline_attention": _injective,
        "litv2": _hilo,
        "maxvit": _multi_axis,
        "ninformer": _mixer_gate,
        "moh": _mixture_of_heads,
        "sparsifiner": _predicted_pairs,
        "spectformer": _spectral,
        "transnext": _aggregated,
        "duo_attention": _duo,
    }
    dense = ("all pairs", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal))
    return {DENSE: dense} | {slug: make(shape) for slug, make in build.items() if slug in serving}


def _neighborhood(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.neighborhood import neighborhood_attention

    rows, columns = shape.grid
    if shape.causal or rows < 7:
        window = min(128 if shape.causal else 49, shape.length)

        def on_line(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = neighborhood_attention(q, k, v, window=window, causal=shape.causal)
            assert isinstance(out, Tensor)
            return out

        return f"window {window}", on_line

    def on_map(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = neighborhood_attention(*(x.unflatten(2, (rows, columns)) for x in (q, k, v)), window=7)
        assert isinstance(out, Tensor)
        return out.flatten(2, 3)

    return f"7 x 7 on {rows} x {columns}", on_map


def _lightning(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.lightning import lightning_attention, lightning_slopes

    def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = lightning_attention(q, k, v, slopes=lightning_slopes(shape.heads).to(q.device))
        assert isinstance(out, Tensor)
        return out

    return "decay per head", scan


def _channel(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.channel import channel_attention

    return f"{shape.heads} groups", channel_attention


def _agents(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.agent import agent_attention

    rows, columns = shape.grid
    cells = (min(7, rows), min(7, columns))

    def through(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        maps = q.mT.unflatten(3, (rows, columns)).flatten(0, 1)
        agents = F.adaptive_avg_pool2d(maps, cells).flatten(2).mT.unflatten(0, q.shape[:2])
        return agent_attention(q, k, v, agents)

    return f"{cells[0] * cells[1]} agents, pooled from the queries", through


def _injective(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.inline import inline_attention

    return "mean key and value over all tokens", inline_attention


def _reversed(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.reversed import reversed_attention

    return "all pairs, children to parents", reversed_attention


def _bilevel_routing(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.bilevel_routing import bilevel_routing_attention

    rows, columns = shape.grid
    regions = (min(7, rows), min(7, columns))
    topk = min(4, regions[0] * regions[1])

    def routed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (rows, columns)) for x in (q, k, v))
        out = bilevel_routing_attention(q, k, v, regions=regions, topk=topk)
        assert isinstance(out, Tensor)
        return out.flatten(2, 3)

    return f"top {topk} of {regions[0]} x {regions[1]}", routed


def _hilo(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.hilo import hilo_attention, low_head_count

    rows, columns = shape.grid
    window = 1 if rows % 2 or columns % 2 else 2
    low = low_head_count(shape.heads, 0.9, window)

    def split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (rows, columns)) for x in (q, k, v))
        return hilo_attention(q, k, v, window=window, low_heads=low).flatten(2, 3)

    return f"{shape.heads - low} heads in windows, {low} on a map pooled {window} x {window}", split


def _multi_axis(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.multi_axis import block_attention, grid_attention

    rows, columns = shape.grid
    partition = (_side(rows), _side(columns))

    def in_turn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (rows, columns)) for x in (q, k, v))
        near = block_attention(q, k, v, partition=partition)
        return grid_attention(q, k, near, partition=partition).flatten(2, 3)

    return f"blocks, then a grid, of {partition[0]} x {partition[1]}", in_turn


def _mixture_of_heads(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.mixture_of_heads import mixture_of_heads_attention, query_norm_routing

    shared, active = shape.heads // 4, max(shape.heads // 4, 1)

    def routed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gates = query_norm_routing(q, shared=shared, active=active).gates
        return mixture_of_heads_attention(q, k, v, gates.transpose(1, 2), causal=shape.causal)

    return f"{shared} shared heads and {active} of the others", routed


def _halo(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.halo import halo_attention

    rows, columns = shape.grid
    block, halo = _side(math.gcd(rows, columns)), 3

    def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (rows, columns)) for x in (q, k, v))
        return halo_attention(q, k, v, block=block, halo=halo).flatten(2, 3)

    return f"blocks of {block} x {block} with a halo of {halo}", blocked


def _side(length: int, most: int = 8) -> int:
    """The largest divisor of ``length`` up to ``most``."""
    return next(side for side in range(most, 0, -1) if length % side == 0)


def _aggregated(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.aggregated import aggregated_attention

    rows, columns = shape.grid
    cells = (min(7, rows), min(7, columns))

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = (
            F.adaptive_avg_pool2d(x.mT.unflatten(3, (rows, columns)).flatten(0, 1), cells).flatten(2).mT for x in (k, v)
        )
        far_key, far_value = (x.unflatten(0, k.shape[:2]) for x in far)
        q, k, v = (x.unflatten(2, (rows, columns)) for x in (q, k, v))
        temperature = q.new_full((q.shape[1], 1, 1), 4.15)
        return aggregated_attention(q, k, v, far_key, far_value, temperature=temperature).flatten(2, 3)

    return f"3 x 3 and {cells[0]} x {cells[1]} pooled", both


def _spectral(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.spectral import spectral_gating

    rows, columns = shape.grid
    filters = torch.randn(rows, columns // 2 + 1, shape.heads * shape.head_dim, 2)

    def filtered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A filter has no queries and keys: it mixes one tensor, for which the values stand here.
        x = v.transpose(1, 2).flatten(2).unflatten(1, (rows, columns))
        out = spectral_gating(x, filters.to(x.device, x.dtype))
        return out.flatten(1, 2).unflatten(2, v.shape[1::2]).transpose(1, 2)

    return f"filter of {rows} x {columns}", filtered


def _predicted_pairs(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.layers.sparsifiner import ConnectivityPredictor
    from manyheads.ops.sparse_connectivity import PairRule, pair_index, sparse_attention

    rule = PairRule(coefficient_top=min(8, max(1, shape.length // 6)))
    factor = min(6, shape.length)
    predictor = ConnectivityPredictor(shape.head_dim, shape.length, reduce_tokens=factor, rule=rule)
    predictor.requires_grad_(False)

    def predicted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = predictor.to(q.device, q.dtype)(q, k).scores
        return sparse_attention(q, k, v, pair_index(scores, rule))

    return "a quarter of the keys, by prediction", predicted


def _mixer_gate(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.layers.mixer_gate import MixerGating

    unit = MixerGating(shape.heads * shape.head_dim, shape.length, 512, dropout=0.0).requires_grad_(False)

    def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # As with filters, the values stand for the one tensor that is mixed.
        x = v.transpose(1, 2).flatten(2)
        return unit.to(x.device, x.dtype)(x).unflatten(2, v.shape[1::2]).transpose(1, 2)

    return "gate of 512 and 512 units", gated


def _duo(shape: Shape) -> tuple[str, Callable[..., Tensor]]:
    from manyheads.ops.streaming import streaming_attention

    full = shape.heads // 2

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        streaming = streaming_attention(q[:, full:], k[:, full:], v[:, full:], sinks=16, recent=64)
        assert isinstance(streaming, Tensor)
        if not full:
            return streaming
        whole = F.scaled_dot_product_attention(q[:, :full], k[:, :full], v[:, :full], is_causal=True)
        return torch.cat([whole, streaming], dim=1)

    return f"{full} whole heads, {shape.heads - full} of 16 + 64", mixed
