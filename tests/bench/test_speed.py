"""The measuring tools themselves."""

from __future__ import annotations

import time

import torch

from manyheads.bench.speed import measure, peak_bytes, with_backward


def test_medians_order_a_slow_and_a_fast_function() -> None:
    timings = measure({"slow": lambda x: time.sleep(0.02), "fast": lambda x: x}, [torch.ones(1)], repeats=3)
    assert timings["slow"].seconds >= 0.02 > timings["fast"].seconds


def test_peak_counts_what_is_alive_together() -> None:
    x = torch.ones(1000, 1000)
    # The numbers 1 and 2 become tensors of a few bytes.
    assert 8_000_000 <= peak_bytes(lambda x: (x + 1) * 2, [x]) < 8_000_100
    assert peak_bytes(lambda x: x.add_(1), [x]) < 1000


def test_with_backward_gives_the_gradients() -> None:
    x, y = torch.tensor([2.0]), torch.tensor([3.0])
    assert [g.item() for g in with_backward(lambda x, y: x * y)(x, y)] == [3.0, 2.0]
