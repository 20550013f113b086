"""Neighborhood attention: windows of the papers, backends against the equation, the layer, decoding, compilation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.ops.neighborhood import neighborhood_attention, neighborhood_decode, neighborhood_mask


def qkv(grid, batch=1, heads=4, key_heads=2, dim=8, dtype=torch.float64):
    query = torch.randn(batch, heads, *grid, dim, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(batch, key_heads, *grid, dim, dtype=dtype, requires_grad=True) for _ in "kv")
    return query, key, value


@st.composite
def axes(draw, longest=14):
    window, dilation = draw(st.integers(2, 5)), draw(st.integers(1, 2))
    length = draw(st.integers(window * dilation, max(longest, window * dilation)))
    return length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(grid=st.one_of(st.lists(axes(40), min_size=1, max_size=1), st.lists(axes(), min_size=2, max_size=2)))
def test_backends_follow_the_equation(grid) -> None:
    lengths, window, stride, dilation, causal = zip(*grid)
    tensors = qkv(lengths)
    table = None
    if all(w % 2 for w in window) and not any(causal) and set(stride) == {1}:
        table = torch.randn(4, *(2 * w - 1 for w in window), dtype=torch.float64, requires_grad=True)
    found = {}
    for backend in ("reference", "tiles", "dense", "auto"):
        out, lse = neighborhood_attention(
            *tensors,
            window=window,
            stride=stride,
            dilation=dilation,
            causal=causal,
            rel_pos_bias=table,
            return_lse=True,
            backend=backend,
        )
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        wanted = [*tensors, *([] if table is None else [table])]
        found[backend] = out, lse, *torch.autograd.grad((out * weights).sum() + lse.square().sum(), wanted)
    for backend in ("tiles", "dense", "auto"):
        for have, should in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(have, should)


def test_three_axes_with_bias() -> None:
    tensors = qkv((6, 9, 10))
    table = torch.randn(4, 5, 5, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for backend in ("reference", "tiles"):
        out = neighborhood_attention(*tensors, window=3, dilation=(1, 2, 3), rel_pos_bias=table, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), [*tensors, table])))
    for have, should in zip(*found, strict=True):
        torch.testing.assert_close(have, should)


def test_windows_shift_inside_at_a_border() -> None:
    mask = neighborhood_mask(7, 3)
    assert (mask.sum(-1) == 3).all()
    assert mask[0].tolist() == mask[1].tolist() == [True] * 3 + [False] * 4
    assert neighborhood_mask(6, 6).all()
    assert torch.equal(neighborhood_mask(6, 6, causal=True), torch.ones(6, 6).tril().bool())
    blocks = neighborhood_mask(8, 4, stride=4)
    assert torch.equal(blocks, torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool())


def test_additional_keys_share_the_softmax() -> None:
    query, key, value = qkv((12,), heads=2)
    more_keys, more_values = (torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    out, lse = neighborhood_attention(
        query, key, value, window=5, additional_key=more_keys, additional_value=more_values, return_lse=True
    )
    mask = torch.cat([neighborhood_mask(12, 5), torch.ones(12, 3, dtype=torch.bool)], dim=1)
    keys, values = torch.cat([key, more_keys], 2), torch.cat([value, more_values], 2)
    want = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    torch.testing.assert_close(out, want)
    scores = (query @ keys.transpose(-2, -1) * 8**-0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    inputs = (query, key, value, more_keys, more_values)
    for have, should in zip(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(have, should)


def test_gradients_are_the_derivatives() -> None:
    tensors = qkv((7, 5), heads=2, key_heads=1, dim=2)
    table = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def attend(query, key, value, table):
        return neighborhood_attention(query, key, value, window=3, rel_pos_bias=table, return_lse=True, backend="tiles")

    assert torch.autograd.gradcheck(attend, (*tensors, table), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_logits(dtype) -> None:
    half = [tensor.detach().to(dtype) for tensor in qkv((33, 20), dtype=torch.float32)]
    want = neighborhood_attention(*(tensor.float() for tensor in half), window=5, backend="reference")
    got = neighborhood_attention(*half, window=5, backend="tiles")
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)
    loud = neighborhood_attention(half[0] * 1e3, half[1], half[2], window=5, scale=10.0, backend="tiles")
    assert loud.isfinite().all()


def test_scale_zero_is_a_mean_and_views_are_fine() -> None:
    x = torch.randn(2, 9, 7, 3, 8).permute(0, 3, 1, 2, 4)
    one = x[:1].expand(2, -1, -1, -1, -1)
    got = neighborhood_attention(one, one, one, window=(9, 7), scale=0.0, backend="tiles")
    torch.testing.assert_close(got, one.mean((2, 3), keepdim=True).expand_as(got))


def test_dropout_drops_the_same_weights_forward_and_backward() -> None:
    query, key, _ = qkv((40,), heads=2)
    ones = torch.eye(40, dtype=torch.float64).expand(1, 2, 40, 40).clone().requires_grad_()
    out = neighborhood_attention(query, key, ones, window=9, dropout=0.5, backend="tiles")
    dropped = (out == 0) & neighborhood_mask(40, 9)
    assert 0.3 < dropped.sum() / (2 * 40 * 9) < 0.7
    grads = torch.autograd.grad(out.sum(), ones)[0]
    torch.testing.assert_close(grads, out.sum(-2)[..., None].expand_as(grads))
    kept = neighborhood_attention(query, key, key, window=9, dropout=0.1, backend="tiles")
    assert not torch.equal(kept, neighborhood_attention(query, key, key, window=9, dropout=0.1, backend="tiles"))


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 3), (2, 1)])
def test_a_ring_buffer_decodes_what_the_sequence_gives(stride, dilation) -> None:
    query, key, value = (tensor.detach() for tensor in qkv((24,)))
    full = neighborhood_attention(query, key, value, window=4, stride=stride, dilation=dilation, causal=True)
    slots = 3 * dilation + 1
    rings = torch.zeros(1, 2, slots, 8, dtype=key.dtype), torch.zeros(1, 2, slots, 8, dtype=key.dtype)
    for position in range(24):
        for ring, tensor in zip(rings, (key, value)):
            ring[:, :, position % slots] = tensor[:, :, position]
        step = neighborhood_decode(
            query[:, :, position : position + 1],
            *rings,
            position=position,
            window=4,
            stride=stride,
            dilation=dilation,
        )
        torch.testing.assert_close(step[:, :, 0], full[:, :, position])


def test_compiles_whole_with_gradients(compiling) -> None:
    layer = NeighborhoodAttention(16, 2, kernel_size=3, rel_pos_bias=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in (20, 27):
        x = torch.randn(1, size, 31, 16, requires_grad=True)
        out = compiled(x)
        torch.testing.assert_close(out, layer(x))
        for have, should in zip(
            torch.autograd.grad(out.square().sum(), [x, layer.rpb]),
            torch.autograd.grad(layer(x).square().sum(), [x, layer.rpb]),
            strict=True,
        ):
            torch.testing.assert_close(have, should, atol=1e-4, rtol=1e-4)


def test_exports(compiling) -> None:
    layer = NeighborhoodAttention(16, 2, kernel_size=3, axes=1, causal=True).eval()
    x = torch.randn(1, 40, 16)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "at least 2"),
        ({"window": 3, "stride": 4}, "stride cannot be larger than the window"),
        ({"window": 5, "dilation": 3}, "window times dilation exceeds the axis: 9 tokens"),
        ({"window": (3, 3, 3)}, "one int or one per axis"),
        ({"window": 4, "rel_pos_bias": torch.zeros(4, 7, 7)}, "odd windows"),
        ({"window": 3, "rel_pos_bias": torch.zeros(4, 5, 4)}, "shape"),
        ({"window": 3, "additional_key": torch.zeros(1, 2, 3, 8)}, "only one of them"),
    ],
)
def test_bad_input_is_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*qkv((9, 10), dtype=torch.float32), **change)


def test_bad_shapes_are_named() -> None:
    query, key, value = qkv((9, 10))
    with pytest.raises(ValueError, match="grid"):
        neighborhood_attention(query, key[:, :, :8], value[:, :, :8], window=3)
    with pytest.raises(ValueError, match="divide query heads"):
        neighborhood_attention(query[:, :3], key, value, window=3)
    with pytest.raises(TypeError, match="share a dtype"):
        neighborhood_attention(query.float(), key, value, window=3)
    with pytest.raises(ValueError, match="one to three axes"):
        neighborhood_attention(query[:, :, 0, 0], key[:, :, 0, 0], value[:, :, 0, 0], window=3)
