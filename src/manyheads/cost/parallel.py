"""How long a training step should take when a sequence is sharded over a mesh, and which scheme is the fastest where.

The schedules of :mod:`manyheads.cost.schedules` say what is computed and sent in every step; here a step takes::

    max(operations / rate, latency + bytes on the busiest link / bandwidth)

What the busiest link carries depends on the links. On a physical "ring" and in a full "mesh" of direct links a message
to the next rank and one the other way use different directions of a link, or different links, so that TokenRing's two
streams do not share a direction; on a ring its outputs cross as many links as they come back places. Behind a "switch"
every device has one link, and everything that it sends shares it. A ``duplex`` link carries ``bandwidth`` in each
direction at once, another one in both together.

Source: the cost sections of arXiv 2105.13120, 2412.20501 and 2502.07563; the costs of collectives are the usual ones
(Chan and others, "Collective communication: theory, practice, and experience", 2007).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from manyheads.cost.schedules import SCHEDULES, Schedule, Sequence, Step

LINKS = ("ring", "mesh", "switch")
SOFTMAX = ("ring", "zigzag ring", "striped ring", "token_ring", "all_gather", "zigzag all_gather", "ulysses")
LINEAR = ("lasp", "lasp2")
METHODS = (*SOFTMAX, *LINEAR, "lasp2h")


@dataclass(frozen=True)
class Mesh:
    """The devices and what joins them.

    Attributes:
        rate: operations a second that a device reaches in attention.
        bandwidth: bytes a second of one direction of a link (of both together without ``duplex``).
        latency: seconds before the first byte of a message arrives.
        duplex: a link carries both directions at once.
        links: "ring" (each device to two neighbours), "mesh" (a direct link for each pair) or "switch" (one link for
            each device).
    """

    rate: float | int = 4e14
    bandwidth: float | int = 5e10
    latency: float | int = 1e-5
    duplex: bool = True
    links: str = "switch"

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.bandwidth <= 0 or self.latency < 0:
            raise ValueError(
                f"rate and bandwidth must be positive and latency not negative, got {self.rate:g}, "
                f"{self.bandwidth:g}, {self.latency:g}"
            )
        if self.links not in LINKS:
            raise ValueError(f"links must be {', '.join(LINKS)}, got {self.links!r}")


@dataclass(frozen=True)
class Volume:
    """What one rank sends and receives for one layer.

    Attributes:
        sent: bytes; into a gather the rank's own contribution counts once.
        received: bytes.
        messages: point-to-point messages sent, empty ones left out.
        collectives: calls of a collective.
    """

    sent: int
    received: int
    messages: int
    collectives: int


@dataclass(frozen=True)
class Prediction:
    """What a scheme should take for the forward and the backward pass of one layer.

    Attributes:
        method: one of ``METHODS``.
        forward, backward: seconds.
        received: bytes that the busiest rank receives in both passes.
        compute: seconds that the busiest rank computes, of forward and backward together.
        exposed: seconds in which it waits for bytes.
        bound: "compute", "bandwidth" or "latency": where most of the time goes.
    """

    method: str
    forward: float | int
    backward: float | int
    received: int
    compute: float | int
    exposed: float | int
    bound: str

    @property
    def total(self) -> float | int:
        """Seconds of a training step of one layer."""
        return self.forward + self.backward

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return {**dataclasses.asdict(self), "total": self.total}


def volume(method: str, sequence: Sequence, *, backward: bool = False, rank: int | None = None) -> Volume:
    """The bytes that a rank of a scheme sends and receives in one pass.

    Args:
        method: one of ``METHODS`` but "lasp2h".
        sequence: the sizes.
        backward: of the backward pass instead of the forward pass.
        rank: which one; None takes the busiest at every step.

    Raises:
        ValueError: an unknown method, or sizes that it cannot shard.

    Source: section 7 of each paper's analysis: arXiv 2105.13120, 2412.20501, 2502.07563.

    >>> volume("ring", Sequence(1024, 4, heads=8, kv_heads=2, head_dim=64)).sent == 3 * 2 * 2 * 256 * 64 * 2
    True
    """
    schedule = _schedule(method, sequence, backward, rank)
    sent = received = messages = collectives = 0
    for step in schedule:
        sent += (step.away + step.home) * step.times
        gathered = sequence.world - 1 if step.kind == "gather" else 1
        received += (step.away + step.home) * step.times * gathered
        if step.kind == "exchange":
            messages += ((step.away > 0) * step.messages + (step.home > 0)) * step.times
        else:
            collectives += step.times
    return Volume(sent, received, messages, collectives)


def predict(method: str, sequence: Sequence, mesh: Mesh) -> Prediction:
    """The time of one layer's forward and backward pass.

    Args:
        method: one of ``METHODS``; "lasp2h" is the mean layer of a hybrid with one softmax layer (all-gather) among
            three linear ones (LASP-2).
        sequence: the sizes.
        mesh: the devices.

    Raises:
        ValueError: an unknown method, or sizes that it cannot shard.

    Source: section 7 of each paper's analysis: arXiv 2105.13120, 2412.20501, 2502.07563.

    >>> slow = Mesh(bandwidth=1e10, links="mesh")
    >>> long = Sequence(65536, 8, causal=False)
    >>> predict("token_ring", long, slow).total < predict("ring", long, slow).total
    True
    """
    if method == "lasp2h":
        return _mean(method, [predict("lasp2", sequence, mesh)] * 3 + [predict("all_gather", sequence, mesh)])
    passes = [_schedule(method, sequence, backward, None) for backward in (False, True)]
    parts = [[_seconds(step, sequence.world, mesh) for step in steps] for steps in passes]
    forward, backward = (sum(part[0] for part in one) for one in parts)
    latencies, travel = (sum(part[i] for one in parts for part in one) for i in (1, 2))
    compute = sum(step.flops * step.times for steps in passes for step in steps) / mesh.rate
    exposed = forward + backward - compute
    received = sum(volume(method, sequence, backward=backward).received for backward in (False, True))
    bound = "compute" if compute >= exposed else "latency" if latencies > travel else "bandwidth"
    return Prediction(method, forward, backward, received, compute, max(0.0, exposed), bound)


def compare(sequence: Sequence, mesh: Mesh, methods: Iterable[str] = METHODS) -> dict[str, Prediction | str]:
    """Predictions of the methods that can shard the sequence; of the others, why not.

    Source: arXiv 2105.13120, 2412.20501, 2502.07563.

    >>> list(compare(Sequence(4096, 8), Mesh(), ("lasp", "lasp2")))
    ['lasp', 'lasp2']
    """
    found: dict[str, Prediction | str] = {}
    for method in methods:
        try:
            found[method] = predict(method, sequence, mesh)
        except ValueError as problem:
            found[method] = str(problem)
    return found


def winner(sequence: Sequence, mesh: Mesh, methods: Iterable[str] = SOFTMAX) -> str | None:
    """The fastest of the methods, the first named of equally fast ones; None where none can shard the sequence.

    Source: arXiv 2105.13120, 2412.20501, 2502.07563.

    >>> winner(Sequence(2**20, 1024), Mesh(), ("lasp", "lasp2"))
    'lasp2'
    """
    found = [one for one in compare(sequence, mesh, methods).values() if isinstance(one, Prediction)]
    return min(found, key=lambda one: one.total).method if found else None


def _schedule(method: str, sequence: Sequence, backward: bool, rank: int | None) -> Schedule:
    name, options = method, {}
    if " " in method:
        layout, name = method.split(" ", 1)
        options = {"layout": layout}
        if not sequence.causal:
            raise ValueError(f"{method} balances causal attention; without it take ring")
    if name not in SCHEDULES:
        raise ValueError(f"method {method!r} is unknown; choose from: {', '.join(METHODS)}")
    return SCHEDULES[name](sequence, backward, rank, **options)


def _seconds(step: Step, world: int, mesh: Mesh) -> tuple[float | int, float | int, float | int]:
    """Seconds of a step, all its times: how long it takes; the latencies and the bytes' travel alone."""
    compute = step.flops / mesh.rate
    if not step.away and not step.home:
        return step.times * compute, 0.0, 0.0
    if mesh.links == "ring" and step.home:
        # Every time the outputs come from one place further away, over one link more.
        places = range(step.distance, step.distance + step.times)
        loads = [_both(step.away, step.home * places_back, mesh) / mesh.bandwidth for places_back in places]
        total = sum(max(compute, back * mesh.latency + load) for back, load in zip(places, loads))
        return total, sum(places) * mesh.latency, sum(loads)
    if step.kind != "exchange":
        hops, load = _collective(step, world, mesh)
    elif mesh.links == "switch":
        # The one link of a device carries both streams out, and as much in.
        hops, load = 1, (step.away + step.home) * (1 if mesh.duplex else 2)
    else:
        hops, load = 1, _both(step.away, step.home, mesh)
    latency, travel = hops * mesh.latency, load / mesh.bandwidth
    return step.times * max(compute, latency + travel), step.times * latency, step.times * travel


