"""The quick claims of SpectFormer."""

from __future__ import annotations

import pytest

from manyheads.reproduce import spectformer
from manyheads.reproduce.claims import Verdict


def test_the_filter_is_a_convolution() -> None:
    finding = spectformer.the_filter_is_a_global_convolution(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.measured < 1e-10


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert spectformer.published_sizes(0).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize(("attention", "verdict"), [((1.0, 9.0), Verdict.CONFIRMED), ((0.1, 0.5), Verdict.REFUTED)])
def test_times_are_judged_by_the_rule(monkeypatch: pytest.MonkeyPatch, attention, verdict) -> None:
    monkeypatch.setattr(spectformer, "SIDES", (4, 6))
    times = iter({"spectral": 1.0, "attention": seconds} for seconds in attention)
    monkeypatch.setattr(spectformer, "_times", lambda layers, x: next(times))
    assert spectformer.cheaper_at_high_resolution(0).verdict is verdict
