"""SHViT's quick claims."""

from __future__ import annotations

from manyheads.reproduce import shvit
from manyheads.reproduce.claims import Verdict


def test_a_large_stem_writes_less() -> None:
    finding = shvit.less_memory_traffic(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert 0.5 < finding.details["operations"]["shvit_s1"] / finding.details["operations"][shvit.PYRAMID] < 2


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert shvit.published_sizes(0).verdict is Verdict.INCONCLUSIVE
