"""Predicted sparse attention: the formula, the lists of pairs, and that skipping computes what masking computes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from manyheads.engines.blocksparse_plan import BlockPlan
from manyheads.ops.sparse_connectivity import (
    PairRule,
    PredictorWeights,
    block_attention,
    pair_index,
    pair_mask,
    predict_scores,
    sparse_attention,
)

D = torch.double


def _weights(tokens: int = 7, width: int = 4, channels: int = 2, places: int = 3) -> PredictorWeights:
    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(channels, width, dtype=D), torch.randn(channels, dtype=D)

    return PredictorWeights(
        pair(), pair(), torch.randn(tokens, places, dtype=D), 0.05 * torch.randn(tokens, places, dtype=D)
    )


def _qkv(tokens: int = 7, width: int = 4) -> torch.Tensor:
    return torch.randn(3, 2, 3, tokens, width, dtype=D)


def test_the_formula_entry_by_entry() -> None:
    (q, k, _), weights = _qkv(), _weights()
    rule = PairRule(coefficient_top=2)
    found = predict_scores(q, k, weights, rule)
    for head in range(3):
        small_q = q[1, head] @ weights.query[0].T + weights.query[1]
        small_k = k[1, head] @ weights.key[0].T + weights.key[1]
        rows = torch.softmax(small_q[1:] @ (small_k.T @ weights.reduce) / math.sqrt(3), -1)
        rows = torch.where(rows >= rows.sort(-1).values[:, -2:-1], rows, 0)
        basis = torch.where(weights.restore.T.abs() > 0.02, weights.restore.T.abs(), 0)
        torch.testing.assert_close(found.coefficients[1, head], rows)
        torch.testing.assert_close(found.scores[1, head], rows @ basis)
    whole = predict_scores(q, k, weights, rule, sparse=False)
    torch.testing.assert_close(whole.basis, weights.restore.T)
    torch.testing.assert_close(whole.coefficients.sum(-1), torch.ones(2, 3, 6, dtype=D))


def test_coefficients_can_go_by_a_threshold() -> None:
    (q, k, _), weights = _qkv(), _weights()
    all_of_them = predict_scores(q, k, weights, PairRule(coefficient_top=None, coefficient_threshold=0)).coefficients
    some = predict_scores(q, k, weights, PairRule(coefficient_top=None, coefficient_threshold=0.3)).coefficients
    torch.testing.assert_close(some, all_of_them * (all_of_them > 0.3))
    assert (some == 0).any()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(tokens=st.integers(2, 12), rate=st.floats(0.05, 1.0))
def test_a_share_keeps_the_largest(tokens: int, rate: float) -> None:
    scores = torch.rand(2, 3, tokens - 1, tokens)
    mask = pair_mask(pair_index(scores, PairRule(rate)), tokens)
    budget = math.ceil(rate * tokens)
    assert mask[:, :, 0].all()
    assert (mask[:, :, 1:].sum(-1) == budget).all()
    least = scores.masked_fill(~mask[:, :, 1:], 2.0).amin(-1)
    assert (scores.masked_fill(mask[:, :, 1:], -1.0).amax(-1) <= least).all()


def test_a_threshold_keeps_what_exceeds_it() -> None:
    scores = torch.rand(2, 3, 6, 7)
    scores[0, 0, 2] = 0
    index = pair_index(scores, PairRule(score_threshold=0.6))
    assert torch.equal(pair_mask(index, 7)[:, :, 1:], scores > 0.6)
    assert (index[0, 0, 2] == -1).all()


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_dropped_tokens_are_no_keys_and_may_lose_their_rows(threshold: float | None) -> None:
    kept = torch.tensor([[True, False, True, False, True, False]]).repeat(2, 1)
    scores = torch.rand(2, 3, 6, 7)
    for prune in (False, True):
        rule = PairRule(0.9, score_threshold=threshold, prune_rows=prune)
        mask = pair_mask(pair_index(scores, rule, token_mask=kept), 7)[:, :, 1:]
        assert not mask[..., 1:][~kept[:, None, None].expand(-1, 3, 6, -1)].any()
        rows = mask.sum(-1)[:, :, ~kept[0]]
        assert rows.eq(0).all() if prune else rows.any()
        if threshold is None:
            # ceil(0.9 x 7) would be 7, but three tokens are kept.
            assert (mask.sum(-1)[:, :, kept[0]] == 3).all()
            known = pair_index(scores, rule, token_mask=kept, kept=3)
            assert torch.equal(pair_mask(known, 7)[:, :, 1:], mask)
    later = pair_index(scores, PairRule(0.9))
    assert later.shape[-1] == 7


def test_reduced_rows_of_dropped_tokens_are_zero() -> None:
    (q, k, _), weights = _qkv(), _weights()
    kept = torch.tensor([[True, False, True, False, True, False]]).repeat(2, 1)
    rule = PairRule(coefficient_top=None, coefficient_threshold=0)
    found = predict_scores(q, k, weights, rule, token_mask=kept)
    torch.testing.assert_close(found.coefficients[:, :, ~kept[0]], torch.full((2, 3, 3, 3), 1 / 3, dtype=D))
    other = k.clone()
    other[:, :, 2] = 9.0
    torch.testing.assert_close(predict_scores(q, other, weights, rule, token_mask=kept).scores, found.scores)


@pytest.mark.parametrize("backend", ["gather", "dense", "auto"])
def test_skipping_is_masking(backend: str) -> None:
    q, k, v = _qkv()
    index = pair_index(torch.rand(2, 3, 6, 7), PairRule(0.4))
    index[0, 1, 2] = -1
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sparse_attention(*leaves, index, backend=backend)
    reference = sparse_attention(*expected, index, backend="reference")
    logits = (q @ k.mT / 2).masked_fill(~pair_mask(index, 7), -math.inf)
    torch.testing.assert_close(reference, logits.softmax(-1).nan_to_num() @ v)
    torch.testing.assert_close(out, reference)
    assert out[0, 1, 3].eq(0).all()
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(reference.square().sum(), expected)
    ):
        torch.testing.assert_close(a, b)


def test_blocks_are_chosen_by_their_sums() -> None:
    q, k, v = _qkv(10)
    scores = torch.rand(2, 3, 9, 10, dtype=D)
    out = block_attention(q, k, v, scores, PairRule(0.5), block=4)
    padded = torch.nn.functional.pad(scores, (0, 2, 0, 3)).unflatten(3, (3, 4)).sum(-1).unflatten(2, (3, 4)).sum(3)
    best = padded.topk(2, dim=-1).indices
    chosen = torch.zeros(2, 3, 3, 3, dtype=torch.bool).scatter(-1, best, True)
    pairs = chosen.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :9, :10]
    mask = torch.nn.functional.pad(pairs, (0, 0, 1, 0), value=True)
    logits = (q @ k.mT / 2).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    assert isinstance(BlockPlan.from_index(best, query_block=4, key_block=4), BlockPlan)


def test_gathering_computes_fewer_products() -> None:
    q, k, v = torch.randn(3, 1, 2, 65, 8)
    # Dense lists make all scores and skip the other half; sparse ones make the listed products alone.
    counted = {}
    index = pair_index(torch.rand(1, 2, 64, 65), PairRule(0.125))
    for backend in ("gather", "reference"):
        with FlopCounterMode(display=False) as counter:
            sparse_attention(q, k, v, index, backend=backend)
        counted[backend] = counter.get_total_flops()
    # The class token attends all 65, every other token the listed ones.
    assert counted["gather"] / counted["reference"] == pytest.approx((65 + 64 * index.shape[3]) / 65**2)


def test_gradients() -> None:
    (q, k, v), weights = _qkv(5), _weights(5)
    rule = PairRule(coefficient_top=None, coefficient_threshold=0)

    def run(q: torch.Tensor, k: torch.Tensor, reduce: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        given = weights._replace(reduce=reduce, restore=restore)
        return predict_scores(q, k, given, rule, sparse=False).scores

    inputs = [x.requires_grad_() for x in (q[:1], k[:1], weights.reduce, weights.restore)]
    assert torch.autograd.gradcheck(run, inputs)
    index = pair_index(torch.rand(1, 3, 4, 5), PairRule(0.4))
    given = [x[:1].clone().requires_grad_() for x in (q.detach(), k.detach(), v)]
    assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, index, backend="gather"), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_large_and_strided_inputs(dtype: torch.dtype) -> None:
    q, k, v = _qkv().float()
    index = pair_index(torch.rand(2, 3, 6, 7), PairRule(0.4))
    out = sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), index, backend="gather")
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), sparse_attention(q, k, v, index), rtol=0.05, atol=0.05)
    assert sparse_attention(1e4 * q, k, v, index).isfinite().all()
    turned = q.mT.contiguous().mT
    torch.testing.assert_close(sparse_attention(turned, k, v, index), sparse_attention(q, k, v, index))
    assert sparse_attention(q[:0], k[:0], v[:0], index[:0]).shape == (0, 3, 7, 4)


def test_one_token_is_the_class_token() -> None:
    q, k, v = _qkv(1)
    index = torch.zeros(2, 3, 0, 1, dtype=torch.int64)
    torch.testing.assert_close(sparse_attention(q, k, v, index), v)


def test_compiles_whole(compiling: None) -> None:
    (q, k, v), weights = _qkv(), _weights()

    rule = PairRule(0.4, coefficient_top=2)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, pair_index(predict_scores(q, k, weights, rule).scores, rule))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), run(q, k, v))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, w: predict_scores(q[:, :, :6], q[:, :, :6], w, PairRule(coefficient_top=2)), "built for 7 tokens"),
        (lambda q, w: predict_scores(q, q, w, PairRule(coefficient_top=4)), "exceeds the 3 reduced tokens"),
        (
            lambda q, w: predict_scores(q, q, w._replace(query=w.key[::-1]), PairRule(coefficient_top=2)),
            "weights.query",
        ),
        (lambda q, w: PairRule(0.0), r"keep_rate=0.0 must be in \(0, 1\]"),
        (lambda q, w: PairRule(1.1), "keep_rate=1.1"),
        (lambda q, w: PairRule(score_threshold=0.0), "score_threshold=0.0 must be positive"),
        (lambda q, w: PairRule(coefficient_top=0), "coefficient_top=0"),
        (
            lambda q, w: pair_index(
                torch.rand(2, 3, 6, 7), PairRule(), token_mask=torch.tensor([[True] * 6, [False] * 6])
            ),
            "as many tokens of every image",
        ),
        (
            lambda q, w: pair_index(torch.rand(2, 3, 6, 7), PairRule(), token_mask=torch.ones(2, 5, dtype=torch.bool)),
            r"boolean \(2, 6\)|parameter 'token_mask'",
        ),
        (lambda q, w: sparse_attention(q, q, q, torch.zeros(2, 3, 5, 1).long()), "index must be"),
        (lambda q, w: sparse_attention(q, q, q, torch.zeros(2, 3, 6, 1).long(), backend="flex"), "backend='flex'"),
        (lambda q, w: block_attention(q, q, q, torch.rand(2, 3, 6, 7).double(), PairRule(), block=0), "block=0"),
        (
            lambda q, w: block_attention(q, q, q, torch.rand(2, 3, 6, 7).double(), PairRule(score_threshold=0.1)),
            "no share of blocks",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    # Tests check annotated shapes before the operators do.
    with pytest.raises((ValueError, TypeError), match=message):
        call(_qkv()[0], _weights())
