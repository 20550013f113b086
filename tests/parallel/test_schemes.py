"""Every scheme on real processes equals one process: outputs, log-sum-exps, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from manyheads import parallel
from manyheads.engines.dense import attention
from manyheads.engines.linear import linear_attention
from tests.parallel.rank_cases import linear_case, meshes, softmax_case

SCHEMES = ("ring_self_attention", "token_ring", "lasp2h")
PACK = [0, 3, 3, 16, 24]
SOFTMAX = {
    "bidirectional": dict(batch=2),
    "grouped heads, another value width": dict(heads=4, value_width=6),
    "cross": dict(keys=40, kv_heads=1),
    "zigzag": dict(causal=True, layout="zigzag", heads=4),
    "striped": dict(causal=True, layout="striped", batch=2),
    "three ranks": dict(causal=True, layout="zigzag", world=3),
    "two ranks": dict(causal=True, layout="striped", world=2, heads=4),
    "packed": dict(cu_seqlens=PACK),
    "packed cross": dict(cu_seqlens=PACK, cu_seqlens_key=[0, 10, 11, 12, 20], keys=20),
    "packed zigzag": dict(causal=True, layout="zigzag", cu_seqlens=PACK),
    "packed striped": dict(causal=True, layout="striped", cu_seqlens=PACK),
    "each sequence laid out": dict(causal=True, layout="zigzag", cu_seqlens=[0, 8, 24], per_sequence=True),
    "padded keys": dict(batch=2, masked=7, kv_heads=1),
    "padded zigzag": dict(causal=True, layout="zigzag", masked=7),
    "nothing to see": dict(masked=24),
    "one token a rank": dict(tokens=4, causal=True, layout="striped"),
    "no tokens": dict(tokens=0),
    "logits of 1e4": dict(peak=60.0, width=4, scale=1.0, dtype="float64"),
    "float64": dict(causal=True, layout="zigzag", dtype="float64"),
    "two sequences": dict(causal=True, layout="zigzag", cu_seqlens=[0, 16, 32], tokens=32),
    "window": dict(causal=True, layout="zigzag", window=5, heads=4, batch=2, masked=7, dtype="float64"),
    "window of many tiles": dict(causal=True, layout="zigzag", tokens=800, window=90, dtype="float64"),
    "window, striped": dict(causal=True, layout="striped", window=3, dtype="float64"),
    "packed window": dict(causal=True, layout="striped", window=4, cu_seqlens=PACK, dtype="float64"),
    "only the own key": dict(causal=True, layout="zigzag", window=1, dtype="float64"),
    "soft cap": dict(causal=True, layout="zigzag", softcap=1.5, heads=4, batch=2, masked=24, dtype="float64"),
    "soft cap and window": dict(causal=True, layout="striped", softcap=2.0, window=9, heads=4, dtype="float64"),
}


def limits(dtype: str) -> float:
    return {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}[dtype]


def check(results, limit: float) -> None:
    errors = [result["errors"] for result in results if result is not None]
    assert errors
    worst = {name: max(e.get(name, 0.0) for e in errors) for name in {n for e in errors for n in e}}
    assert max(worst.values()) <= limit, worst


@pytest.mark.parametrize("case", SOFTMAX)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_softmax_schemes(four_ranks, scheme, case):
    options = SOFTMAX[case]
    # The rounding of the scores themselves grows with them.
    limit = 1e-10 if "peak" in options else limits(options.get("dtype", "float32"))
    check(four_ranks.run(_softmax, scheme, options), limit)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contiguous_causal(four_ranks, scheme):
    if scheme == "token_ring":
        with pytest.raises(RuntimeError, match="take 'zigzag'"):
            four_ranks.run(_softmax, scheme, dict(causal=True))
    else:
        check(four_ranks.run(_softmax, scheme, dict(causal=True, kv_heads=1)), 2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_accumulates_in_float32(four_ranks, scheme, dtype):
    results = four_ranks.run(_softmax, scheme, dict(causal=True, layout="zigzag", dtype=dtype, tokens=64))
    check(results, limits(dtype))
    # The log-sum-exp never passes through half precision.
    assert max(result["errors"]["lse"] for result in results) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_of_1e4_stay_finite_in_half_precision(four_ranks, scheme):
    options = dict(peak=60.0, width=4, scale=1.0, dtype="bfloat16", causal=True, layout="zigzag")
    assert all(result["errors"]["lse"] < 1e-3 for result in four_ranks.run(_softmax, scheme, options))


def test_partial_outputs_may_travel_in_float32(four_ranks):
    options = dict(causal=True, layout="zigzag", dtype="bfloat16", tokens=64)
    rounded = four_ranks.run(_softmax, "token_ring", options)
    wide = four_ranks.run(_softmax, "token_ring", options | {"float32_outputs": True})
    sent = [[r["log"].sent(call="token_ring", what="output") for r in results] for results in (rounded, wide)]
    assert all(a < b for a, b in zip(*sent))
    assert sum(r["errors"]["out"] for r in wide) <= sum(r["errors"]["out"] for r in rounded)


LINEAR = {
    "no decay": {},
    "constant decay, grouped heads": dict(gates="constant", kv_heads=1),
    "learned decay": dict(gates="learned"),
    "gate per token": dict(gates="token", tokens=8),
    "gate per channel": dict(gates="channel"),
    "noncausal": dict(causal=False),
    "normalised": dict(normalize=True, gates="token"),
    "feature map": dict(normalize=True, causal=False, feature_map="elu"),
    "states in and out": dict(state=True, gates="constant"),
    "states and gates": dict(state=True, gates="channel"),
    "noncausal state": dict(state=True, causal=False),
    "packed": dict(batch=1, cu_seqlens=PACK),
    "packed at the ranks' borders": dict(batch=1, cu_seqlens=[0, 6, 18, 24], gates="constant"),
    "packed with gates": dict(batch=1, cu_seqlens=[0, 1, 2, 3, 19, 24], gates="channel"),
    "ragged": dict(ragged=[5, 0, 1, 18], gates="constant"),
    "ragged gates": dict(ragged=[5, 0, 1, 18], gates="token"),
    "two ranks": dict(world=2, gates="constant"),
    "no tokens": dict(tokens=0),
    "float64": dict(dtype="float64", gates="token"),
}


@pytest.mark.parametrize("case", LINEAR)
def test_lasp2(four_ranks, case):
    options = LINEAR[case]
    check(four_ranks.run(_linear, "lasp2", options), limits(options.get("dtype", "float32")))


@pytest.mark.parametrize("gates", ["none", "constant", "channel"])
def test_lasp(four_ranks, gates):
    check(four_ranks.run(_linear, "lasp", dict(gates=gates)), 2e-5)


def test_lasp2_half_precision(four_ranks):
    check(four_ranks.run(_linear, "lasp2", dict(dtype="bfloat16", gates="constant")), 2e-2)


@pytest.mark.parametrize("reduction", ["reduce_scatter", "all_reduce"])
def test_the_papers_own_rings(four_ranks, reduction):
    for options in (dict(), dict(causal=True), dict(masked=7)):
        check(four_ranks.run(_rsa, reduction, options), 2e-5)


def test_linformer_and_ulysses(four_ranks):
    check(four_ranks.run(_linformer), 2e-5)
    check(four_ranks.run(_ulysses, "contiguous", False), 2e-5)
    check(four_ranks.run(_ulysses, "zigzag", True), 2e-5)


def test_a_second_group_works_beside_the_first(four_ranks):
    assert max(four_ranks.run(_two_groups)) < 1e-5


def test_the_linear_moe_layer_is_the_same_when_sharded(four_ranks):
    assert max(four_ranks.run(_layer)) < 1e-5


def test_one_rank_needs_no_messages(one_rank):
    query, key, value = torch.randn(3, 2, 2, 6, 8).unbind()
    with parallel.record() as log:
        for name in SCHEMES:
            out = getattr(parallel, name)(query, key, value, causal=False)
            torch.testing.assert_close(out, attention(query, key, value))
        torch.testing.assert_close(parallel.lasp2(query, key, value), linear_attention(query, key, value))
        torch.testing.assert_close(parallel.rsa_attention(query, key, value), attention(query, key, value))
    assert log.messages == []


@pytest.mark.parametrize("name", ["ring_self_attention", "token_ring", "lasp2h", "rsa_attention", "lasp2", "lasp"])
def test_gradients_in_float64(one_rank, name):
    tensors = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(getattr(parallel, name), tensors)


def test_compiled_models_break_the_graph_and_agree(one_rank, compiling):
    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind()

    def model(q):
        return parallel.ring_self_attention(q * 2, key, value, causal=True) + 1

    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(query), model(query))


def test_the_layer_loads_published_names():
    layer = parallel.LinearMoEAttention(32, 4)
    state = layer.state_dict()
    state["core_linear_attention.la_output_norm.weight"] = state.pop("output_norm.weight") * 3
    layer.load_state_dict(state)
    assert layer.output_norm.weight[0] == 3
    with pytest.raises(ValueError, match="heads=5 must divide"):
        parallel.LinearMoEAttention(32, 5)


def _softmax(scheme, options):
    return softmax_case(scheme, **options)


def _linear(scheme, options):
    return linear_case(scheme, **options)


def _gap(got, want):
    return float((got - want).abs().max() / want.abs().max())


def _whole(*shape):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(4)]


def _compare(run, cut, wholes, grad, want):
    (want * grad).sum().backward()
    locals_ = [cut(t).detach().clone().requires_grad_() for t in wholes]
    out = run(*locals_)
    (out * cut(grad)).sum().backward()
    errors = {"out": _gap(out, cut(want))}
    errors |= {n: _gap(a.grad, cut(b.grad)) for n, a, b in zip(("query", "key", "value"), locals_, wholes)}
    return {"errors": errors}


def _rsa(reduction, options):
    query, key, value, grad = _whole(2, 4, 24, 8)
    wholes = [query.requires_grad_(), key[:, :2].clone().requires_grad_(), value[:, :2].clone().requires_grad_()]
    masked, causal = options.get("masked"), options.get("causal", False)
    mask = None if masked is None else torch.arange(24).expand(2, -1) < 24 - masked
    want = attention(*wholes, causal=causal, mask=None if mask is None else mask[:, None, None])
    return _compare(
        lambda *t: parallel.rsa_attention(*t, causal=causal, key_mask=mask, reduction=reduction, timeout=20),
        lambda t: t.chunk(4, 2)[dist.get_rank()], wholes, grad, want,
    )  # fmt: skip


def _linformer():
    query, key, value, grad = _whole(2, 4, 24, 8)
    wholes = [t.requires_grad_() for t in (query, key, value)]
    first, second = _whole(5, 24)[:2]
    want = attention(query, first @ key, second @ value)
    rank = dist.get_rank()
    return _compare(
        lambda *t: parallel.rsa_linformer(*t, first.chunk(4, 1)[rank], second.chunk(4, 1)[rank], timeout=20),
        lambda t: t.chunk(4, 2)[rank], wholes, grad, want,
    )  # fmt: skip


def _ulysses(layout, causal):
    query, key, value, grad = _whole(2, 4, 24, 8)
    wholes = [query.requires_grad_(), key[:, :2].clone().requires_grad_(), value[:, :2].clone().requires_grad_()]
    want, (ulysses, ring) = attention(*wholes, causal=causal), meshes()
    return _compare(
        lambda *t: parallel.ulysses_ring_attention(
            *t, ulysses_group=ulysses, ring_group=ring, layout=layout, causal=causal, timeout=20
        ),
        lambda t: parallel.shard(t, dist.get_rank(), 4, dim=2, layout=layout, ulysses=2), wholes, grad, want,
    )  # fmt: skip


def _two_groups():
    group, _ = meshes()
    query, key, value, _ = _whole(2, 2, 8, 4)
    pair, place = divmod(dist.get_rank(), 2)
    query = query + pair  # the two groups hold different sequences
    cut = [parallel.shard(t, place, 2, dim=2) for t in (query, key, value)]
    out = parallel.token_ring(*cut, group=group, timeout=20)
    return _gap(out, parallel.shard(attention(query, key, value), place, 2, dim=2))


def _layer():
    torch.manual_seed(0)
    decay = torch.tensor([-0.5, -0.1])
    whole = parallel.LinearMoEAttention(8, 2, log_decay=decay)
    sharded = parallel.LinearMoEAttention(8, 2, log_decay=decay, group=dist.group.WORLD)
    sharded.load_state_dict(whole.state_dict())
    x = torch.randn(2, 12, 8)
    cut = lambda t: t.chunk(4, 1)[dist.get_rank()]  # noqa: E731
    want, out = whole(x), sharded(cut(x))
    want.square().sum().backward()
    out.square().sum().backward()
    summed = sharded.qkv_proj.weight.grad.clone()
    dist.all_reduce(summed)
    return max(_gap(out, cut(want)), _gap(summed, whole.qkv_proj.weight.grad))
