"""The 59 attention systems: what each is, where it lives, why one wants it. Pure Python, imports nothing heavy."""

from __future__ import annotations

import difflib

from manyheads.catalog.language import LANGUAGE_SYSTEMS
from manyheads.catalog.system import KINDS, PATTERNS, ROOMS, STATES, System
from manyheads.catalog.vision import VISION_SYSTEMS

__all__ = ["KINDS", "PATTERNS", "ROOMS", "STATES", "SYSTEMS", "System", "get", "nearest", "systems"]

SYSTEMS: tuple[System, ...] = tuple(sorted(LANGUAGE_SYSTEMS + VISION_SYSTEMS, key=lambda system: system.slug))


def systems(
    *, kind: str | None = None, pattern: str | None = None, room: str | None = None, state: str | None = None
) -> list[System]:
    """The systems that fit every filter given, in alphabetical order.

    Args:
        kind: one of ``KINDS`` ("operator", "adaptation", ...).
        pattern: one of ``PATTERNS`` ("causal-self", ...).
        room: one of ``ROOMS`` ("ops", "adapt", ...).
        state: "works" or "planned".

    Raises:
        ValueError: a filter is not one of its words; the message names the nearest one.

    >>> [system.slug for system in systems(room="adapt", state="works")]
    ['agent_attention', 'duo_attention', 'moh', 'sparsifiner']
    """
    for name, value, words in (
        ("kind", kind, KINDS),
        ("pattern", pattern, PATTERNS),
        ("room", room, ROOMS),
        ("state", state, STATES),
    ):
        if value is not None and value not in words:
            raise ValueError(f"{name} {value!r} is unknown{nearest(value, words)}; choose from: {', '.join(words)}")
    return [
        system
        for system in SYSTEMS
        if (kind is None or system.kind == kind)
        and (pattern is None or pattern in system.patterns)
        and (room is None or room in system.rooms)
        and (state is None or system.state == state)
    ]


def get(slug: str) -> System:
    """The system called ``slug``; hyphens and capitals are forgiven.

    Raises:
        ValueError: there is none; the message suggests the nearest name.

    >>> get("DaViT").year
    2022
    """
    by_slug = {system.slug: system for system in SYSTEMS}
    wanted = slug.strip().lower().replace("-", "_").replace(" ", "_")
    if wanted not in by_slug:
        raise ValueError(f"no system is called {slug!r}{nearest(wanted, by_slug)}; `manyheads list` shows all of them")
    return by_slug[wanted]


def nearest(wanted: str, words) -> str:
    """The suggestion to put behind "... is unknown": '; did you mean ...?', or "" when nothing is near.

    >>> nearest("biformr", ["biformer", "davit"])
    "; did you mean 'biformer'?"
    """
    words = list(words)
    close = difflib.get_close_matches(wanted, words, n=1, cutoff=0.5) or [
        word for word in words if wanted and (word.startswith(wanted) or wanted in word)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""
