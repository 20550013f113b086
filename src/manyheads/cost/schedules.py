"""What every rank computes and sends, step by step, in each scheme for sequences longer than one device.

With W ranks of n = N / W tokens, batch B, H query and G key/value heads of d channels, e bytes a number::

    ring          forward W - 1 steps of 2 B G n d e; backward the same, and W steps of 2 B G n d in float32
    TokenRing     forward W - 1 of B H n d e one way, W - 1 of B H n (d e + 4) the other way; backward W - 1 of
                  B H n (2 d e + 8) one way, W - 1 of B H n d in float32 the other; causal: rows halve on the way
    all-gather    forward 2 B G n d e into one gather; backward the gradients of all keys into one reduce-scatter
    Ulysses       forward all-to-all of q, k, v, then of the output; backward the same
    LASP          W - 1 dependent hops of B H d^2 in float32, forward and backward
    LASP-2        one gather of B H d^2 in float32, forward and backward

The recorded traffic of :mod:`manyheads.parallel` is compared with these schedules in the tests, and
:mod:`manyheads.cost.parallel` predicts times from them. A multiplication with its addition counts as two operations.

Source: arXiv 2105.13120, 2310.01889 (ring); 2412.20501 (TokenRing); 2404.02882 (LASP); 2502.07563 (LASP-2, LASP-2H);
2309.14509 (Ulysses).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

WIDE = 4  # bytes of a float32, in which states and gradients travel


@dataclass(frozen=True)
class Sequence:
    """One attention layer over a sequence that is sharded over a mesh.

    Attributes:
        length: N, tokens of all ranks together.
        world: W, ranks that share the sequence.
        batch: B.
        heads: H, query heads.
        kv_heads: G, key/value heads; None means as many as query heads.
        head_dim: d, channels of a head.
        element_bytes: e, bytes of one number, 2 for bfloat16.
        causal: whether later tokens are hidden.
        block: tokens of a tile of linear attention.
    """

    length: int
    world: int
    batch: int = 1
    heads: int = 32
    kv_heads: int | None = None
    head_dim: int = 128
    element_bytes: int = 2
    causal: bool = True
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("length", "world", "batch", "heads", "head_dim", "element_bytes", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.length % self.world:
            wanted = -(-self.length // self.world) * self.world
            raise ValueError(
                f"{self.length} tokens do not divide over {self.world} ranks (the next length is {wanted})"
            )

    @property
    def tokens(self) -> int:
        """n, tokens of a rank."""
        return self.length // self.world

    @property
    def groups(self) -> int:
        """G, key/value heads."""
        return self.kv_heads or self.heads

    @property
    def rows(self) -> int:
        """Query rows of a rank, all heads and batch entries."""
        return self.batch * self.heads * self.tokens

    @property
    def keys_and_values(self) -> int:
        """Numbers in a rank's keys and values."""
        return 2 * self.batch * self.groups * self.tokens * self.head_dim

    @property
    def state_bytes(self) -> int:
        """A linear attention state."""
        return self.batch * self.heads * self.head_dim**2 * WIDE


@dataclass(frozen=True)
class Step:
    """What the busiest rank does in one step of a scheme; or, in a schedule for one rank, what this rank does.

    Operations go on while the bytes travel: what waits for bytes is a step without operations before the next.

    Attributes:
        flops: operations.
        away: bytes sent to the next rank.
        home: bytes sent the other way, straight to a rank ``distance`` places back.
        distance: places between a rank and the one that its ``home`` bytes go to, the first time; one more each time.
        kind: "exchange" (point to point), "gather", "scatter" (reduce-scatter) or "all_to_all"; ``away`` is then what
            the rank puts into a gather, and what it sends in the others.
        times: how often the step happens.
        messages: how many messages ``away`` is sent in.
    """

    flops: float | int = 0.0
    away: int = 0
    home: int = 0
    distance: int = 1
    kind: str = "exchange"
    times: int = 1
    messages: int = 1


Schedule = list[Step]


def ring(s: Sequence, backward: bool, rank: int | None = None, layout: str = "contiguous") -> Schedule:
    """Ring attention; ``layout`` "zigzag" and "striped" balance causal work."""
    _check_layout(s, layout)
    moved = s.keys_and_values * s.element_bytes
    gradients = s.keys_and_values * WIDE
    one, first = _block(s, backward, layout)
    if s.world == 1:
        return [Step(first)]
    if not backward:
        return [Step(first, moved), Step(one, moved, times=s.world - 2), Step(one)]
    # Gradients of a step's keys leave after it, while the next one computes; the last journey has nothing beside it.
    return [
        Step(first, moved),
        Step(one, moved + gradients, times=s.world - 2, messages=2),
        Step(one, gradients),
        Step(0, gradients),
    ]


