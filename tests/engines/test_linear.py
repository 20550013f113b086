"""The linear engine: every backend against the quadratic equation, gradients, states, packing, bad input."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engines.features import FEATURE_MAPS
from manyheads.engines.linear import linear_attention, linear_attention_step


def _inputs(batch=2, heads=4, tokens=37, head_dim=8, width=6, kv_heads=None, dtype=torch.float64):
    kv_heads = kv_heads or heads
    query = torch.randn(batch, heads, tokens, head_dim, dtype=dtype)
    key = torch.randn(batch, kv_heads, tokens, head_dim, dtype=dtype)
    return query, key, torch.randn(batch, kv_heads, tokens, width, dtype=dtype)


def _decay(kind, batch, heads, tokens, head_dim, dtype=torch.float64):
    shapes = {"head": (heads,), "token": (batch, heads, tokens), "channel": (batch, heads, tokens, head_dim)}
    return None if kind is None else -torch.rand(shapes[kind], dtype=dtype)


def _run(tensors, backend, **options):
    """Output, final state and the gradients of a random functional of both."""
    leaves = {n: None if x is None else x.detach().clone().requires_grad_() for n, x in tensors.items()}
    out, state = linear_attention(**leaves, return_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, state)]
    ((out * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return {
        "out": out,
        "state": state,
        **{f"grad_{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items() if x is not None},
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([None, "head", "token", "channel"]),
    tokens=st.sampled_from([0, 1, 16, 33]),
    groups=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    chunk=st.sampled_from([1, 7, 16, 64]),
    with_state=st.booleans(),
    backend=st.sampled_from(["chunked", "recurrent"]),
    normalize=st.booleans(),
)
def test_backends_agree_with_the_equation(kind, tokens, groups, batch, chunk, with_state, backend, normalize):
    query, key, value = _inputs(batch, 4, tokens, kv_heads=4 // groups)
    state = torch.rand(batch, 4, 8, 6 + normalize, dtype=torch.float64) if with_state else None
    tensors = dict(query=query, key=key, value=value, log_decay=_decay(kind, batch, 4, tokens, 8), initial_state=state)
    options = dict(scale=0.7, normalize=normalize, feature_map="elu" if normalize else None)
    want = _run(tensors, "reference", **options)
    got = _run(tensors, backend, chunk=chunk, **options)
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", [None, "head", "token", "channel"])
@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_packed_sequences_are_separate_sequences(kind, backend):
    query, key, value = _inputs(1, 3, 60)
    lengths = [20, 0, 1, 39]
    cu_seqlens = torch.tensor([0, 20, 20, 21, 60])
    state = torch.randn(4, 3, 8, 6, dtype=torch.float64)
    log_decay = _decay(kind, 1, 3, 60, 8)
    tensors = dict(query=query, key=key, value=value, log_decay=log_decay, initial_state=state)
    want = _run(tensors, "reference", cu_seqlens=cu_seqlens)
    got = _run(tensors, backend, cu_seqlens=cu_seqlens, chunk=16)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")
    start = 0
    for i, length in enumerate(lengths):
        cut = slice(start, start + length)
        gate = log_decay if kind in (None, "head") else log_decay[:, :, cut]
        alone = linear_attention(
            query[:, :, cut], key[:, :, cut], value[:, :, cut], log_decay=gate, initial_state=state[i : i + 1]
        )
        torch.testing.assert_close(got["out"][:, :, cut], alone)
        start += length


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["auto", "recurrent"])
def test_noncausal(packed, backend):
    query, key, value = _inputs(1, 3, 40)
    cu_seqlens = torch.tensor([0, 13, 40]) if packed else None
    state = torch.randn(2 if packed else 1, 3, 8, 6, dtype=torch.float64)
    tensors = dict(query=query, key=key, value=value, initial_state=state)
    want = _run(tensors, "reference", cu_seqlens=cu_seqlens, causal=False)
    got = _run(tensors, backend, cu_seqlens=cu_seqlens, causal=False)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")


def test_noncausal_cross_normalised_is_a_weighted_mean():
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 30, 8), torch.ones(2, 2, 30, 3)
    out = linear_attention(query, key, value, causal=False, normalize=True, feature_map="softmax")
    torch.testing.assert_close(out, torch.ones(2, 4, 5, 3))
    empty = linear_attention(query, key[:, :, :0], value[:, :, :0], causal=False, normalize=True, feature_map="elu")
    assert torch.equal(empty, torch.zeros(2, 4, 5, 3))


@pytest.mark.parametrize("kind", [None, "token", "channel"])
def test_gradcheck(kind):
    query, key, value = (x.requires_grad_() for x in _inputs(1, 2, 5, 3, 2))
    log_decay = _decay(kind, 1, 2, 5, 3)
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    leaves = [query, key, value, state, *([] if log_decay is None else [log_decay.requires_grad_()])]

    def function(query, key, value, state, log_decay=None):
        return linear_attention(
            query, key, value, log_decay=log_decay, initial_state=state, chunk=2, return_state=True, backend="chunked"
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_learned_decay_per_head_gets_its_gradient():
    query, key, value = _inputs(2, 3, 20)
    grads = []
    for backend in ("reference", "chunked"):
        log_decay = torch.tensor([-0.1, -1.0, -0.01], dtype=torch.float64, requires_grad=True)
        linear_attention(query, key, value, log_decay=log_decay, chunk=8, backend=backend).square().sum().backward()
        grads.append(log_decay.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32(dtype):
    query, key, value = (x.to(dtype) for x in _inputs(1, 2, 3000, 16, 16))
    decay = torch.tensor([-(2.0**-8), -0.5])
    out, state = linear_attention(query, key, value, log_decay=decay, return_state=True)
    want, final = linear_attention(
        query.double(), key.double(), value.double(), log_decay=decay.double(), return_state=True, backend="recurrent"
    )
    assert out.dtype == dtype
    assert state.dtype == torch.float32
    torch.testing.assert_close(state.double(), final, rtol=1e-5, atol=1e-4)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=2e-3 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_closed_gates_reset_and_spoil_nothing(kind):
    query, key, value = _inputs(1, 2, 30, dtype=torch.float32)
    log_decay = _decay(kind, 1, 2, 30, 8, torch.float32)
    log_decay[:, :, 10] = -torch.inf
    got = _run(dict(query=query, key=key, value=value, log_decay=log_decay), "chunked")
    fresh = linear_attention(query[:, :, 10:], key[:, :, 10:], value[:, :, 10:], log_decay=log_decay[:, :, 10:])
    torch.testing.assert_close(got["out"][:, :, 10:], fresh)
    assert all(x.isfinite().all() for x in got.values())


def test_strong_decay_and_huge_logits_stay_finite():
    query, key, value = (x.float() for x in _inputs(1, 2, 500))
    got = _run(
        dict(query=query * 1e4, key=key, value=value, log_decay=torch.tensor([-80.0, -1e-3]).expand(1, 2).reshape(2)),
        "chunked",
    )
    assert all(x.isfinite().all() for x in got.values())
    torch.testing.assert_close(
        got["out"][:, 0], ((query * 1e4 * key).sum(-1, keepdim=True) * value)[:, 0], rtol=1e-4, atol=1e-2
    )


def test_non_contiguous_and_expanded_inputs():
    x = torch.randn(2, 33, 4, 8, dtype=torch.float64)
    query, key = x.transpose(1, 2), x[:1].expand(2, -1, -1, -1).transpose(1, 2)
    value = torch.randn(2, 1, 1, 6, dtype=torch.float64).expand(-1, 4, 33, -1)
    tensors = dict(query=query, key=key, value=value, log_decay=torch.full((4,), -0.1, dtype=torch.float64))
    want = _run(tensors, "reference")
    leaves = {n: t.detach() for n, t in tensors.items()}
    for name, tensor in leaves.items():
        torch.testing.assert_close(tensor, tensors[name])
    torch.testing.assert_close(linear_attention(**tensors, chunk=16), want["out"])
    torch.testing.assert_close(
        linear_attention(**{n: t.contiguous() for n, t in tensors.items()}, chunk=16), want["out"]
    )


def test_many_heads_are_worked_on_in_groups():
    tensors = dict(zip(("query", "key", "value"), _inputs(2, 37, 20)), log_decay=-torch.rand(37, dtype=torch.float64))
    want, got = (_run(tensors, backend, chunk=8) for backend in ("reference", "chunked"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", [None, "head", "token", "channel"])
def test_steps_continue_a_prefill(kind):
    query, key, value = _inputs(2, 4, 20, kv_heads=2)
    log_decay = _decay(kind, 2, 4, 20, 8)

    def gate(cut):
        return log_decay if kind in (None, "head") else log_decay[:, :, cut]

    options = dict(feature_map="elu", normalize=True, scale=0.5)
    want = linear_attention(query, key, value, log_decay=log_decay, backend="reference", **options)
    head = slice(0, 17)
    _, state = linear_attention(
        query[:, :, head], key[:, :, head], value[:, :, head], log_decay=gate(head), return_state=True, **options
    )
    before = state.clone()
    for cut in (slice(17, 18), slice(18, 20)):
        out, new = linear_attention_step(
            query[:, :, cut], key[:, :, cut], value[:, :, cut], state, log_decay=gate(cut), **options
        )
        torch.testing.assert_close(out, want[:, :, cut])
        assert torch.equal(state, before)
        state, before = new, new.clone()


@pytest.mark.parametrize("name", sorted(FEATURE_MAPS))
def test_feature_maps(name):
    x = torch.randn(2, 3, 10, 4)
    got = linear_attention(x, x, x, feature_map=name)
    torch.testing.assert_close(got, linear_attention(x, x, x, feature_map=FEATURE_MAPS[name], backend="reference"))


def test_taylor_is_the_second_order_expansion():
    q, k = torch.randn(5, 8), torch.randn(7, 8)
    s = q @ k.T / 8**0.5
    torch.testing.assert_close(FEATURE_MAPS["taylor"](q) @ FEATURE_MAPS["taylor"](k).T, 1 + s + s**2 / 2)


@pytest.mark.parametrize("kind", [None, "head", "token"])
def test_compiles_without_graph_breaks(compiling, kind):
    query, key, value = _inputs(1, 2, 40, dtype=torch.float32)
    log_decay = _decay(kind, 1, 2, 40, 8, torch.float32)
    state = torch.randn(1, 2, 8, 6)

    def function(query, key, value, state):
        out, final = linear_attention(
            query, key, value, log_decay=log_decay, initial_state=state, chunk=16, return_state=True
        )
        return out.sum() + final.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        leaves = [x.clone().requires_grad_() for x in (query, key, value, state)]
        loss = run(*leaves)
        loss.backward()
        results.append([loss, *(x.grad for x in leaves)])
    torch.testing.assert_close(*results)


def test_operator_is_registered_correctly(compiling):
    query, key, value = (x.requires_grad_() for x in _inputs(2, 2, 20))
    from manyheads.engines.linear_chunked import chunked

    for packed in (None, torch.tensor([0, 5, 20])):
        q, k, v = (
            (query, key, value) if packed is None else (x[:1].detach().requires_grad_() for x in (query, key, value))
        )
        torch.library.opcheck(chunked, (q, k, v, -torch.rand(2).double(), None, packed, 0.5, 8, True, True))


@pytest.fixture
def unchecked():
    """Without the run-time shape checks, so that the function's own messages are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


