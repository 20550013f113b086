"""A claim of a paper as something that can be run: what it says, how it is measured, and a rule fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What a measurement says about a claim."""

    CONFIRMED = "confirmed"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Finding:
    """What one run of a claim found.

    Attributes:
        measured: the value that the rule judges (a number, or a few named numbers).
        baseline: what it is compared with, same form.
        verdict: the rule applied to both.
        details: everything else worth keeping (per seed, per length, ...), JSON-serialisable.
    """

    measured: float | dict[str, float]
    baseline: float | dict[str, float] | None
    verdict: Verdict
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, with the miniature that checks it here.

    Attributes:
        system: slug of the catalog entry.
        name: short identifier, unique within the system ("constant_speed").
        statement: the claim in one sentence.
        rule: when the verdict is confirmed and when refuted, in words, fixed before measuring.
        run: ``run(seed) -> Finding``; takes under two minutes on two cores.
        full_scale: the command that checks the claim at the paper's scale, or "" where the miniature is the whole.
    """

    system: str
    name: str
    statement: str
    rule: str
    run: Callable[[int], Finding]
    full_scale: str = ""