def _both(away: int, home: int, mesh: Mesh) -> int:
    """What a link carries, that has a direction for each of the two or not."""
    return max(away, home) if mesh.duplex else away + home


def _collective(step: Step, world: int, mesh: Mesh) -> tuple[int, float | int]:
    ways = 2 if mesh.duplex else 1
    # What a rank exchanges with each other rank.
    each = step.away if step.kind == "gather" else step.away / (world - 1)
    if mesh.links == "mesh":
        return 1, each * 2 / ways
    if mesh.links == "switch":
        hops = ceil(log2(world)) if step.kind == "gather" else 1
        return hops, each * (world - 1) * 2 / ways
    if step.kind == "all_to_all":
        # Messages go the shorter way round: world / 4 links on average.
        return world // 2, each * (world - 1) * (world / 4) * 2 / ways / 2
    return ceil((world - 1) / ways), each * (world - 1) / ways


def _mean(method: str, layers: list[Prediction]) -> Prediction:
    def mean(name: str) -> float | int:
        return sum(getattr(layer, name) for layer in layers) / len(layers)

    heaviest = max(layers, key=lambda layer: layer.total)
    return Prediction(
        method,
        mean("forward"),
        mean("backward"),
        round(mean("received")),
        mean("compute"),
        mean("exposed"),
        heaviest.bound,
    )
