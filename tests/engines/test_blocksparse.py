"""Block-sparse attention: every backend against the dense equation, its edges, its memory, torch.compile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engines.blocksparse import blocksparse_attention
from manyheads.engines.blocksparse_plan import BlockPlan, TableBias


def make(batch=2, heads=4, key_heads=2, queries=50, keys=61, dim=8, value_dim=8, dtype=torch.float64):
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, requires_grad=True)
    key = torch.randn(batch, key_heads, keys, dim, dtype=dtype, requires_grad=True)
    value = torch.randn(batch, key_heads, keys, value_dim, dtype=dtype, requires_grad=True)
    return query, key, value


def random_plan(lead, queries, keys, query_block, key_block, density=0.4):
    return BlockPlan.from_mask(
        torch.rand(*lead, -(-queries // query_block), -(-keys // key_block)) < density,
        query_block=query_block,
        key_block=key_block,
    )


def everything(backend, query, key, value, plan, wanted=(), **options):
    """Output, log-sum-exp and the gradients of a loss in which both take part."""
    out, lse = blocksparse_attention(query, key, value, plan, return_lse=True, backend=backend, **options)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    loss = loss + (torch.where(lse.isinf(), 0, lse) * torch.linspace(1, -1, lse.numel()).view_as(lse)).sum()
    return out, lse, *torch.autograd.grad(loss, [query, key, value, *wanted])


def assert_same(got, want, **tolerance):
    for have, should in zip(got, want, strict=True):
        torch.testing.assert_close(have, should, **tolerance)


def odd_predicate(batch, head, query, key):
    return ((query * 3 + key * 5 + head + batch) % 4 > 0) & (key <= query + 11)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lead=st.sampled_from(["all", "head", "both", "batch"]),
    bias=st.sampled_from([None, "dense", "table"]),
    predicate=st.booleans(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_tiles_and_dense_follow_the_equation(lead, bias, predicate, sizes, seed) -> None:
    torch.manual_seed(seed)
    queries, keys, query_block, key_block = sizes
    query, key, value = make(queries=queries, keys=keys)
    axes = {"all": (), "head": (4,), "both": (2, 4), "batch": (2, 1)}[lead]
    plan = random_plan(axes, queries, keys, query_block, key_block)
    table = torch.randn(4, 21, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(4, 1, keys, dtype=torch.float64, requires_grad=True)
    given_bias = {None: None, "dense": dense, "table": TableBias(table, lambda i, j: (j - i).clamp(-10, 10) + 10)}[bias]
    wanted = {None: [], "dense": [dense], "table": [table]}[bias]
    options = {"bias": given_bias, "predicate": odd_predicate if predicate else None}
    want = everything("reference", query, key, value, plan, wanted, **options)
    for backend in ("tiles", "auto", *(["dense"] if lead == "all" else [])):
        assert_same(everything(backend, query, key, value, plan, wanted, **options), want)


@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("lead", [(), (4,)])
def test_gradients_are_the_derivatives(lead, value_dim) -> None:
    query, key, value = make(1, 4, 2, 7, 9, 3 if value_dim == 8 else 8, value_dim)
    plan = random_plan(lead, 7, 9, 3, 2, 0.7)
    bias = torch.randn(1, 1, 7, 9, dtype=torch.float64, requires_grad=True)

    def attend(*tensors):
        out, lse = blocksparse_attention(
            *tensors[:3], plan, predicate=odd_predicate, bias=tensors[3], return_lse=True, backend="tiles"
        )
        return out, torch.where(lse.isinf(), 0, lse)

    assert torch.autograd.gradcheck(attend, (query, key, value, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_and_views(dtype) -> None:
    wide = [t.detach() for t in make(dtype=torch.float32)]
    plan = random_plan((), 50, 61, 8, 16, 0.6)
    bias = torch.randn(4, 50, 61)
    half = [tensor.to(dtype).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in wide]
    want = everything("reference", *(t.detach().float().requires_grad_() for t in half), plan, bias=bias)
    got = everything("tiles", *half, plan, bias=bias)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}[dtype]
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for have, should in zip(got, want, strict=True):
        finite = should.isfinite()
        assert (have.isfinite() == finite).all()
        scale = should[finite].abs().max()
        assert (have.float() - should)[finite].abs().max() <= tolerance * scale


def test_expanded_inputs() -> None:
    query, key, _ = make(1, 2, 1, 20, 20, dtype=torch.float32)
    query = query.detach().expand(3, -1, -1, -1)
    key = key.detach()[:, :, :1].expand(3, -1, 20, -1)
    plan = random_plan((), 20, 20, 4, 4, 0.7)
    want = blocksparse_attention(query, key, key, plan, backend="reference")
    torch.testing.assert_close(blocksparse_attention(query, key, key, plan, backend="tiles"), want)


def test_rows_without_keys_give_zeros_and_no_gradient() -> None:
    query, key, value = make(queries=16, keys=16, dtype=torch.float32)
    read = torch.ones(4, 4, dtype=torch.bool)
    read[1] = False
    plan = BlockPlan.from_mask(read, query_block=4, key_block=4)
    for backend in ("reference", "tiles", "dense"):
        out, lse, dq, dk, dv = everything(backend, query, key, value, plan, predicate=lambda b, h, i, j: i != 9)
        for row in (4, 5, 6, 7, 9):
            assert (out[:, :, row] == 0).all()
            assert (dq[:, :, row] == 0).all()
            assert (lse[:, :, row] == -torch.inf).all()
        assert all(tensor.isfinite().all() for tensor in (out, dq, dk, dv))


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (1, 1), (1, 64), (3, 64)])
def test_short_lengths_and_decoding(queries, keys) -> None:
    query, key, value = make(queries=queries, keys=keys, dtype=torch.float32)
    plan = BlockPlan.from_mask(
        torch.ones(-(-queries // 2), -(-keys // 8), dtype=torch.bool), query_block=2, key_block=8
    )
    options = {"predicate": lambda b, h, i, j: j <= i + keys - queries}
    want = everything("reference", query, key, value, plan, **options)
    for backend in ("tiles", "dense", "auto"):
        assert_same(everything(backend, query, key, value, plan, **options), want, atol=2e-5, rtol=2e-5)


def test_large_logits_stay_finite() -> None:
    query, key, value = make(queries=32, keys=32, dtype=torch.float32)
    plan = random_plan((), 32, 32, 8, 8, 0.8)
    big = (query.detach() * 1e4).requires_grad_()
    got = everything("tiles", big, key, value, plan)
    want = everything("reference", big, key, value, plan)
    assert_same(got[:2], want[:2], atol=1e-4, rtol=1e-4)
    assert all(tensor.isfinite().all() for tensor in got[2:])


def test_packed_sequences_do_not_see_each_other() -> None:
    query, key, value = make(1, 4, 2, 40, 40)
    cu_seqlens = torch.tensor([0, 7, 7, 24, 40])
    plan = BlockPlan.from_mask(torch.ones(10, 5, dtype=torch.bool), query_block=4, key_block=8)
    options = {"cu_seqlens": cu_seqlens, "predicate": lambda b, h, i, j: j <= i}
    got = everything("tiles", query, key, value, plan, **options)
    assert_same(got, everything("reference", query, key, value, plan, **options))
    alone = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, 7:24], key[:, :, 7:24], value[:, :, 7:24], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(got[0][:, :, 7:24], alone)


def test_flex_agrees_forward(compiling) -> None:
    query, key, value = (t.detach() for t in make(1, 4, 2, 64, 96, 16, 16, dtype=torch.float32))
    plan = random_plan((4,), 64, 96, 16, 32, 0.6)
    table = TableBias(torch.randn(4, 21), lambda i, j: (j - i).clamp(-10, 10) + 10)
    for bias in (None, torch.randn(4, 64, 96), table):
        got = blocksparse_attention(query, key, value, plan, bias=bias, predicate=odd_predicate, backend="flex")
        want = blocksparse_attention(query, key, value, plan, bias=bias, predicate=odd_predicate, backend="reference")
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("lead", [(), (4,), (2, 4)])
def test_compiles_whole_with_gradients(compiling, lead) -> None:
    query, key, value = make(queries=30, keys=35)
    plan = random_plan(lead, 30, 35, 8, 8, 0.6)
    table = torch.randn(4, 21, dtype=torch.float64, requires_grad=True)

    bias = TableBias(table, lambda i, j: (j - i).clamp(-10, 10) + 10)

    def attend(query, key, value, table):
        return blocksparse_attention(query, key, value, plan, predicate=odd_predicate, bias=bias, backend="tiles")

    inputs = (query, key, value, table)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(out, attend(*inputs))
    want = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    assert_same(torch.autograd.grad(out.square().sum(), inputs), want)


def test_memory_does_not_grow_with_tokens_squared() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                Largest.size = max(Largest.size, result.untyped_storage().nbytes())
            return result

    tokens = 4096
    query, key, value = make(1, 2, 2, tokens, tokens, 16, 16, dtype=torch.float32)
    blocks = torch.arange(tokens // 64)
    plan = BlockPlan.from_mask(blocks <= blocks[:, None], query_block=64, key_block=64)
    with Largest():
        out = blocksparse_attention(query, key, value, plan, predicate=lambda b, h, i, j: j <= i)
        torch.autograd.grad(out.sum(), (query, key, value))
    assert Largest.size < tokens * tokens  # bytes: a quarter of one head's float32 scores


def test_bad_input_is_named() -> None:
    query, key, value = make(queries=16, keys=16)
    plan = random_plan((), 16, 16, 4, 4)
    with pytest.raises(ValueError, match="4 blocks of 4 queries but query has 12"):
        blocksparse_attention(query[:, :, :12], key, value, plan)
    with pytest.raises(ValueError, match="bias must broadcast"):
        blocksparse_attention(query, key, value, plan, bias=torch.zeros(3, 16, 16))
    with pytest.raises(TypeError, match="bias"):
        blocksparse_attention(query, key, value, plan, bias="no")
    with pytest.raises(ValueError, match="plan is for 3 heads"):
        blocksparse_attention(query, key, value, random_plan((3,), 16, 16, 4, 4))
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of 1"):
        blocksparse_attention(query, key, value, plan, cu_seqlens=torch.tensor([0, 16]))
    with pytest.raises(ValueError, match="query_block must be a positive integer"):
        BlockPlan(0, 1, torch.zeros(1, 1, dtype=torch.long))
