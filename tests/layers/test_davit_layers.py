"""DaViT's layers against the equations written out, and against what they must not do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.layers.davit import ChannelAttention, ConvPositionEncoding, WindowAttention


def _channel_by_hand(layer: ChannelAttention, x: torch.Tensor) -> torch.Tensor:
    tokens, dim = x.shape[1:]
    first, second, third = layer.qkv(x).chunk(3, dim=-1)
    value, query, key = (first, second, third) if layer.flavour == "v1" else (third, first, second)
    width = dim // layer.heads
    out = torch.zeros_like(x)
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        scale = width**-0.5 if layer.flavour == "v1" else tokens**-0.5
        weights = (scale * query[..., part].mT @ key[..., part]).softmax(-1)
        out[..., part] = value[..., part] @ weights.mT
    return layer.proj(out)


def _window_by_hand(layer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    _, height, width, dim = x.shape
    side, head_dim = layer.window, dim // layer.heads
    padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    out = torch.zeros_like(padded)
    for top in range(0, height, side):
        for left in range(0, width, side):
            tile = padded[:, top : top + side, left : left + side]
            q, k, v = layer.qkv(tile.flatten(1, 2)).chunk(3, dim=-1)
            heads = []
            for part in (slice(h * head_dim, (h + 1) * head_dim) for h in range(layer.heads)):
                heads.append((q[..., part] @ k[..., part].mT * head_dim**-0.5).softmax(-1) @ v[..., part])
            out[:, top : top + side, left : left + side] = layer.proj(torch.cat(heads, -1)).view_as(tile)
    return out[:, :height, :width]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), tokens=st.integers(1, 40), heads=st.integers(1, 3), flavour=st.sampled_from(["v1", "v2"])
)
def test_channel_attention_is_the_equation(batch: int, tokens: int, heads: int, flavour: str) -> None:
    layer = ChannelAttention(heads * 4, heads, flavour=flavour).double()
    x = torch.randn(batch, tokens, heads * 4, dtype=torch.double)
    torch.testing.assert_close(layer(x), _channel_by_hand(layer, x))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(height=st.integers(1, 9), width=st.integers(1, 9), window=st.integers(1, 5), heads=st.integers(1, 3))
def test_window_attention_is_the_equation(height: int, width: int, window: int, heads: int) -> None:
    layer = WindowAttention(heads * 4, heads, window=window).double()
    x = torch.randn(2, height, width, heads * 4, dtype=torch.double)
    torch.testing.assert_close(layer(x), _window_by_hand(layer, x))


@pytest.mark.parametrize("activation", [False, True])
def test_position_encoding_adds_the_convolution(activation: bool) -> None:
    layer = ConvPositionEncoding(6, activation=activation)
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    branch = layer.proj(x.permute(0, 3, 1, 2))
    expected = x + (F.gelu(branch) if activation else branch).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), layer.proj.weight) for out in (layer(x), expected))
    torch.testing.assert_close(ours, theirs)


def test_position_encoding_keeps_small_weights_in_half_precision() -> None:
    layer = ConvPositionEncoding(4).bfloat16()
    torch.nn.init.constant_(layer.proj.weight, 1e-3)
    torch.nn.init.zeros_(layer.proj.bias)
    x = torch.full((1, 3, 3, 4), 1e-2, dtype=torch.bfloat16)
    x[:, 1, 1] = 0
    assert (layer(x)[:, 1, 1] > 0).all()
    assert list(layer.state_dict()) == ["proj.weight", "proj.bias"]


def test_channel_attention_is_global_and_window_attention_is_not() -> None:
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    (reach,) = torch.autograd.grad(ChannelAttention(8, 2)(x)[0, 0, 0].sum(), x)
    assert (reach.abs().sum(-1) > 0).all()
    (reach,) = torch.autograd.grad(WindowAttention(8, 2, window=4)(x)[0, 0, 0].sum(), x)
    assert (reach.abs().sum(-1) > 0).sum() == 16


@pytest.mark.parametrize("layer", [ChannelAttention(8, 2), ChannelAttention(8, 2, flavour="v2"), WindowAttention(8, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_large_values_stay_finite(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    x = 100 * torch.randn(2, 9, 7, 8, dtype=dtype)
    assert layer(x).dtype == dtype
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("kind", [ChannelAttention, WindowAttention])
def test_strided_expanded_and_empty_inputs(kind: type) -> None:
    layer = kind(8, 2)
    x = torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    expanded = torch.randn(1, 5, 6, 8).expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()))
    assert layer(x[:0]).shape == (0, 5, 6, 8)


@pytest.mark.parametrize("layer", [ChannelAttention(4, 2), WindowAttention(4, 2, window=2), ConvPositionEncoding(4)])
def test_gradients(layer: torch.nn.Module) -> None:
    x = torch.randn(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double(), x)


@pytest.mark.parametrize(
    "layer", [ChannelAttention(8, 2, flavour="v2"), WindowAttention(8, 2), ConvPositionEncoding(8)]
)
def test_layers_compile_whole(compiling: None, layer: torch.nn.Module) -> None:
    x = torch.randn(2, 9, 8, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelAttention(10, 3), "dim=10 is not a multiple of heads=3"),
        (lambda: WindowAttention(10, 3), "dim=10 is not a multiple of heads=3"),
        (lambda: ChannelAttention(8, 2, flavour="v3"), "flavour='v3'"),
        (lambda: WindowAttention(8, 2, window=0), "window must be at least 1"),
        (lambda: ChannelAttention(8, 2)(torch.randn(1, 5, 6)), "needs 8"),
        (lambda: WindowAttention(8, 2)(torch.randn(1, 5, 5, 6)), "needs 8"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
