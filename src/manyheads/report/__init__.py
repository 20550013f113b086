"""HTML pages made from results: one self-contained file each, no network, light and dark, phone and desk."""

from __future__ import annotations

from manyheads.report.claims import write_claims_report
from manyheads.report.trial import write_trial_report

__all__ = ["write_claims_report", "write_trial_report"]