def token_ring(s: Sequence, backward: bool, rank: int | None = None, layout: str = "zigzag") -> Schedule:
    """TokenRing; causal sequences lie in zigzag, and of a rank's rows only the later half travels past the border."""
    layout = layout if s.causal else "contiguous"
    _check_layout(s, layout)
    one, first = _block(s, backward, layout)
    if s.world == 1:
        return [Step(first)]
    per_row = 2 * s.head_dim * s.element_bytes + 2 * WIDE if backward else s.head_dim * s.element_bytes
    per_result = s.head_dim * WIDE if backward else s.head_dim * s.element_bytes + WIDE
    if rank is None:
        times = [0, 1, 2, s.world - 1, s.world] if s.world > 2 else [0, 1, 2]
    else:
        times = list(range(s.world + 1))
    steps = []
    for t, following in zip(times, [*times[1:], s.world + 1]):
        away = home = 0
        if t < s.world - 1:
            away = _rows(s, rank, lambda r, t=t: (r - 1) % s.world + t + 1 < s.world) * per_row
        if t >= 2:
            home = _rows(s, rank, lambda r, t=t: r + t - 1 < s.world) * per_result
        flops = 0.0 if t == s.world else first if t == 0 else one
        steps.append(Step(flops, away, home, distance=max(1, t - 1), times=following - t))
    return steps


def all_gather(s: Sequence, backward: bool, rank: int | None = None, layout: str = "contiguous") -> Schedule:
    """LASP-2H's softmax layers: keys and values of all ranks on every rank, which keeps them for the backward pass."""
    _check_layout(s, layout)
    one, own = _block(s, backward, layout)
    if s.world == 1:
        return [Step(own)]
    rest = one * (s.world - 1)
    if backward:
        return [Step(own + rest), Step(0, s.keys_and_values * WIDE * (s.world - 1), kind="scatter")]
    return [Step(own, s.keys_and_values * s.element_bytes, kind="gather"), Step(rest)]


def ulysses(s: Sequence, backward: bool, rank: int | None = None) -> Schedule:
    """All-to-all: every rank turns its tokens of all heads into all tokens of its heads, and back."""
    if s.groups % s.world:
        raise ValueError(f"Ulysses needs as many key/value heads as ranks, or a multiple: {s.groups} over {s.world}")
    # A pair costs the same wherever it is computed: 1/W of the heads, all pairs.
    flops = _attention(s, s.length * ((s.length + 1) / 2 if s.causal else s.length) / s.world, backward)
    if s.world == 1:
        return [Step(flops)]
    share = s.batch * s.tokens * s.head_dim * s.element_bytes * (s.world - 1)
    operands = Step(0, share * (s.heads + 2 * s.groups) // s.world, kind="all_to_all")
    output = Step(0, share * s.heads // s.world, kind="all_to_all")
    return [output, Step(flops), operands] if backward else [operands, Step(flops), output]


def lasp(s: Sequence, backward: bool, rank: int | None = None) -> Schedule:
    """LASP: the state goes from rank to rank, each waiting for the one before it."""
    local, product = _linear(s, backward)
    last = s.world - 1 if not backward else 0
    if s.world == 1:
        return [Step(local)]
    hops = s.world - 1 if rank is None else int(rank != last)
    # A rank passes the state on when it has computed its own part: then the hops wait for each other, beside no work.
    return [Step(product + local), Step(0, s.state_bytes, times=hops), Step(product)]


def lasp2(s: Sequence, backward: bool, rank: int | None = None) -> Schedule:
    """LASP-2: one gather of states beside the local work, then every rank sums the states before its own."""
    local, product = _linear(s, backward)
    if s.world == 1:
        return [Step(local)]
    prefix = 2.0 * s.world * s.state_bytes / WIDE
    return [Step(product), Step(local, s.state_bytes, kind="gather"), Step(prefix + product)]


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "ring": ring,
    "token_ring": token_ring,
    "all_gather": all_gather,
    "ulysses": ulysses,
    "lasp": lasp,
    "lasp2": lasp2,
}


def _block(s: Sequence, backward: bool, layout: str) -> tuple[float | int, float | int]:
    """Operations of the busiest rank in an ordinary step, and in the first, where keys are its own."""
    n = s.tokens
    whole = _attention(s, n * n, backward)
    own = _attention(s, n * (n + 1) / 2, backward)
    if not s.causal:
        return whole, whole
    return {"contiguous": whole, "zigzag": whole / 2, "striped": own}[layout], own


def _attention(s: Sequence, pairs: float | int, backward: bool) -> float | int:
    # A fused kernel recomputes the scores in the backward pass: five products instead of two.
    return (10.0 if backward else 4.0) * s.batch * s.heads * s.head_dim * pairs


def _linear(s: Sequence, backward: bool) -> tuple[float | int, float | int]:
    """Operations of the blocked operator on a rank's tokens, and of one product with a state."""
    block = min(s.block, s.tokens)
    local = (10.0 if backward else 4.0) * s.rows * s.head_dim * (block + s.head_dim)
    return local, 2.0 * s.rows * s.head_dim**2 * (2 if backward else 1)


def _rows(s: Sequence, rank: int | None, whole: Callable[[int], bool]) -> int:
    """Rows that travel: all where the journey did not wrap round yet, else the second half; the most of any rank."""
    return s.rows if not s.causal or rank is None or whole(rank) else s.rows // 2


def _check_layout(s: Sequence, layout: str) -> None:
    if layout not in ("contiguous", "zigzag", "striped"):
        raise ValueError(f"layout must be contiguous, zigzag or striped, got {layout!r}")
    if layout == "zigzag" and s.tokens % 2:
        raise ValueError(f"zigzag needs a multiple of {2 * s.world} tokens, got {s.length}")
