"""LITv2's layers: HiLo with its projections and padding, deformable merging against torchvision's convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import deform_conv2d

from manyheads.layers.conv_ffn import ConvFeedForward
from manyheads.layers.hilo import DeformableMerging, HiLoAttention
from manyheads.ops.hilo import hilo_attention


def _by_operator(layer: HiLoAttention, x: torch.Tensor) -> torch.Tensor:
    """The operator on keys and values that are pooled after the projection, on the padded map."""
    _, height, width, _ = x.shape
    side, low, high = layer.window, layer.low_heads, layer.high_heads
    padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))

    def heads(y: torch.Tensor, count: int) -> torch.Tensor:
        return y.unflatten(-1, (count, -1)).permute(0, 3, 1, 2, 4)

    parts = []
    if high:
        q, k, v = (heads(y, high) for y in layer.h_qkv(padded).chunk(3, -1))
        parts.append((hilo_attention(q, k, v, window=side, low_heads=0, backend="reference"), layer.h_proj))
    if low:
        k, v = (heads(y, low) for y in layer.l_kv(padded).chunk(2, -1))
        q = heads(layer.l_q(padded), low)
        parts.append((hilo_attention(q, k, v, window=side, low_heads=low, backend="reference"), layer.l_proj))
    out = [proj(y.permute(0, 2, 3, 1, 4).flatten(-2)) for y, proj in parts]
    return torch.cat(out, -1)[:, :height, :width]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    window=st.integers(1, 4),
    alpha=st.sampled_from([0, 0.25, 0.5, 0.9, 1]),
    bias=st.booleans(),
)
def test_hilo_layer_is_the_operator_on_the_padded_map(height, width, window, alpha, bias) -> None:
    layer = HiLoAttention(16, 4, window=window, alpha=alpha, qkv_bias=bias).double()
    x = torch.randn(2, height, width, 16, dtype=torch.double)
    torch.testing.assert_close(layer(x), _by_operator(layer, x))


def test_another_scale_is_that_of_both_groups() -> None:
    plain, scaled = HiLoAttention(16, 4).double(), HiLoAttention(16, 4, scale=0.3).double()
    scaled.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, 6, 16, dtype=torch.double)
    assert not torch.allclose(plain(x), scaled(x))
    with torch.no_grad():
        for queries in (plain.l_q, plain.h_qkv):
            for parameter in queries.parameters():
                parameter[:8] *= 0.3 / 0.5
    torch.testing.assert_close(plain(x), scaled(x))


@pytest.mark.parametrize(("alpha", "names"), [(0, "h"), (0.5, "hl"), (1, "l")])
def test_an_absent_group_has_no_parameters(alpha: float, names: str) -> None:
    assert {key[0] for key in HiLoAttention(16, 4, alpha=alpha).state_dict()} == set(names)


def test_low_heads_see_everything_and_high_heads_their_window() -> None:
    x = torch.randn(1, 8, 8, 16, requires_grad=True)
    layer = HiLoAttention(16, 4, alpha=0.5)
    high, low = layer(x)[0, 0, 0].split(8)
    (reach,) = torch.autograd.grad(high.sum(), x, retain_graph=True)
    assert (reach.abs().sum(-1) > 0).sum() == 4
    (reach,) = torch.autograd.grad(low.sum(), x)
    assert (reach.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (2, 3)])
def test_merging_is_torchvisions_deformable_convolution(size: tuple[int, int]) -> None:
    layer = DeformableMerging(6, 10).eval()
    torch.nn.init.normal_(layer.offset.weight, std=0.3)
    torch.nn.init.normal_(layer.offset.bias, std=2.0)
    x = torch.randn(2, *size, 6, requires_grad=True)
    maps = x.permute(0, 3, 1, 2)
    rows, columns = size[0] // 2 * 2, size[1] // 2 * 2
    offset = layer.offset(maps)
    # torchvision insists on sizes that fit its stride; the border rule still sees the whole map.
    theirs = deform_conv2d(maps, offset, layer.conv.weight, layer.conv.bias, stride=2)
    assert offset.shape[2:] == (rows // 2, columns // 2)
    expected = F.gelu(layer.norm(theirs)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    wanted = [x, *layer.parameters()]
    ours, reference = (torch.autograd.grad(y.square().sum(), wanted) for y in (layer(x), expected))
    torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)


def test_merging_begins_as_an_ordinary_convolution() -> None:
    layer = DeformableMerging(4, 8)
    x = torch.randn(1, 6, 6, 4)
    expected = F.gelu(layer.norm(layer.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected)


def test_feed_forward_is_the_equation() -> None:
    layer = ConvFeedForward(4, 6).double()
    x = torch.randn(1, 5, 3, 4, dtype=torch.double)
    hidden = F.pad(layer.fc1(x), (0, 0, 1, 1, 1, 1))
    kernel = layer.dwconv.weight[:, 0]
    mixed = layer.dwconv.bias + sum(
        hidden[:, i : i + 5, j : j + 3] * kernel[:, i, j] for i in range(3) for j in range(3)
    )
    torch.testing.assert_close(layer(x), layer.fc2(F.gelu(mixed)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_values_stay_finite(dtype: torch.dtype) -> None:
    x = 30 * torch.randn(1, 6, 6, 8, dtype=dtype)
    for layer in (HiLoAttention(8, 2).to(dtype), DeformableMerging(8, 8).eval().to(dtype)):
        assert layer(x).dtype == dtype
        assert layer(x).isfinite().all()


def test_merging_in_half_precision_keeps_positions() -> None:
    # bfloat16 cannot tell position 257 from 258: the sampling must not be done in it.
    # (Two channels, because of one torch's convolution in bfloat16 reads beyond a narrow map on CPUs with AMX.)
    layer = DeformableMerging(2, 2).eval()
    x = torch.randn(1, 300, 2, 2)
    close = layer.bfloat16()(x.bfloat16()).float()
    torch.testing.assert_close(close, layer.float()(x.bfloat16().float()), rtol=0.02, atol=0.02)


def test_strided_and_empty_inputs() -> None:
    layer = HiLoAttention(8, 2)
    x = torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer(x[:0]).shape == (0, 5, 6, 8)


@pytest.mark.parametrize("layer", [HiLoAttention(4, 2), DeformableMerging(4, 4).eval(), ConvFeedForward(4, 8)])
def test_gradients(layer: torch.nn.Module) -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
    if isinstance(layer, DeformableMerging):
        # Away from whole positions, where bilinear interpolation has a kink.
        torch.nn.init.constant_(layer.offset.bias, 0.3)
    assert torch.autograd.gradcheck(layer.double(), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiLoAttention(10, 3), "dim=10 is not a multiple of heads=3"),
        (lambda: HiLoAttention(8, 2, alpha=-0.1), r"alpha=-0\.1 must be between 0"),
        (lambda: HiLoAttention(8, 2, window=0), "window must be at least 1"),
        (lambda: HiLoAttention(8, 2)(torch.randn(1, 4, 4, 6)), r"x must be \(batch, X, Y, 8\)"),
        (lambda: HiLoAttention(8, 2, pad=False)(torch.randn(1, 4, 5, 8)), "window=2 does not divide a map of 4 x 5"),
        (lambda: DeformableMerging(8, 8)(torch.randn(1, 1, 5, 8)), "with sides of at least 2"),
        (lambda: DeformableMerging(8, 8, drop_odd=False)(torch.randn(1, 4, 5, 8)), "sides must be even"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
