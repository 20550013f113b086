"""Block and grid attention against the equation written out position by position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.multi_axis import (
    block_attention,
    grid_attention,
    grid_merge,
    grid_partition,
    relative_bias,
    resize_relative_table,
)
from manyheads.ops.window import window_attention

OPERATORS = {"block": block_attention, "grid": grid_attention}


def _by_hand(kind, q, k, v, partition, table=None, mask=None, scale=None):
    tall, wide = partition
    heads, (rows, columns) = q.shape[1], q.shape[2:4]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = heads // k.shape[1]
    out = torch.zeros(*q.shape[:4], v.shape[-1], dtype=q.dtype)
    for x in range(rows):
        for y in range(columns):
            if kind == "block":
                keys = [(x // tall * tall + a, y // wide * wide + b) for a in range(tall) for b in range(wide)]
                steps = (1, 1)
            else:
                steps = (rows // tall, columns // wide)
                keys = [(x % steps[0] + a * steps[0], y % steps[1] + b * steps[1])
                        for a in range(tall) for b in range(wide)]  # fmt: skip
            for n in range(q.shape[0]):
                seen = [p for p in keys if mask is None or mask[n, p[0], p[1]]]
                for h in range(heads if seen else 0):
                    g = h // groups
                    scores = torch.stack([scale * q[n, h, x, y] @ k[n, g, i, j] for i, j in seen])
                    if table is not None:
                        offsets = [((i - x) // steps[0] + tall - 1, (j - y) // steps[1] + wide - 1) for i, j in seen]
                        scores = scores + torch.stack([table[h, a, b] for a, b in offsets])
                    values = torch.stack([v[n, g, i, j] for i, j in seen])
                    out[n, h, x, y] = scores.softmax(0) @ values
    return out


@pytest.mark.parametrize("kind", OPERATORS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tall=st.integers(1, 3), wide=st.integers(1, 3), down=st.integers(1, 2), across=st.integers(1, 2),
    key_heads=st.sampled_from([1, 2]), biased=st.booleans(), masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_operators_are_the_equation(kind, tall, wide, down, across, key_heads, biased, masked, seed) -> None:
    torch.manual_seed(seed)
    grid = (tall * down, wide * across)
    q = torch.randn(2, 2, *grid, 3, dtype=torch.double)
    k, v = torch.randn(2, key_heads, *grid, 3).double(), torch.randn(2, key_heads, *grid, 4).double()
    table = torch.randn(2, 2 * tall - 1, 2 * wide - 1).double() if biased else None
    mask = torch.rand(2, *grid) < 0.5 if masked else None
    expected = _by_hand(kind, q, k, v, (tall, wide), table, mask)
    for backend in ("reference", "auto"):
        out = OPERATORS[kind](q, k, v, partition=(tall, wide), bias_table=table, mask=mask, backend=backend)
        torch.testing.assert_close(out, expected)


def test_without_bias_block_attention_is_window_attention() -> None:
    x = torch.randn(2, 2, 6, 8, 4)
    torch.testing.assert_close(block_attention(x, x, x, partition=(3, 4)), window_attention(x, x, x, window=(3, 4)))


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_gradients_reach_everything_and_stay_finite(operator) -> None:
    q, k, v = (torch.randn(1, 2, 4, 4, 3, dtype=torch.double, requires_grad=True) for _ in range(3))
    table = torch.randn(2, 3, 3, dtype=torch.double, requires_grad=True)
    mask = torch.rand(1, 4, 4) < 0.5

    def attend(q, k, v, table):
        return operator(q, k, v, partition=2, bias_table=table, mask=mask, scale=0.3)

    assert torch.autograd.gradcheck(attend, (q, k, v, table))


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_sets_without_keys_give_zeros(operator) -> None:
    x = torch.randn(1, 1, 4, 4, 2, requires_grad=True)
    out = operator(x, x, x, partition=2, mask=torch.zeros(1, 4, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    assert not gradient.any()


@pytest.mark.parametrize("operator", OPERATORS.values())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits(operator, dtype) -> None:
    x = torch.randn(1, 2, 6, 6, 8, dtype=dtype)
    table = torch.randn(2, 5, 5, dtype=dtype)
    out = operator(x, x, x, partition=3, bias_table=table)
    exact = operator(x.double(), x.double(), x.double(), partition=3, bias_table=table.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)
    assert operator(100 * x, 100 * x, x, partition=3).isfinite().all()


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_strided_expanded_and_empty_inputs(operator) -> None:
    x = torch.randn(2, 6, 4, 3, 8).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(operator(x, x, x, partition=2), operator(*[x.contiguous()] * 3, partition=2))
    one = torch.randn(1, 1, 6, 4, 8).expand(2, 3, -1, -1, -1)
    torch.testing.assert_close(operator(x, one, one, partition=2), operator(x, *[one.contiguous()] * 2, partition=2))
    assert operator(x[:0], x[:0], x[:0], partition=2).shape == (0, 3, 6, 4, 8)
    assert operator(x[:, :, :0], x[:, :, :0], x[:, :, :0], partition=2).shape == (2, 3, 0, 4, 8)


def test_grid_sets_are_spread_over_the_map_and_merge_again() -> None:
    x = torch.arange(24.0).view(1, 1, 4, 6, 1)
    sets = grid_partition(x, (2, 3))
    assert sets[0, 0, :, 0].tolist() == [0, 2, 4, 12, 14, 16]
    torch.testing.assert_close(grid_merge(sets, (2, 3), (4, 6)), x)


def test_resizing_keeps_the_centre_and_a_constant() -> None:
    table = torch.randn(2, 13, 13)
    assert resize_relative_table(table, 7) is table
    torch.testing.assert_close(
        resize_relative_table(torch.full((1, 13, 13), 3.0), (12, 16)), torch.full((1, 23, 31), 3.0)
    )
    torch.testing.assert_close(resize_relative_table(table, 12)[:, 11, 11], table[:, 6, 6])


@pytest.mark.parametrize("operator", OPERATORS.values())
def test_compiles_whole(compiling: None, operator) -> None:
    x, table = torch.randn(1, 2, 4, 6, 8), torch.randn(2, 3, 5, requires_grad=True)

    def attend(x, table):
        return operator(x, x, x, partition=(2, 3), bias_table=table)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, table), attend(x, table))


@pytest.mark.parametrize("operator", OPERATORS.values())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": 4}, "does not divide a map of 6 x 8; nearest sizes: 4 or 8 and 8 or 12"),
        ({"partition": (0, 2)}, "partition must be positive"),
        ({"partition": 2, "bias_table": torch.zeros(2, 5, 3)}, "resize_relative_table makes it fit"),
        ({"partition": 2, "bias_table": torch.zeros(3, 3, 3)}, "bias_table"),
        ({"partition": 2, "mask": torch.ones(1, 6, 8)}, "mask"),
        ({"partition": 2, "backend": "sdpa"}, "backend='sdpa'"),
    ],
)
def test_bad_input(operator, options: dict, message: str) -> None:
    x = torch.randn(1, 2, 6, 8, 4)
    with pytest.raises((ValueError, TypeError), match=message):
        operator(x, x, x, **options)


def test_maps_and_dtypes_must_agree() -> None:
    x = torch.randn(1, 2, 6, 8, 4)
    with pytest.raises((ValueError, TypeError), match="query"):
        grid_attention(x, x[:, :, :4], x[:, :, :4], partition=2)
    with pytest.raises(TypeError):
        grid_attention(x, x.double(), x, partition=2)


def test_relative_bias_counts_key_minus_query() -> None:
    table = torch.arange(15.0).view(1, 3, 5)
    bias = relative_bias(table, (2, 3))
    assert bias[0, 0, 5] == table[0, 1 + 1, 2 + 2]
    assert bias[0, 5, 0] == table[0, 0, 0]
