"""The select engine: gather and Triton against the reference, lists of every kind, caches, decoding, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.bench.speed import peak_bytes
from manyheads.engines import select as engine
from manyheads.engines import select_bags
from manyheads.engines.dense import attention
from manyheads.engines.select import select_attention, select_blocks, select_top_tokens
from manyheads.engines.select_bags import TILE, suits_bags

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def draw(*shape: int, dtype=torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(grad)


def problem(seed: int, dtype, *, batch=2, kv_heads=2, groups=2, queries=3, keys=19, selected=7, lists="kv", bias=True):
    torch.manual_seed(seed)
    heads = kv_heads * groups
    q = draw(batch, heads, queries, 8, dtype=dtype, grad=True)
    k = draw(batch, kv_heads, keys, 8, dtype=dtype, grad=True)
    v = draw(batch, kv_heads, keys, 5, dtype=dtype, grad=True)
    index_heads = {"one": 1, "kv": kv_heads, "all": heads}[lists]
    index = torch.randint(-2, max(1, keys), (batch, index_heads, queries, selected), device=DEVICE)
    index = index.clamp(max=keys - 1)
    if queries:
        index[:, :, 0] = -1
    return q, k, v, index, draw(1, heads, 1, selected, dtype=dtype, grad=True) if bias else None


def outputs_and_grads(q, k, v, index, bias, backend: str) -> list[torch.Tensor]:
    out, lse = select_attention(q, k, v, index, bias=bias, return_lse=True, backend=backend)
    weights = torch.linspace(-1, 1, max(1, out.numel()), device=out.device)[: out.numel()].view_as(out)
    loss = (out.float() * weights).sum() + torch.where(lse == -math.inf, 0, lse).sin().sum()
    inputs = [t for t in (q, k, v, bias) if t is not None]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None] * len(inputs)
    return [out, lse, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs))]


def assert_agree(arguments, backend: str) -> None:
    for a, b in zip(outputs_and_grads(*arguments, backend), outputs_and_grads(*arguments, "reference")):
        assert a.dtype == b.dtype
        tolerance = max(TOLERANCE[arguments[0].dtype], TOLERANCE[a.dtype])
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    sizes=st.fixed_dictionaries({
        "batch": st.sampled_from([1, 2]), "kv_heads": st.sampled_from([1, 3]), "groups": st.sampled_from([1, 2]),
        "queries": st.sampled_from([0, 1, 4]), "keys": st.sampled_from([0, 1, 19]),
        "selected": st.sampled_from([0, 1, 7]), "lists": st.sampled_from(["one", "kv", "all"]), "bias": st.booleans(),
    }),
)  # fmt: skip
def test_gather_gives_the_reference(seed, dtype, sizes):
    assert_agree(problem(seed, dtype, **sizes), "gather")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"lists": "one", "bias": False, "kv_heads": 1, "groups": 3},
        {"lists": "all", "batch": 1},
        {"selected": 70, "queries": 2, "batch": 1},
        {"keys": 1},
    ],
)
def test_triton_gives_the_reference(dtype, sizes):
    assert_agree(problem(0, dtype, **sizes), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("empty", [{"queries": 0}, {"keys": 0}, {"selected": 0}])
def test_triton_takes_empty_inputs(empty):
    assert_agree(problem(0, torch.float32, **empty), "triton")


@pytest.mark.gpu
def test_triton_cuts_long_lists_into_parts():
    q, k, v, index, _ = problem(1, torch.float32, batch=1, kv_heads=1, queries=1, keys=600, selected=600, bias=False)
    index[:] = torch.randperm(600, device=DEVICE)
    assert_agree((q, k, v, index, None), "triton")
    out = select_attention(q, k, v, index, backend="triton")
    torch.testing.assert_close(out, attention(q, k, v), atol=1e-5, rtol=1e-4)


def test_several_tiles_give_what_one_gives(monkeypatch):
    arguments = problem(0, torch.float32, queries=40)
    monkeypatch.setattr(engine, "TILE", 64)
    assert_agree(arguments, "gather")


def test_gradients_match_finite_differences():
    q, k, v, index, bias = problem(0, torch.float64, batch=1, keys=5, selected=3)

    def run(q, k, v, bias):
        out, lse = select_attention(q, k, v, index, bias=bias, return_lse=True, backend="gather")
        return out, torch.where(lse == -math.inf, 0, lse)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))


@pytest.mark.parametrize("backend", ["reference", "gather", "triton"])
def test_all_keys_selected_is_dense_attention(backend):
    q, k, v = draw(1, 4, 2, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 8)
    index = torch.arange(6, device=DEVICE).expand(1, 1, 2, 6)
    out, lse = select_attention(q, k, v, index, return_lse=True, backend=backend)
    dense, dense_lse = attention(q, k, v, return_lse=True, backend="reference")
    torch.testing.assert_close(out, dense, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, dense_lse, atol=1e-6, rtol=1e-5)
    twice = select_attention(q, k, v, torch.cat([index, index], dim=-1), backend=backend)
    torch.testing.assert_close(twice, dense, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "gather", "triton"])
def test_caches_and_projections_need_no_copy(backend):
    q = draw(2, 3, 4, 8).transpose(1, 2)
    cache = draw(2, 2, 50, 8)
    k, v = cache[:, :, 5:25], draw(2, 20, 2, 8).transpose(1, 2)
    index = torch.randint(0, 20, (2, 2, 3, 6), device=DEVICE)
    expected = select_attention(q.contiguous(), k.contiguous(), v.contiguous(), index, backend="reference")
    torch.testing.assert_close(select_attention(q, k, v, index, backend=backend), expected, atol=1e-6, rtol=1e-5)
    shared = draw(1, 1, 20, 8).expand(2, 2, 20, 8)
    expected = select_attention(q, shared.contiguous(), shared.contiguous(), index, backend="reference")
    found = select_attention(q, shared, shared, index, backend=backend)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    turned = draw(2, 2, 8, 20).transpose(2, 3)
    expected = select_attention(q, turned.contiguous(), turned.contiguous(), index, backend="reference")
    found = select_attention(q, turned, turned, index, backend=backend)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "gather", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_ten_thousand_stay_finite(backend, dtype):
    q, k, v, index, _ = problem(0, dtype, bias=False)
    q = (q * 20).detach().requires_grad_()
    out = select_attention(q, k, v, index, scale=30.0, backend=backend)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().sum(), (q, k, v))))
    exact = select_attention(q.double(), k.double(), v.double(), index, scale=30.0, backend="reference")
    # A score of 1e4 is known to 1e4 float32 roundings, and so is the logarithm of a weight.
    rounding = 4 * torch.finfo(torch.float32).eps * 30 * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    tolerance = TOLERANCE[dtype] + rounding
    assert tolerance < 0.1
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=TOLERANCE[dtype])


@pytest.mark.usefixtures("compiling")
def test_compiles_in_one_graph():
    q, k, v, index, bias = problem(0, torch.float32)

    def run(q, k, v, bias):
        out, lse = select_attention(q, k, v, index, bias=bias, return_lse=True)
        return out.square().sum() + lse.exp().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, bias), run(q, k, v, bias))
    inputs = (q, k, v, bias)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(run(*inputs), inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("compiling")
def test_the_custom_operators_are_registered_correctly():
    from manyheads.engines.triton.select import select_triton

    q, k, v, index, bias = problem(0, torch.float32)
    for operator in (engine.select_forward, select_triton):
        torch.library.opcheck(operator, (q, k, v, index, bias, 0.3))


def test_top_tokens_come_in_order_and_hidden_ones_as_none():
    scores = torch.tensor([[0.0, 4.0, -math.inf, 2.0, 3.0], [-math.inf, -math.inf, -math.inf, 1.0, -math.inf]])
    assert select_top_tokens(scores, 3).tolist() == [[1, 3, 4], [-1, -1, 3]]
    assert select_top_tokens(scores, 9).shape == (2, 5)


def test_selected_blocks_hold_their_keys():
    scores = torch.tensor([[1.0, 0.0, 2.0]])
    assert select_blocks(scores, 2, block_size=2, keys=5).tolist() == [[0, 1, 4, -1]]
    hidden = torch.tensor([[1.0, -math.inf, -math.inf]])
    assert select_blocks(hidden, 2, block_size=2, keys=6).tolist() == [[-1, -1, 0, 1]]


@pytest.mark.parametrize(
    ("index", "options", "error", "words"),
    [
        (torch.zeros(2, 2, 3, 4), {}, TypeError, "(?i)int64"),
        (torch.zeros(2, 3, 3, 4, dtype=torch.int64), {}, ValueError, "index must have shape"),
        (torch.full((2, 2, 3, 4), 9), {}, ValueError, "index names key 9 of 9 keys"),
        (torch.full((2, 2, 3, 4), 9), {"backend": "reference"}, ValueError, "index names key 9 of 9 keys"),
        (torch.zeros(2, 2, 3, 4, dtype=torch.int64), {"bias": torch.ones(5)}, ValueError, "does not broadcast"),
        (torch.zeros(2, 2, 3, 4, dtype=torch.int64), {"backend": "flash"}, ValueError, "backend='flash'"),
    ],
)
def test_bad_input_is_named(index, options, error, words):
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    with pytest.raises(error, match=words):
        select_attention(q, k, k, index, **options)


def test_bad_selections_are_named():
    with pytest.raises(ValueError, match="count must be at least 1"):
        select_top_tokens(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="do not make 3 blocks"):
        select_blocks(torch.zeros(3), 1, block_size=4, keys=4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    sizes=st.fixed_dictionaries({
        "kv_heads": st.sampled_from([1, 3]), "groups": st.sampled_from([1, 2]), "keys": st.sampled_from([9, 60]),
        "selected": st.sampled_from([1, 4, 12]), "bias": st.booleans(),
    }),
)  # fmt: skip
def test_many_lists_of_every_head_give_the_reference(seed, dtype, sizes):
    arguments = problem(seed, dtype, queries=64, lists="all", batch=2, **sizes)
    assert suits_bags(arguments[0], arguments[1], arguments[3]) == (DEVICE == "cpu")
    assert_agree(arguments, "gather")


@pytest.mark.parametrize("tile", [1, 600, 3000])
@pytest.mark.parametrize("selected", [4, 12])
def test_bags_of_several_tiles_give_what_one_gives(monkeypatch, tile, selected):
    arguments = problem(0, torch.float32, queries=64, keys=60, lists="all", selected=selected)
    monkeypatch.setattr(select_bags, "TILE", tile)
    assert_agree(arguments, "gather")


def test_memory_of_bags_does_not_grow_with_tokens_squared():
    x = torch.randn(1, 1, 4096, 8, requires_grad=True)
    index = torch.randint(4096, (1, 1, 4096, 64)).sort(-1).values
    assert suits_bags(x, x, index)
    # All pairs at once are 64 MiB for each of several matrices; a few tiles and the lists are a quarter of one.
    assert peak_bytes(lambda: select_attention(x, x, x, index, backend="gather").sum().backward()) < 5 * 4 * TILE


def test_large_rows_select_what_small_ones_do(monkeypatch):
    torch.manual_seed(0)
    scores = torch.rand(3, 7, 50, 197)
    scores[0, 0, :5] = 0.0
    scores[0, 1] = -math.inf
    scores[0, 2, 3, 10:] = -math.inf
    assert scores.numel() >= engine.MANY
    for count in (1, 50, 197):
        found = select_top_tokens(scores, count)
        assert (found.diff(dim=-1) >= 0).all()
        monkeypatch.setattr(engine, "MANY", 1 << 60)
        expected = select_top_tokens(scores, count)
        monkeypatch.undo()
        assert torch.equal(found[1:], expected[1:])
        # Among equal scores any may be selected.
        values = [
            scores[0].gather(-1, index.clamp(min=0)).masked_fill(index < 0, -1) for index in (found[0], expected[0])
        ]
        assert torch.equal(values[0].sort(-1).values, values[1].sort(-1).values)
