"""Mixture of heads: gates by the formula, and attention that leaves out what was not chosen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engines.dense import attention
from manyheads.ops import mixture_of_heads as moh
from manyheads.ops.mixture_of_heads import (
    learned_routing,
    load_balance_loss,
    mixture_of_heads_attention,
    query_norm_routing,
)


def _gates_by_hand(routed: list[float], shared: list[float], balance: list[float] | None, active: int) -> list[float]:
    """Section 3 of the paper with the authors' factors, in plain numbers."""

    def softmax(scores: list[float]) -> list[float]:
        powers = [2.718281828459045**score for score in scores]
        return [power / sum(powers) for power in powers]

    always, sometimes = (2 * share for share in softmax(balance)) if balance else (1.0, 1.0)
    found = [always * len(shared) * share for share in softmax(shared)] if shared else []
    if routed:
        probabilities = softmax(routed)
        best = sorted(range(len(routed)), key=lambda head: -probabilities[head])[:active]
        total = sum(probabilities[head] for head in best)
        found += [sometimes * active * probabilities[i] / total if i in best else 0.0 for i in range(len(routed))]
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shared=st.integers(0, 4), routed=st.integers(0, 5), data=st.data())
def test_gates_are_the_equation(shared: int, routed: int, data) -> None:
    if shared + routed == 0:
        shared = 1
    active = data.draw(st.integers(1, routed)) if routed else 0
    scores = torch.randn(3, 2, routed + shared + 2, dtype=torch.double)
    both = bool(shared and routed)
    found = learned_routing(
        scores[..., :routed] if routed else None,
        scores[..., routed : routed + shared] if shared else None,
        scores[..., -2:] if both else None,
        active=active,
    )
    for token, gates in zip(scores.flatten(0, 1).tolist(), found.gates.flatten(0, 1).tolist()):
        hand = _gates_by_hand(token[:routed], token[routed : routed + shared], token[-2:] if both else None, active)
        assert gates == pytest.approx(hand, abs=1e-12)
    assert found.chosen.sum(-1).eq(active).all()
    if routed:
        torch.testing.assert_close(found.gates[..., :shared].ne(0).sum(-1) + active, found.gates.ne(0).sum(-1))


def test_query_norms_choose_and_pass_gradients_straight_through() -> None:
    query = torch.randn(2, 5, 7, 8, dtype=torch.double, requires_grad=True)
    plain = query_norm_routing(query, shared=2, active=1)
    norms = query.detach().norm(dim=-1)[:, 2:].transpose(1, 2)
    torch.testing.assert_close(plain.probabilities, (norms / norms.std(-1, keepdim=True)).softmax(-1))
    best = norms.argmax(-1)
    assert plain.gates[..., :2].eq(1).all()
    assert plain.gates[..., 2:].argmax(-1).equal(best)
    assert plain.gates.sum(-1).eq(3).all()
    assert not plain.gates.requires_grad

    through = query_norm_routing(query, shared=2, active=1, straight_through=True)
    torch.testing.assert_close(through.gates, plain.gates)
    assert through.gates[plain.gates == 0].eq(0).all()
    weight = torch.randn(2, 7, 5, dtype=torch.double)
    (through.gates * weight).sum().backward()
    again = query.detach().requires_grad_()
    lengths = again.norm(dim=-1)[:, 2:].transpose(1, 2)
    soft = (lengths / lengths.std(-1, keepdim=True)).softmax(-1)
    (soft * weight[..., 2:]).masked_fill(plain.gates[..., 2:] == 0, 0).sum().backward()
    torch.testing.assert_close(query.grad, again.grad)


def test_equal_norms_have_finite_probabilities() -> None:
    found = query_norm_routing(torch.ones(1, 4, 2, 3), shared=1, active=2)
    torch.testing.assert_close(found.probabilities, torch.full((1, 2, 3), 1 / 3))
    assert found.gates.sum(-1).eq(3).all()


def test_the_balance_loss_is_active_heads_when_all_are_used_alike_and_skips_padding() -> None:
    probabilities, chosen = torch.rand(3, 4, 6).softmax(-1), torch.rand(3, 4, 6) > 0.5
    by_hand = 36 * torch.stack([probabilities[..., i].mean() * chosen[..., i].float().mean() for i in range(6)]).mean()
    torch.testing.assert_close(load_balance_loss(probabilities, chosen), by_hand)
    real = torch.zeros(3, 4, dtype=torch.bool)
    real[0, :3] = real[2, 1] = True
    alone = load_balance_loss(probabilities[real], chosen[real])
    torch.testing.assert_close(load_balance_loss(probabilities, chosen, real=real), alone)
    assert load_balance_loss(probabilities, chosen, real=torch.zeros_like(real)) == 0
    with pytest.raises(ValueError, match=r"real must say of tokens \(3, 4\), got shape \(3, 5\)"):
        load_balance_loss(probabilities, chosen, real=torch.ones(3, 5))


def test_heads_that_are_all_shared_have_nothing_to_balance() -> None:
    scores = torch.randn(2, 5, 4, requires_grad=True)
    found = learned_routing(None, scores, None, active=0)
    assert found.balance_loss() == 0
    torch.testing.assert_close(found.gates, 4 * scores.softmax(-1))


