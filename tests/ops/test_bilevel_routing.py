"""Bi-level routing: the gather backend against the equation, options, extremes, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops import bilevel_routing
from manyheads.ops.bilevel_routing import bilevel_routing_attention, region_means


def _maps(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    regions=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    heads=st.integers(1, 3),
    widths=st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 6])),
    soft=st.booleans(),
    chunked=st.booleans(),
    data=st.data(),
)
def test_gather_equals_the_equation(size, regions, heads, widths, soft, chunked, data) -> None:
    shapes = [(2, heads, *size, width) for width in (widths[0], *widths)]
    count = -(-size[0] // (size[0] // regions[0])) * -(-size[1] // (size[1] // regions[1]))
    topk = data.draw(st.integers(1, count))
    inputs = _maps(*shapes)
    options = {"regions": regions, "topk": topk, "soft_routing": soft, "diff_routing": soft}
    grad = torch.randn(2, heads, *size, widths[1], dtype=torch.float64)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bilevel_routing, "GATHER_LIMIT", 64 if chunked else 1 << 24)
        for backend in ("reference", "gather"):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            out = bilevel_routing_attention(*leaves, **options, backend=backend)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["ada_avgpool", "ada_maxpool", "avgpool", "maxpool"])
def test_pooled_keys_equal_pooling_before_plain_routing(mode: str) -> None:
    query, key, value = _maps(*[(2, 2, 12, 8, 4)] * 3)
    out, routing = bilevel_routing_attention(
        query, key, value, regions=2, topk=3, kv_downsample=mode, kv_size=2, return_routing=True
    )
    # 6 x 4 tokens a region: to 2 x 2 tokens adaptively, to 3 x 2 by a ratio of 2.
    window = (3, 2) if mode.startswith("ada") else (2, 2)
    pool = torch.nn.functional.max_pool2d if "max" in mode else torch.nn.functional.avg_pool2d
    small = [
        pool(t.permute(0, 1, 4, 2, 3).flatten(0, 1), window).unflatten(0, (2, 2)).permute(0, 1, 3, 4, 2)
        for t in (key, value)
    ]
    means = region_means(query, 2), region_means(key, 2)
    want = bilevel_routing_attention(query, *small, regions=2, topk=3, descriptors=means)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(routing.scores, means[0] @ means[1].transpose(1, 2))


def test_every_region_chosen_is_full_attention() -> None:
    query, key, value = _maps(*[(2, 3, 8, 6, 4)] * 3)
    out = bilevel_routing_attention(query, key, value, regions=2, topk=4, scale=0.3)
    flat = [tensor.flatten(2, 3) for tensor in (query, key, value)]
    want = torch.nn.functional.scaled_dot_product_attention(*flat, scale=0.3)
    torch.testing.assert_close(out.flatten(2, 3), want)


def test_cross_form_routes_between_maps_of_different_sizes() -> None:
    query, key, value = _maps((2, 2, 8, 8, 4), (2, 2, 10, 6, 4), (2, 2, 10, 6, 4))
    out, routing = bilevel_routing_attention(query, key, value, regions=2, topk=1, return_routing=True)
    assert out.shape == query.shape
    chosen = int(routing.index[1, 3, 0])
    x, y = 5 * (chosen // 2), 3 * (chosen % 2)
    keys, values = (t[1, :, x : x + 5, y : y + 3].flatten(1, 2) for t in (key, value))
    tokens = query[1, :, 4:, 4:].flatten(1, 2)
    want = (8**-0.5 * tokens @ keys.transpose(1, 2)).softmax(-1) @ values
    torch.testing.assert_close(out[1, :, 4:, 4:].flatten(1, 2), want)


def test_filled_up_regions_average_real_positions_only() -> None:
    (tensor,) = _maps((1, 2, 23, 20, 3))
    means = region_means(tensor, 5).unflatten(1, (6, 5))
    torch.testing.assert_close(means[0, 5, 0], tensor[0, :, 20:, :4].mean((1, 2)).flatten())


def test_gradcheck_with_differentiable_routing() -> None:
    inputs = [tensor.requires_grad_() for tensor in _maps(*[(1, 2, 5, 4, 2)] * 3)]
    options = {"regions": 2, "topk": 2, "soft_routing": True, "diff_routing": True}
    assert torch.autograd.gradcheck(lambda *t: bilevel_routing_attention(*t, **options), inputs)


def test_routing_gives_no_gradient_unless_asked() -> None:
    query, key, value = _maps(*[(1, 1, 4, 4, 2)] * 3)
    descriptors = [region_means(t, 2).requires_grad_() for t in (query, key)]
    for diff in (False, True):
        out = bilevel_routing_attention(
            query, key, value.requires_grad_(), regions=2, topk=2, descriptors=tuple(descriptors),
            soft_routing=True, diff_routing=diff,
        )  # fmt: skip
        grads = torch.autograd.grad(out.square().sum(), descriptors, allow_unused=True)
        assert [grad is not None for grad in grads] == [diff, diff]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype) -> None:
    inputs = [tensor.to(dtype) for tensor in _maps(*[(2, 2, 10, 10, 8)] * 3)]
    routed = region_means(inputs[0], 5), region_means(inputs[1], 5)
    want = bilevel_routing_attention(*[t.float() for t in inputs], regions=5, topk=3, descriptors=routed)
    for backend in ("gather", "reference"):
        got = bilevel_routing_attention(*inputs, regions=5, topk=3, backend=backend)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


def test_extremes_stay_finite() -> None:
    query, key, value = (tensor.float() for tensor in _maps(*[(1, 2, 6, 6, 4)] * 3))
    out = bilevel_routing_attention(1e4 * query, key, value, regions=3, topk=2, scale=1.0)
    assert out.isfinite().all()
    one = bilevel_routing_attention(query[:, :, :1, :1], key[:, :, :1, :1], value[:, :, :1, :1], regions=1, topk=1)
    torch.testing.assert_close(one, value[:, :, :1, :1])
    assert bilevel_routing_attention(query[:0], key[:0], value[:0], regions=2, topk=1).shape == (0, 2, 6, 6, 4)


def test_views_are_read_as_they_look() -> None:
    (base,) = _maps((1, 6, 6, 3, 4))
    query = base.permute(0, 3, 1, 2, 4)[..., ::2]
    key = base[:, :1].expand(1, 6, 6, 3, 4).permute(0, 3, 1, 2, 4)[..., :2]
    want = bilevel_routing_attention(query.contiguous(), key.contiguous(), query.contiguous(), regions=3, topk=2)
    torch.testing.assert_close(bilevel_routing_attention(query, key, query, regions=3, topk=2), want)


def test_compiles_whole_and_chunked(compiling, monkeypatch) -> None:
    inputs = [tensor.requires_grad_() for tensor in _maps(*[(2, 2, 9, 8, 4)] * 3)]
    compiled = torch.compile(bilevel_routing_attention, fullgraph=True, backend="aot_eager")
    for limit in (1 << 24, 1500):
        monkeypatch.setattr(bilevel_routing, "GATHER_LIMIT", limit)
        want = bilevel_routing_attention(*inputs, regions=4, topk=3)
        got = compiled(*inputs, regions=4, topk=3)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want))):
            torch.testing.assert_close(a, b)


BAD = [
    ({"topk": 10}, "topk=10 does not fit 9 key regions"),
    ({"topk": 0}, "topk=0"),
    ({"regions": 7}, "regions=7 does not fit query of 6 x 6"),
    ({"regions": 0}, "regions=0"),
    ({"diff_routing": True}, "soft_routing"),
    ({"kv_downsample": "median"}, "kv_downsample='median'"),
    ({"kv_downsample": "avgpool"}, "kv_size=None"),
    ({"kv_size": 2}, "kv_size=2"),
    ({"kv_downsample": "maxpool", "kv_size": 3}, "leaves no token"),
    ({"backend": "fast"}, "backend='fast'"),
    ({"descriptors": (torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))}, "descriptors are of 4 and 4 regions"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_name_themselves(options: dict, message: str) -> None:
    query, key, value = _maps(*[(1, 4, 6, 6, 4)] * 3)
    with pytest.raises(ValueError, match=message):
        bilevel_routing_attention(query, key, value, **{"regions": 3, "topk": 2, **options})


def test_grouped_heads_are_refused() -> None:
    query, key = _maps((1, 4, 6, 6, 4), (1, 2, 6, 6, 4))
    with pytest.raises(ValueError, match="grouped key/value heads are not defined"):
        bilevel_routing_attention(query, key, key, regions=3, topk=2)
