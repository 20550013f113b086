from __future__ import annotations

import pytest
import torch

from manyheads import catalog
from manyheads.bench.contest import DENSE, Shape, contestants, run_contest

CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", catalog.PATTERNS)
@pytest.mark.parametrize("length", [1, 17, 196])
def test_every_contestant_runs_at_any_length(pattern, length):
    shape = Shape(pattern, length, batch=1, heads=2, head_dim=8)
    inputs = [torch.randn(1, 2, length, 8) for _ in range(3)]
    for name, (settings, function) in contestants(shape).items():
        assert function(*inputs).shape == inputs[0].shape, name
        assert settings


def test_causal_contestants_do_not_look_ahead():
    shape = Shape("causal-self", 64, heads=2, head_dim=8)
    inputs = [torch.randn(1, 2, 64, 8) for _ in range(3)]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, 40:] += 1
    for name, (_, function) in contestants(shape).items():
        torch.testing.assert_close(function(*inputs)[:, :, :40], function(*changed)[:, :, :40], msg=name)


def test_working_operators_are_all_in_the_contest():
    entered = {name for pattern in catalog.PATTERNS for name in contestants(Shape(pattern, 64))}
    # The two lightning papers share one operator, so it is timed once.
    assert {s.slug for s in catalog.systems(room="ops", state="works")} - {"lightning_attention_2"} <= entered


def test_rows_hold_times_and_ratios():
    rows = run_contest(Shape("causal-self", 64, heads=2, head_dim=8), device=CPU, repeats=2)
    dense = next(row for row in rows if row.name == DENSE)
    assert dense.forward_ratio == dense.training_ratio == 1
    assert [row.training for row in rows] == sorted(row.training for row in rows)
    assert all(
        row.training_ratio == pytest.approx(dense.training / row.training) and row.peak_bytes > 0 for row in rows
    )


def test_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match="did you mean 'causal-self'"):
        contestants(Shape("causal_self", 64))
