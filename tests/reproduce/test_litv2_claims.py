"""The quick claims of LITv2: its counts are the published ones, sizes alone confirm no accuracy."""

from __future__ import annotations

import pytest
import torch

from manyheads.reproduce import litv2
from manyheads.reproduce.claims import Verdict


def test_counts_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litv2, "REPEATS", 1)
    finding = litv2.fewer_operations(0)
    counts = finding.details["multiply_adds"]
    assert counts["14"]["hilo 0.5"] == 83_467_776
    published = {
        "14": {"hilo 0.9": 77.7e6, "window 7": 123.0e6, "reduction 2": 108.5e6, "full": 145.1e6},
        "28": {"hilo 0.9": 384.5e6, "hilo 0.5": 378.1e6, "window 7": 491.9e6, "reduction 2": 522.6e6, "full": 934.5e6},
        "56": {"hilo 0.9": 2.72e9, "window 7": 1.97e9},
    }
    for side, layers in published.items():
        for name, count in layers.items():
            assert counts[side][name] == pytest.approx(count, rel=2e-3), (side, name)
    assert finding.verdict is not Verdict.REFUTED


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert litv2.published_sizes(0).verdict is Verdict.INCONCLUSIVE


def test_the_spectrum_tells_fast_waves_from_slow_ones() -> None:
    position = torch.arange(32.0)
    for cycles, share in ((4, 0.0), (12, 1.0)):
        wave = 5 + torch.cos(2 * torch.pi * cycles / 32 * position)
        assert litv2._share_above_half(wave.expand(1, 1, 16, 32).permute(0, 2, 3, 1)) == pytest.approx(share, abs=1e-5)


def test_both_groups_of_every_layer_are_looked_at() -> None:
    found = litv2._energy_above_half(litv2._tiny(0.5), torch.rand(1, 3, 32, 32))
    assert set(found) == {"high", "low"}
    assert all(0 < share < 1 for share in found.values())
