"""What attention should cost on paper: closed formulas of the working systems, and of dense attention beside them.

A multiplication with its addition counts as two operations; the softmax's own few operations per score are left out,
as the papers do. Traffic counts every operand once, as a fused kernel moves it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one call costs, all batch entries and heads together.

    Attributes:
        settings: the system's own sizes that the figures hold for.
        formula: where the figures come from, with N tokens, D channels a head, H heads, batch 1.
        causal: whether later tokens are hidden, so that the fair comparison is causal dense attention.
        forward_flops: operations of a forward pass.
        backward_flops: operations of the backward pass; None for systems that are applied without training.
        traffic_bytes: bytes of inputs and outputs moved by a forward pass.
        state_bytes: what decoding holds between tokens (cache or state); None for systems that do not decode.
        decode_flops: operations for one new token after ``length`` tokens; None for systems that do not decode.
    """

    settings: str
    formula: str
    causal: bool
    forward_flops: float
    backward_flops: float | None
    traffic_bytes: float
    state_bytes: float | None
    decode_flops: float | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self)


@dataclass(frozen=True)
class Shape:
    """The sizes that every formula needs."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def rows(self) -> int:
        """Query rows of the whole batch."""
        return self.batch * self.heads * self.length

    @property
    def operand_bytes(self) -> float:
        """Query, key, value and output, each once."""
        numbers = 2 * (self.heads + self.kv_heads) * self.batch * self.length * self.head_dim
        return float(numbers * self.element_bytes)

    @property
    def cache_bytes(self) -> float:
        """Keys and values of every token."""
        return float(2 * self.batch * self.kv_heads * self.length * self.head_dim * self.element_bytes)


def dense(shape: Shape, *, causal: bool = False) -> Cost:
    """Softmax attention over all pairs, as a fused kernel computes it (it recomputes the scores in the backward)."""
    pairs = shape.rows * ((shape.length + 1) / 2 if causal else shape.length)
    return Cost(
        settings="causal" if causal else "all pairs",
        formula="forward 4 D a pair (query with key, weight with value); backward 2.5 times that; N^2 pairs a head",
        causal=causal,
        forward_flops=4.0 * pairs * shape.head_dim,
        backward_flops=10.0 * pairs * shape.head_dim,
        traffic_bytes=shape.operand_bytes,
        state_bytes=shape.cache_bytes,
        decode_flops=4.0 * shape.rows * shape.head_dim,
    )


def neighborhood(shape: Shape, *, window: int = 49) -> Cost:
    """Neighborhood attention, ``window`` keys for every query (49 for 7 x 7)."""
    pairs = shape.rows * min(window, shape.length)
    return Cost(
        settings=f"{min(window, shape.length)} keys for every query",
        formula="forward 4 N W D a head for a window of W keys; backward 2.5 times that",
        causal=False,
        forward_flops=4.0 * pairs * shape.head_dim,
        backward_flops=10.0 * pairs * shape.head_dim,
        traffic_bytes=shape.operand_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def lightning(shape: Shape, *, block: int = 64) -> Cost:
    """Lightning attention in tiles of ``block`` tokens; the state is float32 whatever the inputs are."""
    size = shape.head_dim
    block = min(block, shape.length)
    return Cost(
        settings=f"tiles of {block} tokens",
        formula="forward 4 N D (B + D) a head for tiles of B; backward 10 N D (B + D); state D x D",
        causal=True,
        forward_flops=4.0 * shape.rows * size * (block + size),
        backward_flops=10.0 * shape.rows * size * (block + size),
        traffic_bytes=shape.operand_bytes,
        state_bytes=4.0 * shape.batch * shape.heads * size * size,
        decode_flops=4.0 * shape.batch * shape.heads * size * size,
    )


def channel(shape: Shape) -> Cost:
    """DaViT's channel-group attention: D x D scores whatever the number of tokens; the heads are channel groups."""
    operations = 4.0 * shape.rows * shape.head_dim**2
    return Cost(
        settings=f"{shape.heads} groups of {shape.head_dim} channels",
        formula="forward 4 N D^2 a group; backward twice that (the small D x D weights are kept)",
        causal=False,
        forward_flops=operations,
        backward_flops=2.0 * operations,
        traffic_bytes=shape.operand_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def bilevel_routing(shape: Shape, *, regions: int = 49, topk: int = 4) -> Cost:
    """BiFormer: every region of queries reads the ``topk`` of ``regions`` regions that resemble it most."""
    regions = min(regions, shape.length)
    topk = min(topk, regions)
    keys = topk * ceil(shape.length / regions)
    routing = 2.0 * shape.batch * shape.heads * regions**2 * shape.head_dim
    attention = 4.0 * shape.rows * keys * shape.head_dim
    gathered = 2 * shape.batch * shape.kv_heads * topk * shape.length * shape.head_dim * shape.element_bytes
    queries_and_outputs = 2 * shape.rows * shape.head_dim * shape.element_bytes
    return Cost(
        settings=f"{topk} of {regions} regions",
        formula="forward 4 N (k N / R) D a head, plus 2 R^2 D to route; backward 2.5 times the attention",
        causal=False,
        forward_flops=attention + routing,
        backward_flops=2.5 * attention,
        traffic_bytes=float(gathered + queries_and_outputs),
        state_bytes=None,
        decode_flops=None,
    )


def duo(shape: Shape, *, retrieval: float = 0.5, sinks: int = 16, recent: int = 64, chunk: int = 1024) -> Cost:
    """DuoAttention: a share ``retrieval`` of the key/value heads keep all tokens, the others sinks and a window."""
    full = round(retrieval * shape.kv_heads)
    streaming = shape.kv_heads - full
    group = shape.heads / shape.kv_heads
    kept = min(shape.length, sinks + recent)
    chunk = min(chunk, shape.length)
    per_query = full * (shape.length + 1) / 2 + streaming * min((shape.length + 1) / 2, sinks + recent + chunk / 2)
    held = full * shape.length + streaming * kept
    return Cost(
        settings=f"{full} of {shape.kv_heads} key/value heads whole, others {sinks} + {recent}, chunks of {chunk}",
        formula="cache 2 D (F N + (Hkv - F) min(N, S + R)) numbers; a new token reads all of it",
        causal=True,
        forward_flops=4.0 * group * per_query * shape.batch * shape.length * shape.head_dim,
        backward_flops=None,
        traffic_bytes=shape.operand_bytes,
        state_bytes=2.0 * shape.batch * shape.head_dim * held * shape.element_bytes,
        decode_flops=4.0 * shape.batch * group * held * shape.head_dim,
    )