def _case(data, dtype: torch.dtype = torch.double, causal: bool = False) -> tuple[list[torch.Tensor], dict]:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    heads, queries = kv_heads * group, data.draw(st.integers(0, 9))
    keys = queries + data.draw(st.integers(0 if queries else 1, 4))
    query = torch.randn(2, heads, queries, 4, dtype=dtype)
    key, value = torch.randn(2, kv_heads, keys, 4, dtype=dtype), torch.randn(2, kv_heads, keys, 3, dtype=dtype)
    gates = torch.randn(2, heads, queries, dtype=dtype)
    share = data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    gates = gates.masked_fill(torch.rand(gates.shape) > share, 0)
    options = {"causal": causal}
    if data.draw(st.booleans()):
        options["mask"] = torch.rand(2, 1, queries, keys) > 0.3
    if data.draw(st.booleans()):
        options["bias"] = torch.randn(data.draw(st.sampled_from([1, heads])), queries, keys, dtype=dtype)
    return [query, key, value, gates], options


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), causal=st.booleans())
def test_what_is_left_out_was_zero(data, causal: bool) -> None:
    inputs, options = _case(data, causal=causal)
    expected = attention(*inputs[:3], backend="reference", **options) * inputs[3][..., None]
    for backend in ("reference", "dense", "gathered", "auto"):
        torch.testing.assert_close(mixture_of_heads_attention(*inputs, backend=backend, **options), expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data(), causal=st.booleans())
def test_all_backends_have_the_same_gradients(data, causal: bool) -> None:
    inputs, options = _case(data, causal=causal)
    found = []
    for backend in ("reference", "dense", "gathered"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = mixture_of_heads_attention(*leaves, backend=backend, **options)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        found.append([torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    assert found[0][3][inputs[3] == 0].eq(0).all()


def test_causal_rows_in_several_blocks(monkeypatch) -> None:
    monkeypatch.setattr(moh, "CAUSAL_ROWS", 3)
    monkeypatch.setattr(moh, "GATHER_KEYS", 1)
    query, key, value = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 44, 8), torch.randn(2, 2, 44, 8)
    gates = torch.ones(2, 4, 40)
    gates[:, 1] = gates[:, 3] = torch.rand(2, 40).lt(0.2).float()
    computed = []
    dense = moh.attention
    monkeypatch.setattr(moh, "attention", lambda q, *args, **kw: computed.append(q.shape[2]) or dense(q, *args, **kw))
    out = mixture_of_heads_attention(query, key, value, gates, causal=True)
    torch.testing.assert_close(out, dense(query, key, value, causal=True) * gates[..., None])
    # Three rows at a time for two heads, and everything for the two that all queries chose.
    assert max(computed[:-1]) == 3
    assert computed[-1] == 40
    assert sum(computed[:-1]) == int(gates[:, 1].sum(-1).max())


def test_gradcheck() -> None:
    query, key = torch.randn(1, 3, 4, 2, dtype=torch.double), torch.randn(1, 3, 4, 2, dtype=torch.double)
    gates = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.double).repeat(1, 3, 1)
    inputs = [x.requires_grad_() for x in (query, key)]
    for backend in ("dense", "gathered"):
        assert torch.autograd.gradcheck(
            lambda q, k, b=backend: mixture_of_heads_attention(q, k, k, gates, backend=b, causal=True), inputs
        )
    scores = torch.randn(3, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: learned_routing(x[:, :3], x[:, 3:4], x[:, 4:], active=2).gates, scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_scores_stay_close(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    found = query_norm_routing(query.to(dtype), shared=1, active=1)
    assert found.gates.dtype == torch.float32
    gates = found.gates.transpose(1, 2)
    expected = mixture_of_heads_attention(query, key, key, gates, backend="reference")
    low = [x.to(dtype) for x in (query, key, key, gates)]
    for backend in ("dense", "gathered"):
        out = mixture_of_heads_attention(*low, backend=backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    for scores in (torch.tensor([[1e4, -1e4, 0.0]]), torch.full((1, 3), -1e4)):
        gates = learned_routing(scores.to(dtype), None, None, active=2).gates
        assert gates.dtype == dtype
        assert gates.isfinite().all()


def test_strided_and_expanded_inputs() -> None:
    query = torch.randn(2, 6, 3, 4).transpose(1, 2)
    key = torch.randn(1, 1, 6, 4).expand(2, 1, 6, 4)
    gates = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0, 0.0]).expand(2, 3, 6)
    expected = mixture_of_heads_attention(query, key, key, gates, backend="reference")
    torch.testing.assert_close(mixture_of_heads_attention(query, key, key, gates, backend="gathered"), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, g: moh.check_routing(4, 5, 0), ValueError, "shared=5 must lie between 0 and heads=4"),
        (lambda q, g: moh.check_routing(4, -1, 1), ValueError, "shared=-1 must lie between"),
        (lambda q, g: moh.check_routing(4, 2, 3), ValueError, "active=3 heads of heads - shared = 2"),
        (lambda q, g: moh.check_routing(4, 2, 0), ValueError, "active=0 would leave 2 of heads=4 unused"),
        (lambda q, g: learned_routing(None, None, None, active=1), ValueError, "both None"),
        (lambda q, g: learned_routing(g, g, None, active=1), ValueError, "balance is for shared and routed"),
        (lambda q, g: query_norm_routing(q, shared=3, active=1), ValueError, "fewer than 2 routed ones"),
        (lambda q, g: mixture_of_heads_attention(q, q, q, g[:, :3]), ValueError, r"gates must be .*\(1, 4, 5\)"),
        (lambda q, g: mixture_of_heads_attention(q, q, q, g, backend="skip"), ValueError, "backend='skip'"),
        (lambda q, g: mixture_of_heads_attention(q, q.double(), q, g), TypeError, "share a dtype"),
    ],
)
def test_bad_input(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(1, 4, 5, 8), torch.ones(1, 4, 5))
