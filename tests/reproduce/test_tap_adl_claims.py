"""TAP's and ADL's quick claims."""

from __future__ import annotations

from manyheads.reproduce import tap_adl
from manyheads.reproduce.claims import Verdict


def test_pooling_adds_few_parameters() -> None:
    finding = tap_adl.few_parameters(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.measured["added"] == 260_480


def test_sizes_alone_do_not_confirm_errors() -> None:
    assert tap_adl.published_sizes(0).verdict is Verdict.INCONCLUSIVE
