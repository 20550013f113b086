"""Merging partial results: equal to attention over the union, in any order, with empty rows and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engines.dense import attention
from manyheads.engines.merge import grouped_softmax, merge


def parts_of(q, k, v, cuts, **options):
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    return zip(*(attention(q, k[:, :, at], v[:, :, at], return_lse=True, **options) for at in pieces))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=4).map(lambda c: [0, *sorted(c), 12]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_parts_merge_to_the_whole_in_any_order(cuts, dtype, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, 2, 5, 8).to(dtype), *(torch.randn(2, 2, 12, 8).to(dtype) for _ in range(2)))
    outs, lses = parts_of(q, k, v, cuts)
    whole, whole_lse = attention(q, k, v, return_lse=True)
    results = [merge(*zip(*order)) for order in itertools.permutations(list(zip(outs, lses)))]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for out, lse in results:
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        torch.testing.assert_close(out, whole, atol=rounding, rtol=rounding)
        torch.testing.assert_close(lse, torch.stack(lses).logsumexp(0), atol=1e-6, rtol=1e-6)
        # The half-precision kernels approximate exp to some 1e-5.
        torch.testing.assert_close(lse, whole_lse, atol=1e-5 if dtype == torch.float32 else 3e-4, rtol=1e-5)
        # Whatever the dtype, the order only moves float32 rounding: one unit in the last place of the result.
        torch.testing.assert_close(out, results[0][0], atol=2e-6, rtol=torch.finfo(dtype).eps)


def test_gradients_equal_those_of_the_whole():
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    outs, lses = parts_of(q, k, v, [0, 2, 3, 6])
    out, lse = merge(outs, lses)
    grads = torch.autograd.grad(out.sin().sum() + lse.cos().sum(), (q, k, v))
    whole, whole_lse = attention(q, k, v, return_lse=True, backend="reference")
    expected = torch.autograd.grad(whole.sin().sum() + whole_lse.cos().sum(), (q, k, v))
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b)


def test_gradients_match_finite_differences_beside_empty_rows():
    outs = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    empty = torch.tensor([False, True, True]), torch.tensor([False, False, True])

    def run(*tensors):
        hidden = [lse.masked_fill(e, -math.inf) for lse, e in zip(tensors[2:], empty)]
        out, lse = merge(tensors[:2], hidden)
        return out, torch.where(lse == -math.inf, 0, lse)

    assert torch.autograd.gradcheck(run, (*outs, *lses))


def test_empty_rows_give_zeros_and_ignore_what_a_kernel_left_there():
    outs = [torch.full((2, 3), math.nan, requires_grad=True), torch.tensor([[1.0, 2, 3], [math.nan] * 3], requires_grad=True)]  # fmt: skip  # noqa: E501
    lses = [torch.full((2,), -math.inf, requires_grad=True), torch.tensor([0.5, -math.inf], requires_grad=True)]
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, torch.tensor([[1.0, 2, 3], [0, 0, 0]]))
    torch.testing.assert_close(lse, torch.tensor([0.5, -math.inf]))
    for grad in torch.autograd.grad(out.sum() + lse[:1].sum(), (*outs, *lses)):
        assert grad.isfinite().all()


def test_far_apart_scores_neither_overflow_nor_vanish():
    outs = [torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]])]
    out, lse = merge(outs, [torch.tensor([1e4]), torch.tensor([1e4]), torch.tensor([-1e4])])
    torch.testing.assert_close(out, torch.tensor([[1.5]]))
    torch.testing.assert_close(lse, torch.tensor([1e4 + math.log(2)]))


def test_running_merge_equals_one_merge():
    outs, lses = [torch.randn(4, 3) for _ in range(5)], [torch.randn(4) * 10 for _ in range(5)]
    running = outs[0], lses[0]
    for out, lse in zip(outs[1:], lses[1:]):
        running = merge([running[0], out], [running[1], lse])
    for a, b in zip(running, merge(outs, lses)):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("compiling")
def test_compiles_in_one_graph():
    outs, lses = [torch.randn(4, 3, requires_grad=True) for _ in range(3)], [torch.randn(4) for _ in range(3)]
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(outs, lses), merge(outs, lses)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "words"),
    [
        ([], [], ValueError, "at least one"),
        ([torch.ones(2, 3)], [], ValueError, "one lse for each output"),
        ([torch.ones(2, 3)], [torch.ones(3)], ValueError, r"must have shape \(2,\)"),
        ([torch.ones(2, 3), torch.ones(2, 4)], [torch.ones(2)] * 2, ValueError, "share a shape"),
        ([torch.ones(2, 3), torch.ones(2, 3).half()], [torch.ones(2)] * 2, TypeError, "share a dtype"),
        ([torch.ones(2, 3, dtype=torch.int64)], [torch.ones(2)], TypeError, "floating point"),
    ],
)
def test_bad_input_is_named(outs, lses, error, words):
    with pytest.raises(error, match=words):
        merge(outs, lses)


# ---- grouped softmax ----


def test_groups_gated_by_their_own_sums_are_plain_softmax():
    scores, groups = torch.randn(2, 5, 9), torch.randint(0, 4, (5, 9))
    gates = torch.full((4,), math.nan)
    weights = grouped_softmax(scores, groups, gates, own=torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(weights, scores.softmax(-1))


def test_gated_groups_follow_the_two_level_formula():
    scores = torch.randn(7, dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, -1, 2, 2, 2])
    gates = torch.tensor([0.3, -1.0, 0.0], dtype=torch.float64)
    weights = grouped_softmax(scores, groups, gates, own=torch.tensor([False, False, True]))
    total = gates[0].exp() + gates[1].exp() + scores[4:].exp().sum()
    expected = torch.cat([
        scores[:2].softmax(0) * gates[0].exp() / total, gates[1:2].exp() / total, torch.zeros(1),
        scores[4:].exp() / total,
    ])  # fmt: skip
    torch.testing.assert_close(weights, expected)


def test_empty_groups_lose_their_mass_and_hidden_groups_have_none():
    scores, groups = torch.zeros(1, 2), torch.tensor([[0, 0]])
    torch.testing.assert_close(grouped_softmax(scores, groups, torch.zeros(1, 2)), torch.full((1, 2), 0.25))
    hidden = torch.tensor([[0.0, -math.inf]])
    torch.testing.assert_close(grouped_softmax(scores, groups, hidden), torch.full((1, 2), 0.5))
    assert (grouped_softmax(scores, torch.full((1, 2), -1), torch.full((1, 2), -math.inf)) == 0).all()


def test_grouped_softmax_gradients():
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    groups, own = torch.tensor([[0, 0, 1, 2, 2, -1], [-1, -1, -1, 1, 1, 1]]), torch.tensor([False, False, True])
    assert torch.autograd.gradcheck(lambda s, g: grouped_softmax(s, groups, g, own=own), (scores, gates))


@pytest.mark.parametrize(
    ("groups", "gates", "error", "words"),
    [
        (torch.zeros(3), torch.zeros(2), TypeError, "int64"),
        (torch.zeros(4, dtype=torch.int64), torch.zeros(2), ValueError, "does not broadcast"),
    ],
)
def test_grouped_softmax_bad_input(groups, gates, error, words):
    with pytest.raises(error, match=words):
        grouped_softmax(torch.zeros(3), groups, gates)
