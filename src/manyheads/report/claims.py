"""The page of `manyheads reproduce`: every claim, its rule, what was measured, the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from manyheads import catalog
from manyheads.data.files import write_atomically
from manyheads.report.page import write_page
from manyheads.reproduce.runner import ClaimResult

OUTCOMES = ("confirmed", "refuted", "inconclusive", "error")


def write_claims_report(results: Sequence[ClaimResult], folder: str | Path) -> Path:
    """Write ``folder/index.html`` and ``folder/claims.json`` about claims that were run; return the page's path."""
    plain = [result.to_dict() for result in results]
    write_atomically(Path(folder) / "claims.json", json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    slugs = dict.fromkeys(result.claim.system for result in results)
    return write_page(
        "claims.html",
        folder,
        systems=[(catalog.get(slug), [r for r in results if r.claim.system == slug]) for slug in slugs],
        counts=[(outcome, sum(result.outcome == outcome for result in results)) for outcome in OUTCOMES],
        total=len(results),
    )
