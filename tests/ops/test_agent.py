"""Agent attention: both backends agree, masks, shortcut, gradients, precision, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.agent import agent_attention, agent_weights
from manyheads.ops.token_merge import match_tokens


def _tensors(queries=9, keys=13, agents=4, heads=4, kv_heads=2, width=8, value_width=5, dtype=torch.float64):
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width), (heads, agents, width))
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes]


@given(
    st.integers(0, 7), st.integers(1, 9), st.integers(1, 6), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.booleans()
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_the_engine_gives_the_equations_result(queries, keys, agents, heads, biased) -> None:
    q, k, v, a = _tensors(queries, keys, agents, *heads)
    biases = {}
    if biased:
        biases = {
            "agent_bias": torch.randn(heads[0], agents, keys, dtype=q.dtype),
            "query_bias": torch.randn(1, heads[0], queries, agents, dtype=q.dtype),
        }
    mask = torch.rand(2, keys) > 0.5
    for options in ({}, {"key_mask": mask}, {"scale": 0.7, "query_scale": 1.3}):
        fast = agent_attention(q, k, v, a, **biases, **options)
        torch.testing.assert_close(fast, agent_attention(q, k, v, a, backend="reference", **biases, **options))


def test_it_is_two_softmaxes_in_a_row() -> None:
    q, k, v, a = _tensors(kv_heads=4)
    first, second = agent_weights(a, k), agent_weights(q, a)
    torch.testing.assert_close(agent_attention(q, k, v, a), second @ (first @ v))
    torch.testing.assert_close((second @ first).sum(-1), torch.ones(2, 4, 9, dtype=q.dtype))


def test_queries_as_agents_with_one_key_are_softmax() -> None:
    q, k, v, a = _tensors(keys=1, kv_heads=4)
    torch.testing.assert_close(agent_attention(q, k, v, a), v.expand(-1, -1, 9, -1))


def test_a_sample_without_keys_gives_zeros_and_finite_gradients() -> None:
    q, k, v, a = (t.requires_grad_() for t in _tensors())
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0] = False
    for backend in ("auto", "reference"):
        out = agent_attention(q, k, v, a, key_mask=mask, backend=backend)
        assert out[0].eq(0).all()
        assert out[1].ne(0).any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, a)))


def test_the_shortcut_adds_each_tokens_own_value() -> None:
    q, k, v, a = _tensors(queries=13)
    plain = agent_attention(q, k, v, a)
    mask = torch.rand(2, 13) > 0.5
    torch.testing.assert_close(agent_attention(q, k, v, a, shortcut=0.5) - plain, 0.5 * v.repeat_interleave(2, 1))
    masked = agent_attention(q, k, v, a, shortcut=0.5, key_mask=mask) - agent_attention(q, k, v, a, key_mask=mask)
    assert masked.mT[:, :, :, ~mask[0]][0].eq(0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v, a = (t.requires_grad_() for t in _tensors(3, 4, 2, 2, 1, 3, 2))
    b1, b2 = (torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (3, 2)))

    def attend(q, k, v, a, b1, b2):
        return agent_attention(q, k, v, a, agent_bias=b1, query_bias=b2)

    assert torch.autograd.gradcheck(attend, (q, k, v, a, b1, b2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_huge_logits_finite(dtype) -> None:
    q, k, v, a = _tensors(dtype=torch.float32)
    half = agent_attention(*(t.to(dtype) for t in (q, k, v, a)))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), agent_attention(q, k, v, a), atol=0.03, rtol=0.03)
    assert agent_attention((1e2 * q).to(dtype), (1e2 * k).to(dtype), v.to(dtype), a.to(dtype)).isfinite().all()


def test_views_are_read_as_they_are() -> None:
    q, k, v, a = _tensors()
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    shared = a[:, :1].expand(-1, 4, -1, -1)
    torch.testing.assert_close(agent_attention(*views, shared), agent_attention(q, k, v, shared.contiguous()))


def test_dropout_drops_weights_of_both() -> None:
    q, k, v, a = _tensors()
    assert not torch.equal(agent_attention(q, k, v, a, dropout=0.5), agent_attention(q, k, v, a))
    assert agent_attention(q, k, v, a, dropout=1.0).eq(0).all()


def test_compiles_whole(compiling) -> None:
    q, k, v, a = _tensors(dtype=torch.float32)
    compiled = torch.compile(agent_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, a), agent_attention(q, k, v, a))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True}, "causal=True is not defined"),
        ({"shortcut": 0.1}, "9 queries and 13 keys"),
        ({"dropout": 1.5}, "dropout=1.5 must be between"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, r"key_mask must be boolean of shape \(2, 13\)"),
        ({"agent_bias": torch.zeros(4, 4, 12)}, r"agent_bias of shape \(4, 4, 12\) does not broadcast"),
        ({"query_bias": torch.zeros(4, 4, 12), "backend": "reference"}, r"query_bias of shape \(4, 4, 12\) does not"),
        ({"backend": "magic"}, "backend='magic'"),
    ],
)
def test_bad_options(change, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        agent_attention(*_tensors(), **change)


def test_agents_follow_the_query_heads() -> None:
    q, k, v, a = _tensors()
    with pytest.raises(ValueError, match="must have the query's 4 heads"):
        agent_attention(q, k, v, a[:, :2])
    with pytest.raises(ValueError, match="at least one token"):
        agent_attention(q, k, v, a[:, :, :0])


def test_merging_averages_and_unmerging_copies() -> None:
    x = torch.randn(2, 24, 5, dtype=torch.float64)
    matching = match_tokens(x, (4, 6), (2, 3))
    assert matching.destinations.tolist() == [0, 3, 12, 15]
    assert matching.count(0.5) == 12
    assert matching.count(0.99) == 20
    merged = matching.merge(x, 7)
    assert merged.shape == (2, 17, 5)
    back = matching.unmerge(merged, 7)
    for sample in range(2):
        gone, best = matching.sources[sample, :7], matching.best[sample, :7]
        stays = torch.ones(24, dtype=torch.bool)
        stays[gone] = False
        stays[matching.destinations] = False
        torch.testing.assert_close(back[sample, stays], x[sample, stays])
        for index, position in enumerate(matching.destinations.tolist()):
            group = [position, *gone[best == index].tolist()]
            torch.testing.assert_close(back[sample, group], x[sample, group].mean(0).expand(len(group), -1))


def test_tokens_of_zeros_resemble_nothing() -> None:
    x = torch.randn(1, 16, 8)
    x[:, 5] = 0
    matching = match_tokens(x, (4, 4), (2, 2))
    pairs = torch.cosine_similarity(x[0, matching.sources[0], None], x[:, matching.destinations], dim=-1)
    best, which = pairs.max(-1)
    assert best.diff().le(1e-6).all()
    assert which.equal(matching.best[0])


def test_nothing_merged_is_nothing_lost() -> None:
    x = torch.randn(2, 20, 5)
    matching = match_tokens(x, (4, 5), (2, 2), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(matching.unmerge(matching.merge(x, 0), 0), x, rtol=0, atol=0)


def test_the_most_similar_go_first_wherever_destinations_stand() -> None:
    x = torch.randn(1, 36, 8)
    matching = match_tokens(x, (6, 6), (3, 3), generator=torch.Generator().manual_seed(0))
    rows, columns = matching.destinations // 6 // 3, matching.destinations % 6 // 3
    assert sorted(zip(rows.tolist(), columns.tolist())) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    similarity = torch.cosine_similarity(x[0, matching.sources[0]], x[0, matching.destinations[matching.best[0]]], -1)
    assert (similarity.diff() <= 1e-6).all()


@pytest.mark.parametrize(("grid", "cell"), [((4, 5), (2, 2)), ((4, 6), (5, 2)), ((4, 6), (0, 2))])
def test_bad_maps(grid, cell) -> None:
    with pytest.raises(ValueError, match="do not f"):
        match_tokens(torch.randn(1, 24, 3), grid, cell)
