"""Finding the claims, running them, and what came out: a verdict for each, or the error that stopped it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manyheads import catalog
from manyheads.reproduce.claims import Claim, Finding


@dataclass(frozen=True)
class ClaimResult:
    """One claim, run.

    Attributes:
        claim: what was run.
        finding: what it found; None where it raised.
        error: why there is no finding, "" where there is one.
        seconds: how long it took.
        seed: the seed it was given.
    """

    claim: Claim
    finding: Finding | None
    error: str
    seconds: float
    seed: int

    @property
    def outcome(self) -> str:
        """ "confirmed", "refuted" or "inconclusive"; "error" where the claim did not run to its end."""
        return self.finding.verdict.value if self.finding else "error"

    @property
    def measured(self) -> str:
        """What the rule judged, in a few words."""
        return _short(self.finding.measured) if self.finding else ""

    @property
    def baseline(self) -> str:
        """What it was compared with, in a few words."""
        return _short(self.finding.baseline) if self.finding and self.finding.baseline is not None else ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        claim = {name: getattr(self.claim, name) for name in ("system", "name", "statement", "rule", "full_scale")}
        found = None
        if self.finding:
            found = {"measured": self.finding.measured, "baseline": self.finding.baseline}
            found |= {"details": self.finding.details}
        outcome = {"outcome": self.outcome, "finding": found, "error": self.error}
        return claim | outcome | {"seconds": round(self.seconds, 3), "seed": self.seed}


def reproducible() -> list[str]:
    """Slugs of the systems whose claims can be run: those that work."""
    return [system.slug for system in catalog.systems(state="works")]


def claims_of(slug: str, name: str | None = None) -> list[Claim]:
    """The claims of a system, or the one called ``name``.

    Raises:
        ValueError: no such system, one that is only planned, or no such claim.
    """
    system = catalog.get(slug)
    if system.state != "works":
        raise ValueError(f"{system.slug} is planned: its claims cannot be run yet; try {', '.join(reproducible())}")
    claims: Sequence[Claim] = importlib.import_module(f"manyheads.reproduce.{system.slug}").CLAIMS
    if name is None:
        return list(claims)
    names = [claim.name for claim in claims]
    if name not in names:
        near = catalog.nearest(name, names)
        raise ValueError(f"{system.slug} has no claim {name!r}{near}; its claims: {', '.join(names)}")
    return [claim for claim in claims if claim.name == name]


def run_claims(claims: Sequence[Claim], *, seed: int = 0, progress: bool = False) -> list[ClaimResult]:
    """Run the claims in turn; one that raises becomes a result with its error, and the next one runs.

    Args:
        claims: from ``claims_of``.
        seed: given to every claim.
        progress: show a bar on standard error.
    """
    from tqdm import tqdm

    results = []
    bar = tqdm(claims, disable=not progress, unit="claim", leave=False)
    for claim in bar:
        bar.set_description(f"{claim.system} {claim.name}")
        results.append(_run(claim, seed))
    return results


def _run(claim: Claim, seed: int) -> ClaimResult:
    started = time.perf_counter()
    finding, error = None, ""
    try:
        finding = claim.run(seed)
    except Exception as problem:  # a broken claim must not take the verdicts of the others with it
        error = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
    return ClaimResult(claim, finding, error, time.perf_counter() - started, seed)


def _short(value: float | dict[str, float] | None) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.4g}" for name, number in value.items())
    return "" if value is None else f"{value:.4g}"
