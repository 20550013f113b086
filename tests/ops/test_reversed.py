"""Reversed attention: three paths agree, columns add up, it is the gradient of attention, masks, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.engines import dense_reversed as room
from manyheads.ops import reversed as operator
from manyheads.ops.reversed import dependency_mask, reversed_attention

FAST = ("dense", "tiles")


def _tensors(children=7, parents=9, heads=4, kv_heads=2, width=6, value_width=5, dtype=torch.float64):
    shapes = ((heads, children, width), (kv_heads, parents, width), (kv_heads, children, value_width))
    return [torch.randn(2, *shape, dtype=dtype) for shape in shapes]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one image and 16 children."""
    monkeypatch.setattr(room, "TILE", 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    children=st.integers(0, 40), parents=st.one_of(st.integers(0, 9), st.just(40)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    causal=st.booleans(), masked=st.booleans(), weighted=st.booleans(), tile=st.sampled_from([1, 300, 1 << 19]),
)  # fmt: skip
def test_all_paths_give_the_equations_result(children, parents, heads, causal, masked, weighted, tile) -> None:
    q, k, v = _tensors(children, parents, *heads)
    options = {"causal": causal}
    if masked:
        options |= {"child_mask": torch.rand(2, children) > 0.3, "parent_mask": torch.rand(2, parents) > 0.5}
    if weighted:
        options["weight"] = torch.rand(2, heads[0], children, dtype=q.dtype)
    expected = reversed_attention(q, k, v, backend="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "TILE", tile)
        patch.setattr(operator, "TILE", tile)
        fused = not masked and children * parents > 0 and (not causal or children == parents)
        for backend in ("auto", *FAST, *(["sdpa"] if fused else [])):
            torch.testing.assert_close(reversed_attention(q, k, v, backend=backend, **options), expected)


def test_it_is_a_transposed_softmax() -> None:
    q, k, v = _tensors(kv_heads=4)
    shares = (q @ k.mT * 6**-0.5).softmax(-1)
    torch.testing.assert_close(reversed_attention(q, k, v), shares.mT @ v)
    torch.testing.assert_close(dependency_mask(q, k), shares.sum(1).mT)


def test_it_is_the_gradient_of_attention_for_its_values() -> None:
    q, k, v = _tensors(kv_heads=4)
    weight = torch.rand(2, 4, 7, dtype=q.dtype)
    leaf = torch.zeros(2, 4, 9, 5, dtype=q.dtype, requires_grad=True)
    F.scaled_dot_product_attention(q, k, leaf).backward(v * weight[..., None])
    torch.testing.assert_close(reversed_attention(q, k, v, weight=weight), leaf.grad)


def test_a_childs_column_adds_up_to_its_weight() -> None:
    q, k, _ = _tensors()
    weight, child, parent = torch.rand(2, 4, 7), torch.rand(2, 7) > 0.3, torch.rand(2, 9) > 0.5
    mask = dependency_mask(q, k, weight=weight, child_mask=child, parent_mask=parent)
    torch.testing.assert_close(mask.sum(1), (weight.sum(1) * child).double())
    assert mask.mT[:, :, ~parent[0]][0].eq(0).all()
    causal = dependency_mask(q, k, causal=True)
    assert causal.triu(-1).sum() > 0
    assert torch.tril(causal, -3).eq(0).all()


def test_a_causal_parent_hears_only_later_children() -> None:
    q, k, v = _tensors(7, 7)
    out = reversed_attention(q, k, v, causal=True)
    v[:, :, :3] += 1
    changed = reversed_attention(q, k, v, causal=True)
    torch.testing.assert_close(out[:, :, 3:], changed[:, :, 3:])
    assert not torch.allclose(out[:, :, :3], changed[:, :, :3])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_children_without_parents_send_nothing_and_have_finite_gradients(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in _tensors())
    parents = torch.ones(2, 9, dtype=torch.bool)
    parents[0] = False
    out = reversed_attention(q, k, v, parent_mask=parents, backend=backend)
    assert out[0].eq(0).all()
    assert out[1].ne(0).any()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() and g[0].eq(0).all() for g in gradients)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(backend: str, masked: bool) -> None:
    q, k, v = (t.requires_grad_() for t in _tensors(18, 4, 2, 1, 2, 2))
    weight = torch.rand(2, 2, 18, dtype=q.dtype, requires_grad=True)
    masks = {"parent_mask": torch.rand(2, 4) > 0.4, "child_mask": torch.rand(2, 18) > 0.3} if masked else {}

    def receive(q, k, v, weight):
        return reversed_attention(q, k, v, weight=weight, causal=masked, backend=backend, **masks)

    assert torch.autograd.gradcheck(receive, (q, k, v, weight))


@pytest.mark.parametrize(("causal", "value_width"), [(False, 3), (True, 2)])
def test_gradients_of_fused_attention_there_and_back(causal: bool, value_width: int) -> None:
    q, k, v = (t.requires_grad_() for t in _tensors(5, 5, 2, 1, 2, value_width))
    weight = torch.rand(2, 2, 5, dtype=q.dtype, requires_grad=True)

    def receive(q, k, v, weight):
        return reversed_attention(q, k, v, weight=weight, causal=causal, backend="sdpa")

    assert torch.autograd.gradcheck(receive, (q, k, v, weight))
    with torch.inference_mode():
        torch.testing.assert_close(receive(q, k, v, weight), receive(q, k, v, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_stays_close_and_huge_logits_finite(dtype, backend: str) -> None:
    q, k, v = _tensors(dtype=torch.float32)
    weight = torch.rand(2, 4, 7)
    expected = reversed_attention(q, k, v, weight=weight)
    half = [t.to(dtype) for t in (q, k, v)]
    out = reversed_attention(*half, weight=weight.to(dtype), backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    assert reversed_attention(q * 1e4, k, v, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", FAST)
def test_strided_and_expanded_inputs(backend: str) -> None:
    q, k, v = (torch.randn(2, 7, 3, 6).transpose(1, 2) for _ in range(3))
    expected = reversed_attention(*(t.contiguous() for t in (q, k, v)), backend="reference")
    torch.testing.assert_close(reversed_attention(q, k, v, backend=backend), expected)
    one = torch.randn(1, 1, 7, 6).expand(2, 3, 7, 6).requires_grad_()
    out = reversed_attention(one, one, one, backend=backend)
    assert torch.autograd.grad(out.sum(), one)[0].isfinite().all()


def test_dropout_drops_shares() -> None:
    q, k, v = _tensors(40, 40, 1, 1)
    mean = torch.stack([reversed_attention(q, k, v, dropout=0.5) for _ in range(200)]).mean(0)
    torch.testing.assert_close(mean, reversed_attention(q, k, v), rtol=0, atol=0.8)
    assert not torch.equal(reversed_attention(q, k, v, dropout=0.5), reversed_attention(q, k, v, dropout=0.5))


def test_compiles_whole(compiling: None) -> None:
    q, k, v = _tensors()
    compiled = torch.compile(reversed_attention, fullgraph=True, backend="aot_eager")
    options = {"weight": torch.rand(2, 4, 7, dtype=q.dtype), "parent_mask": torch.rand(2, 9) > 0.4}
    torch.testing.assert_close(compiled(q, k, v, **options), reversed_attention(q, k, v, **options))


def test_compiles_whole_with_gradients_tile_by_tile(compiling: None, small_tiles: None) -> None:
    q, k, v = (t.requires_grad_() for t in _tensors())
    compiled = torch.compile(reversed_attention, fullgraph=True, backend="aot_eager")
    results = [call(q, k, v, backend="tiles") for call in (compiled, reversed_attention)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in results))
    mask = torch.rand(2, 9) > 0.4
    torch.library.opcheck(room.reversed_tiles, (q[:, :2], k, v, mask, False, 0.5))


def test_auto_takes_what_the_device_and_the_call_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (torch.empty(2, 4, 8, 6, device="meta") for _ in range(2))
    mask = torch.ones(2, 8, dtype=torch.bool)
    assert operator._choose(q, k, None, False) == "dense"
    monkeypatch.setattr(operator, "TILE", 8)
    assert operator._choose(torch.empty(2, 4, 8, 6), k, mask, True) == "tiles"
    assert operator._choose(q, k, None, True) == "sdpa"
    assert operator._choose(q, k[:, :, :3], None, True) == "dense"
    assert operator._choose(q, k, mask, False) == "dense"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": torch.randn(2, 2, 9, 5)}, "needs 2 heads and 7 tokens, got 2 and 9"),
        ({"value": torch.randn(2, 4, 7, 5)}, "needs 2 heads and"),
        ({"weight": torch.rand(2, 7, 4)}, r"weight must be .* = \(2, 4, 7\)"),
        ({"child_mask": torch.ones(2, 9, dtype=torch.bool)}, r"child_mask must be boolean of shape \(2, 7\)"),
        ({"parent_mask": torch.ones(2, 9)}, r"parent_mask must be boolean of shape \(2, 9\)"),
        ({"dropout": 1}, "dropout=1"),
        ({"dropout": 0.1, "backend": "tiles"}, "has no dropout"),
        ({"dropout": 0.1, "backend": "sdpa"}, "has no dropout"),
        ({"causal": True, "backend": "sdpa"}, "as many children as parents"),
        ({"parent_mask": torch.ones(2, 9, dtype=torch.bool), "backend": "sdpa"}, "has no parent_mask"),
        ({"backend": "flash"}, "backend='flash'"),
        ({"key": torch.randn(2, 2, 9, 4)}, "head_dim 6 but key has 4"),
    ],
)
@pytest.mark.usefixtures("compiling")
def test_bad_input(change: dict, message: str) -> None:
    given = dict(zip(("query", "key", "value"), _tensors(dtype=torch.float32))) | change
    with pytest.raises(ValueError, match=message):
        reversed_attention(given.pop("query"), given.pop("key"), given.pop("value"), **given)
