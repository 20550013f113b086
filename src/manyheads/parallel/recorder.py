"""Counting what travels: messages and bytes per rank, as this rank sent and received them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One message or collective of this rank.

    Attributes:
        call: the function that sent it ("ring_self_attention", "ring_self_attention backward").
        what: what it carries ("key, value", "query", "output", "state").
        kind: "send", "receive", or the name of the collective.
        peer: the other rank within the group, -1 for a collective.
        distance: (peer - rank) modulo the number of ranks, 0 for a collective.
        step: the scheme's step, from 0.
        sent: bytes that this rank put in. A collective counts its own contribution once.
        received: bytes that arrived from other ranks.
    """

    call: str
    what: str
    kind: str
    peer: int
    distance: int
    step: int
    sent: int
    received: int


@dataclass
class Recording:
    """Everything that this rank sent and received while the recording was open.

    Attributes:
        messages: in the order in which they were posted.
        kept: with ``record(keep=True)``, intermediate results by (name, step), for checking against references.
        pairs: by (call, step), how many query-key pairs per head and batch entry this rank computed.
        keep: whether ``kept`` is filled.
    """

    messages: list[Message] = field(default_factory=list)
    kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    pairs: dict[tuple[str, int], int] = field(default_factory=dict)
    keep: bool = False

    def chosen(self, **attributes) -> list[Message]:
        """The messages whose attributes have these values: ``chosen(kind="send", what="query")``."""
        return [m for m in self.messages if all(getattr(m, name) == value for name, value in attributes.items())]

    def sent(self, **attributes) -> int:
        """Bytes sent, of the chosen messages."""
        return sum(m.sent for m in self.chosen(**attributes))

    def received(self, **attributes) -> int:
        """Bytes received, of the chosen messages."""
        return sum(m.received for m in self.chosen(**attributes))


# One rank is one process, and backward passes may run in other threads: hence a list of the process, not of the thread.
_OPEN: list[Recording] = []


@contextmanager
def record(*, keep: bool = False) -> Iterator[Recording]:
    """Record this rank's traffic in every scheme of this room until the block ends, backward passes included.

    Args:
        keep: also keep intermediate results (partial outputs and log-sum-exps of every step, states); costs memory.

    Yields:
        The recording, which fills up while the block runs.

    Source: the volumes in "Sequence Parallelism", arXiv 2105.13120, "TokenRing", arXiv 2412.20501, and "LASP-2",
    arXiv 2502.07563, are compared with such recordings.

    >>> with record() as log:
    ...     pass
    >>> log.sent()
    0
    """
    log = Recording(keep=keep)
    _OPEN.append(log)
    try:
        yield log
    finally:
        _OPEN[:] = [other for other in _OPEN if other is not log]


def note(message: Message) -> None:
    """Add a message to every open recording."""
    for log in _OPEN:
        log.messages.append(message)


def keeping() -> bool:
    """Whether an open recording wants intermediate results."""
    return any(log.keep for log in _OPEN)


def keep(name: str, step: int, tensor: Tensor) -> None:
    """Give an intermediate result to the recordings that want them."""
    for log in _OPEN:
        if log.keep:
            log.kept[name, step] = tensor.detach().clone()


def count_pairs(call: str, step: int, some: Sequence[Any]) -> None:
    """Add the query-key pairs of tiles that are computed at a step; counted only where somebody records."""
    for log in _OPEN:
        log.pairs[call, step] = log.pairs.get((call, step), 0) + sum(tile.pairs for tile in some)
