"""The quick claims of DaViT and neighborhood attention, and the rule by which accuracies are judged."""

from __future__ import annotations

import pytest

from manyheads.reproduce import davit, neighborhood_attention
from manyheads.reproduce.claims import Verdict
from manyheads.reproduce.digits import compare


def test_channel_attention_is_global_at_linear_cost() -> None:
    finding = davit.global_at_linear_cost(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.measured == {"cost_ratio": 4.0, "positions_reached": 784}
    assert finding.baseline == {"cost_ratio": 16.0, "positions_reached": 49}


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert davit.published_sizes(0).verdict is Verdict.INCONCLUSIVE


def test_dilation_restores_reach() -> None:
    finding = neighborhood_attention.dilation_restores_reach(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.measured == 128 * 128 > finding.baseline


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.95, 0.96, 0.97], Verdict.CONFIRMED),
        ([0.90, 0.91, 0.92], Verdict.INCONCLUSIVE),
        ([0.50, 0.51, 0.52], Verdict.REFUTED),
    ],
)
def test_verdicts_of_accuracies(ours: list[float], verdict: Verdict) -> None:
    scores = {"ours": ours, "good": [0.95, 0.96, 0.97], "bad": [0.88, 0.89, 0.90]}
    assert compare(scores, "ours", ("good", "bad")).verdict is verdict
