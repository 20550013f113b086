"""MaxViT's quick claims."""

from __future__ import annotations

import pytest

from manyheads.reproduce import maxvit
from manyheads.reproduce.claims import Verdict


def test_blocks_and_grids_see_everything_at_linear_cost() -> None:
    finding = maxvit.global_view_at_linear_cost(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.measured["share_of_positions"] == 1
    assert finding.baseline["share_of_positions"] == pytest.approx(81 / 784)


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert maxvit.published_sizes(0).verdict is Verdict.INCONCLUSIVE
