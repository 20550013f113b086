"""The dense engine: every backend against the equations, gradients, packed batches, extremes, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from manyheads.engines import dense_blocked
from manyheads.engines.dense import NORMALIZERS, attention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def draw(*shape: int, dtype=torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def has_lse(normalizer: str) -> bool:
    return normalizer.startswith("softmax") or normalizer.endswith("_l1")


def outputs_and_grads(inputs: list[torch.Tensor], lse: bool, *args, **options) -> list[torch.Tensor]:
    result = attention(*args, return_lse=lse, **options)
    out, log = result if lse else (result, None)
    weights = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float32)[: out.numel()].view_as(out)
    loss = (out.to(weights.dtype if out.dtype != torch.float64 else out.dtype) * weights).sum()
    if log is not None:
        loss = loss + torch.where(log == -math.inf, 0, log).sin().sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * len(inputs)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs)]
    return [out, *([] if log is None else [log]), *grads]


@st.composite
def problems(draw_):
    pick = lambda *options: draw_(st.sampled_from(options))  # noqa: E731
    torch.manual_seed(draw_(st.integers(0, 1000)))
    batch, kv_heads, groups = pick(1, 2), pick(1, 2), pick(1, 3)
    queries, keys, width = pick(0, 1, 2, 5, 17), pick(0, 1, 4, 17, 19), pick(4, 8)
    dtype = pick(torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
    full = (batch, kv_heads * groups, queries, keys)
    some = lambda: [pick(1, size) for size in full]  # noqa: E731
    mask = pick(None, torch.rand(some()) > 0.4, lambda b, h, i, j: (i * 7 + j * 3 + h) % 4 > 1)
    bias = pick(None, draw(*some(), dtype=pick(dtype, torch.float32), grad=True))
    q = draw(batch, kv_heads * groups, queries, width, dtype=dtype, grad=True)
    k = draw(batch, kv_heads, keys, width, dtype=dtype, grad=True)
    v = draw(batch, kv_heads, keys, pick(width, 3, 11), dtype=dtype, grad=True)
    return q, k, v, {"mask": mask, "bias": bias, "causal": pick(False, True), "scale": pick(None, 0.3)}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(problem=problems(), normalizer=st.sampled_from(["softmax"] * 6 + list(NORMALIZERS)), lse=st.booleans())
def test_backends_agree(problem, normalizer, lse):
    q, k, v, options = problem
    lse = lse and has_lse(normalizer)
    inputs = [t for t in (q, k, v, options["bias"]) if t is not None]
    expected = outputs_and_grads(inputs, lse, q, k, v, normalizer=normalizer, backend="reference", **options)
    backends = ["blocked", "auto"] + (["sdpa"] if normalizer == "softmax" and not lse else [])
    for backend in backends:
        found = outputs_and_grads(inputs, lse, q, k, v, normalizer=normalizer, backend=backend, **options)
        for a, b in zip(found, expected):
            assert a.dtype == b.dtype
            tolerance = max(TOLERANCE[q.dtype], TOLERANCE[a.dtype])
            torch.testing.assert_close(a, b, atol=tolerance * (1 + b.abs().max().item() if b.isfinite().all() and b.numel() else 1), rtol=tolerance)  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(300, 300), (70, 500), (500, 70)])
def test_several_tiles_give_what_one_gives(monkeypatch, causal, lengths):
    q, k, v = draw(2, 4, lengths[0], 8, grad=True), *(draw(2, 2, lengths[1], 8, grad=True) for _ in range(2))
    bias, mask = draw(1, 4, lengths[0], lengths[1], grad=True), torch.rand(2, 1, *lengths) > 0.3
    options = {"bias": bias, "mask": mask, "causal": causal}
    expected = outputs_and_grads([q, k, v, bias], True, q, k, v, backend="reference", **options)
    monkeypatch.setattr(dense_blocked, "TILE", 1 << 14)
    assert len(list(dense_blocked._tiles(q, k))) > 8
    for a, b in zip(outputs_and_grads([q, k, v, bias], True, q, k, v, backend="blocked", **options), expected):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradients_match_finite_differences(normalizer):
    q, k, v = draw(1, 2, 3, 4, dtype=torch.float64, grad=True), *(draw(1, 1, 4, 4, dtype=torch.float64, grad=True) for _ in range(2))  # fmt: skip  # noqa: E501
    bias = draw(2, 1, 4, dtype=torch.float64, grad=True)
    mask = torch.tensor([[True, False, True, True], [True] * 4, [False] * 4])

    def run(q, k, v, bias):
        options = {"mask": mask, "normalizer": normalizer, "return_lse": has_lse(normalizer), "backend": "blocked"}
        result = attention(q, k, v, bias=bias, **options)
        return (result[0], torch.where(result[1] == -math.inf, 0, result[1])) if has_lse(normalizer) else result

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


def test_softmax_is_torch_softmax_and_plus_one_adds_one():
    q, k, v = draw(1, 2, 5, 8), draw(1, 2, 7, 8), draw(1, 2, 7, 8)
    scores = q @ k.transpose(-2, -1) * 8**-0.5
    torch.testing.assert_close(attention(q, k, v), scores.softmax(-1) @ v, atol=1e-6, rtol=1e-5)
    weights = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
    out, lse = attention(q, k, v, normalizer="softmax_plus_one", return_lse=True)
    torch.testing.assert_close(out, weights @ v, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, (1 + scores.exp().sum(-1)).log())
    weights = F.softplus(scores)
    expected = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(attention(q, k, v, normalizer="softplus_l1"), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "auto"])
def test_causal_is_aligned_at_the_last_query_and_rows_without_keys_give_zeros(backend):
    q, k = draw(1, 1, 5, 8), draw(1, 1, 3, 8)
    out = attention(q, k, k, causal=True, backend=backend)
    assert (out[:, :, :2] == 0).all()
    torch.testing.assert_close(out[:, :, 2], k[:, :, 0])
    torch.testing.assert_close(out[:, :, 4:], attention(q[:, :, 4:], k, k, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_rows_without_keys_have_lse_minus_infinity_and_no_gradient(backend):
    q, k, v = (draw(1, 2, 4, 8, grad=True) for _ in range(3))
    mask = torch.tensor([True, True, False, True])[:, None]
    out, lse = attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    assert (lse[:, :, 2] == -math.inf).all()
    assert lse[:, :, [0, 1, 3]].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert (grads[0][:, :, 2] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_scores_of_ten_thousand_stay_finite(dtype, backend):
    q, k = (draw(1, 2, 6, 16, dtype=dtype) * 50).requires_grad_(), draw(1, 2, 6, 16, dtype=dtype, grad=True)
    v = draw(1, 2, 6, 16, dtype=dtype, grad=True)
    out = attention(q, k, v, scale=20.0, backend=backend)
    assert (20 * q.float() @ k.float().transpose(-2, -1)).abs().max() > 4000
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().sum(), (q, k, v))))
    exact = attention(q.double(), k.double(), v.double(), scale=20.0, backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_strides_do_not_matter(backend):
    q, k = draw(2, 6, 4, 8).transpose(1, 2), draw(2, 1, 5, 8).expand(2, 4, 5, 8)
    v = draw(2, 2, 8, 5).transpose(2, 3)
    dense = [t.contiguous() for t in (q, k[:, :2], v)]
    torch.testing.assert_close(attention(q, k[:, :2], v, backend=backend), attention(*dense, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "auto"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_batch_gives_what_its_sequences_give(backend, causal):
    lengths, key_lengths = [3, 0, 1, 5], [4, 2, 0, 5]
    cu, cu_key = (torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths, key_lengths))
    q, k, v = draw(1, 4, 9, 8), draw(1, 2, 11, 8), draw(1, 2, 11, 8)
    bias, mask = draw(4, 9, 11), torch.rand(9, 11) > 0.2
    out = attention(q, k, v, bias=bias, mask=mask, cu_seqlens=cu, cu_seqlens_key=cu_key, causal=causal, backend=backend)
    by_rule = attention(q, k, v, bias=bias, mask=lambda b, h, i, j: mask[i, j], cu_seqlens=cu, cu_seqlens_key=cu_key,
                        causal=causal, backend=backend)  # fmt: skip
    for i, j, m, n in zip(cu[:-1], cu[1:], cu_key[:-1], cu_key[1:]):
        options = {"bias": bias[:, i:j, m:n], "mask": mask[i:j, m:n], "causal": causal, "backend": "reference"}
        alone = attention(q[:, :, i:j], k[:, :, m:n], v[:, :, m:n], **options)
        torch.testing.assert_close(out[:, :, i:j], alone)
        torch.testing.assert_close(by_rule[:, :, i:j], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_from_a_cache_continues_the_full_pass(dtype, queries):
    q, k, v = draw(2, 6, 40, 8, dtype=dtype), draw(2, 2, 64, 8, dtype=dtype), draw(2, 2, 64, 8, dtype=dtype)
    k, v = k[:, :, :40], v[:, :, :40]  # the filled part of a longer, preallocated cache
    full = attention(q, k, v, causal=True, backend="reference")
    step = attention(q[:, :, -queries:], k, v, causal=True)
    torch.testing.assert_close(step, full[:, :, -queries:], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_in_one_graph(packed):
    cu = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None

    def run(q, k, v, bias):
        out, lse = attention(q, k, v, bias=bias, causal=True, cu_seqlens=cu, return_lse=True)
        plain = attention(q, k, v, causal=True, mask=lambda b, h, i, j: j % 3 < 2, cu_seqlens=cu)
        return out.sum() + lse.exp().sum() + plain.square().sum()

    inputs = [draw(1, 4, 9, 8, grad=True), draw(1, 2, 9, 8, grad=True), draw(1, 2, 9, 8, grad=True), draw(4, 9, 9, grad=True)]  # fmt: skip  # noqa: E501
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("compiling")
def test_the_custom_operator_is_registered_correctly():
    q, k, v, bias = draw(1, 4, 3, 8, grad=True), draw(1, 2, 5, 8, grad=True), draw(1, 2, 5, 6, grad=True), draw(1, 4, 1, 5, grad=True)  # fmt: skip  # noqa: E501
    mask = torch.rand(1, 1, 3, 5) > 0.3
    for normalizer in ("softmax", "relu_l1"):
        torch.library.opcheck(dense_blocked.dense_forward, (q, k, v, mask, bias, True, 0.3, normalizer))
        torch.library.opcheck(dense_blocked.dense_forward, (q, k, v, None, None, False, 0.3, normalizer))


def test_training_with_a_bias_keeps_no_matrix_of_scores(monkeypatch):
    saved = []
    monkeypatch.setattr(dense_blocked, "TILE", 1 << 14)
    q, k, v = (draw(1, 2, 512, 8, grad=True) for _ in range(3))
    bias = draw(1, 2, 1, 512, grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = attention(q, k, v, bias=bias)
    assert sum(saved) < 6 * q.numel()
    out.sum().backward()
    expected = torch.autograd.grad(attention(q, k, v, bias=bias, backend="reference").sum(), bias)[0]
    torch.testing.assert_close(bias.grad, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
def test_flex_gives_the_reference():
    q, k, v = draw(1, 4, 130, 16), draw(1, 2, 130, 16), draw(1, 2, 130, 16)
    bias, mask = draw(1, 4, 130, 130), torch.rand(1, 1, 130, 130) > 0.2
    for options in ({"causal": True, "bias": bias}, {"mask": mask}):
        found = attention(q, k, v, backend="flex", **options)
        torch.testing.assert_close(found, attention(q, k, v, backend="reference", **options), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "fast"}, ValueError, "backend='fast'"),
        ({"normalizer": "max"}, ValueError, "normalizer='max'"),
        ({"mask": torch.ones(4, 3, dtype=torch.bool)}, ValueError, r"mask of shape \(4, 3\)"),
        ({"mask": torch.ones(3, 5)}, TypeError, "mask must be boolean"),
        ({"mask": lambda b, h, i, j: i - j}, TypeError, "boolean"),
        ({"bias": torch.ones(2, 2, 2, 3, 5)}, ValueError, "bias of shape"),
        ({"bias": torch.ones(3, 5, dtype=torch.int64)}, TypeError, "bias must be a floating-point"),
        ({"normalizer": "relu", "return_lse": True}, ValueError, "no normalising sum"),
        ({"return_lse": True, "backend": "sdpa"}, ValueError, "without its log-sum-exp"),
        ({"normalizer": "relu", "backend": "flex"}, ValueError, "computes softmax"),
        ({"return_lse": True, "backend": "flex"}, ValueError, "no log-sum-exp on CPU"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "batch size 1"),
        ({"cu_seqlens_key": torch.tensor([0, 3])}, ValueError, "without cu_seqlens"),
    ],
)
def test_bad_input_is_named(options, error, words):
    q, k = draw(2, 2, 3, 8), draw(2, 2, 5, 8)
    with pytest.raises(error, match=words):
        attention(q, k, k, **options)


@pytest.mark.parametrize("lengths", [[0, 2], [1, 3], [0, 2, 1, 3], [0]])
def test_bad_cumulative_lengths_are_named(lengths):
    q = draw(1, 2, 3, 8)
    with pytest.raises(ValueError, match="cumulative lengths must rise from 0 to the 3"):
        attention(q, q, q, cu_seqlens=torch.tensor(lengths, dtype=torch.int32))


def test_flex_on_cpu_says_that_it_cannot_train():
    q = draw(1, 2, 3, 8, grad=True)
    with pytest.raises(ValueError, match="no backward on CPU"):
        attention(q, q, q, backend="flex")
