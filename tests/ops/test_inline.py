"""InLine attention: the linear form is the weights' result, injectivity, masks, causality and decoding, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.inline import KERNELS, inline_attention, inline_attention_step, inline_weights


def _tensors(queries=9, keys=13, heads=4, kv_heads=2, width=8, value_width=5, dtype=torch.float64):
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width))
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes]


@given(st.integers(0, 7), st.integers(0, 6), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from(KERNELS), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_linear_form_is_the_weights_result(queries, more, heads, kernel, causal) -> None:
    q, k, v = _tensors(queries, queries + more + (not causal), *heads)
    for mask in (None, torch.rand(2, k.shape[2]) > 0.4):
        if mask is not None and not causal:
            mask[:, 0] = True
        options = {"kernel": kernel, "causal": causal, "key_mask": mask}
        fast = inline_attention(q, k, v, **options)
        torch.testing.assert_close(fast, inline_attention(q, k, v, backend="reference", **options))


def test_rows_sum_to_one_and_weights_may_be_negative() -> None:
    q, k, _ = _tensors()
    weights = inline_weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9, dtype=q.dtype))
    assert (weights < 0).any()


def test_the_papers_formula() -> None:
    q, k, v = _tensors(kv_heads=4)
    scores = q @ k.mT * 8**-0.5 / 13
    weights = scores - scores.sum(-1, keepdim=True) / 13 + 1 / 13
    torch.testing.assert_close(inline_weights(q, k), weights)
    torch.testing.assert_close(inline_attention(q, k, v), weights @ v)


def test_scaled_queries_stay_distinct() -> None:
    q, k, _ = _tensors()
    assert (inline_weights(q, k) - inline_weights(2 * q, k)).abs().max() > 1e-2


def test_masked_keys_might_as_well_be_absent() -> None:
    q, k, v = _tensors()
    mask = torch.tensor([[True] * 7 + [False] * 6, [True] * 7 + [False] * 6])
    torch.testing.assert_close(inline_attention(q, k, v, key_mask=mask), inline_attention(q, k[:, :, :7], v[:, :, :7]))


def test_causal_rows_are_noncausal_attention_over_their_past() -> None:
    q, k, v = _tensors(5, 8)
    out = inline_attention(q, k, v, causal=True)
    for row in range(5):
        seen = row + 4
        alone = inline_attention(q[:, :, row : row + 1], k[:, :, :seen], v[:, :, :seen])
        torch.testing.assert_close(out[:, :, row : row + 1], alone)


def test_queries_before_the_first_real_key_give_zeros() -> None:
    q, k, v = (t.requires_grad_() for t in _tensors(6, 6))
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    out = inline_attention(q, k, v, causal=True, key_mask=mask)
    assert out[0, :, :2].eq(0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_decoding_continues_the_sequence(kernel) -> None:
    q, k, v = _tensors(11, 11)
    mask = torch.rand(2, 11) > 0.3
    whole = inline_attention(q, k, v, causal=True, key_mask=mask, kernel=kernel)
    state, parts = None, []
    for start, stop in ((0, 4), (4, 5), (5, 5), (5, 11)):
        step = [t[:, :, start:stop] for t in (q, k, v)]
        out, state = inline_attention_step(*step, state, key_mask=mask[:, start:stop], kernel=kernel)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    assert state.count.tolist() == mask.sum(1).tolist()
    assert state.key_value.shape == (2, 4, 8, 5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_finite_differences(causal) -> None:
    q, k, v = (t.requires_grad_() for t in _tensors(3, 4, 2, 1, 3, 2))
    assert torch.autograd.gradcheck(lambda q, k, v: inline_attention(q, k, v, causal=causal), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_stays_close(dtype, causal) -> None:
    q, k, v = _tensors(200, 200, dtype=torch.float32)
    half = inline_attention(*(t.to(dtype) for t in (q, k, v)), causal=causal)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), inline_attention(q, k, v, causal=causal), atol=0.05, rtol=0.05)
    large = inline_attention((1e2 * q).to(dtype), (1e2 * k).to(dtype), v.to(dtype), causal=causal)
    assert large.isfinite().all()


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("causal", [True, False])
def test_any_scale_is_taken_as_it_is(scale, causal) -> None:
    q, k, v = _tensors()
    expected = inline_attention(q, k, v, scale=scale, causal=causal, backend="reference")
    torch.testing.assert_close(inline_attention(q, k, v, scale=scale, causal=causal), expected)


def test_views_are_read_as_they_are() -> None:
    q, k, v = _tensors(kv_heads=4)
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    shared = v[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(inline_attention(*views, shared), inline_attention(q, k, shared.contiguous()))


def test_compiles_whole(compiling) -> None:
    q, k, v = _tensors(dtype=torch.float32)
    mask = torch.ones(2, 13, dtype=torch.bool)
    compiled = torch.compile(inline_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, key_mask=mask), inline_attention(q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "softmax"}, "kernel='softmax' is not one of"),
        ({"key_mask": torch.zeros(2, 13, dtype=torch.bool)}, r"no real token in samples \[0, 1\]"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, r"of shape \(2, 13\)"),
        ({"key_mask": torch.ones(2, 13)}, "must be boolean"),
    ],
)
def test_bad_options(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        inline_attention(*_tensors(), **change)


def test_bad_lengths() -> None:
    q, k, v = _tensors()
    with pytest.raises(ValueError, match="at least as many keys as queries, got 3 keys and 9 queries"):
        inline_attention(q, k[:, :, :3], v[:, :, :3], causal=True)
    with pytest.raises(ValueError, match="mean over no keys"):
        inline_attention(q, k[:, :, :0], v[:, :, :0])
