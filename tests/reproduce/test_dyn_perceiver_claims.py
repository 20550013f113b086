"""Dynamic Perceiver's quick claim, and how the long one compares curves."""

from __future__ import annotations

import pytest

from manyheads.reproduce import dyn_perceiver
from manyheads.reproduce.claims import Verdict


@pytest.mark.slow
def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert dyn_perceiver.published_sizes(0).verdict is Verdict.INCONCLUSIVE


def test_curves_are_compared_where_both_are() -> None:
    ours, rival = [(10.0, 0.5), (20.0, 0.7), (40.0, 0.9)], [(20.0, 0.6), (30.0, 0.7), (50.0, 0.7)]
    assert dyn_perceiver._gain(ours, [(cost, right - 0.1) for cost, right in ours]) == pytest.approx(0.1)
    assert dyn_perceiver._gain(ours, rival) == pytest.approx(0.8 - 0.675, abs=0.005)
    assert dyn_perceiver._gain(ours, [(50.0, 0.5), (60.0, 0.9)]) is None
