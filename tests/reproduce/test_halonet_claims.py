"""HaloNet's quick claims."""

from __future__ import annotations

from manyheads.reproduce import halonet
from manyheads.reproduce.claims import Verdict


def test_blocks_save_memory() -> None:
    finding = halonet.blocks_save_memory(0)
    assert finding.verdict is Verdict.CONFIRMED
    assert finding.details["ratio"] > 10