BAD = {
    "width": (lambda t: dict(t, key=t["key"][..., :4]), ValueError, "head_dim 8 but key has 4"),
    "length": (lambda t: dict(t, value=t["value"][:, :, :3]), ValueError, "key has"),
    "heads": (lambda t: dict(t, key=t["key"][:, :3], value=t["value"][:, :3]), ValueError, "must divide"),
    "integer": (lambda t: dict(t, query=t["query"].long()), TypeError, "floating-point"),
    "causal cross": (
        lambda t: dict(t, key=t["key"][:, :, :3], value=t["value"][:, :, :3]), ValueError, "as many keys as queries"),
    "decay shape": (lambda t: dict(t, log_decay=torch.zeros(3)), ValueError, r"log_decay .*got torch.float32 \(3,\)"),
    "growth": (lambda t: dict(t, log_decay=torch.full((4,), 0.5)), ValueError, "<= 0"),
    "nan": (lambda t: dict(t, log_decay=torch.full((4,), torch.nan)), ValueError, "<= 0"),
    "decay noncausal": (lambda t: dict(t, log_decay=-torch.ones(4), causal=False), ValueError, "causal=True"),
    "state shape": (lambda t: dict(t, initial_state=torch.zeros(2, 4, 6, 8)), ValueError, r"\(2, 4, 8, 6\)"),
    "state dtype": (lambda t: dict(t, initial_state=torch.zeros(2, 4, 8, 6).half()), TypeError, "float32"),
    "packed batch": (lambda t: dict(t, cu_seqlens=torch.tensor([0, 37])), ValueError, "batch of 1"),
    "chunk": (lambda t: dict(t, chunk=0), ValueError, "chunk must be at least 1"),
    "backend": (lambda t: dict(t, backend="cuda"), ValueError, "'triton'"),
    "feature map": (lambda t: dict(t, feature_map="sin"), ValueError, "'elu'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(unchecked, name):
    change, error, message = BAD[name]
    tensors = dict(zip(("query", "key", "value"), _inputs(dtype=torch.float32)))
    with pytest.raises(error, match=message):
        linear_attention(**change(tensors))


@pytest.mark.parametrize("borders", [[1, 37], [0, 36], [0, 20, 10, 37], [[0, 37]]])
def test_bad_borders_are_refused(unchecked, borders):
    query, key, value = _inputs(1)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        linear_attention(query, key, value, cu_seqlens=torch.tensor(borders))
