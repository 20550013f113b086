"""Single-head attention and folded norms against the equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyheads.layers.conv_norm import ConvNorm, Residual, fold_norm
from manyheads.layers.shvit import SingleHeadAttention


def _layer(dim: int, partial: int, **options) -> SingleHeadAttention:
    """A layer whose statistics and zero-initialised norm are away from their defaults."""
    layer = SingleHeadAttention(dim, partial, **options).double().eval()
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(
                    torch.rand_like(tensor) if "var" in name or "bn.weight" in name else torch.randn_like(tensor)
                )
    return layer


def _by_hand(layer: SingleHeadAttention, x: torch.Tensor) -> torch.Tensor:
    p, d, heads = layer.partial_dim, layer.qk_dim, layer.heads
    attended, bypass = x[:, :p], x[:, p:]
    mean, var = attended.mean((1, 2, 3), keepdim=True), attended.var((1, 2, 3), keepdim=True, correction=0)
    normed = (attended - mean) / (var + 1e-5).sqrt()
    normed = normed * layer.pre_norm.weight[:, None, None] + layer.pre_norm.bias[:, None, None]
    qkv = layer.qkv.bn(F.conv2d(normed, layer.qkv.c.weight)).flatten(2)
    q, k, v = qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
    out = []
    for h in range(heads):
        rows, channels = slice(h * d // heads, (h + 1) * d // heads), slice(h * p // heads, (h + 1) * p // heads)
        scores = q[:, rows].mT @ k[:, rows] * (d // heads) ** -0.5
        out.append(v[:, channels] @ scores.softmax(-1).mT)
    mixed = torch.cat([torch.cat(out, 1).view_as(attended), bypass], 1).relu()
    return layer.proj[1].bn(F.conv2d(mixed, layer.proj[1].c.weight))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2), size=st.tuples(st.integers(1, 4), st.integers(1, 4)), partial=st.sampled_from([2, 4, 6]),
    heads=st.sampled_from([1, 2]), grads=st.booleans(), channels_last=st.booleans(),
)  # fmt: skip
def test_layer_is_the_equation(batch, size, partial, heads, grads, channels_last) -> None:
    torch.manual_seed(0)
    layer = _layer(6, partial, qk_dim=4, heads=heads)
    x = torch.randn(batch, 6, *size, dtype=torch.double)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grads):
        torch.testing.assert_close(layer(x), _by_hand(layer, x))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_right_for_one_image_too(batch: int, channels_last: bool, training: bool) -> None:
    layer = _layer(4, 2, qk_dim=2).train(training)
    x = torch.randn(batch, 4, 3, 2, dtype=torch.double)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype: torch.dtype) -> None:
    layer = _layer(8, 4).to(dtype)
    out = layer(100 * torch.randn(2, 8, 5, 3, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_strided_expanded_and_empty_inputs() -> None:
    layer = _layer(8, 4)
    x = torch.randn(2, 5, 6, 8, dtype=torch.double).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    expanded = torch.randn(1, 8, 5, 6, dtype=torch.double).expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()))
    before = x.clone()
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(x, before)


def test_compiles_whole(compiling: None) -> None:
    layer = _layer(8, 4)
    x = torch.randn(2, 8, 4, 3, dtype=torch.double)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (3, 1, 4), (1, 2, 1)])
def test_folding_keeps_the_function(kernel: int, stride: int, groups: int) -> None:
    layer = ConvNorm(4, 8, kernel, stride=stride, groups=groups).eval()
    for tensor in (layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias):
        nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(layer.fuse()(x), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(layer.fuse()(x), layer(x))
    biased = nn.Conv2d(4, 8, 3)
    torch.testing.assert_close(fold_norm(biased, layer.bn)(x), layer.bn(biased(x)))


def test_a_residual_depthwise_convolution_folds_into_one() -> None:
    layer = Residual(ConvNorm(4, 4, 3, groups=4)).eval()
    x = torch.randn(1, 4, 5, 5)
    fused = layer.fuse()
    assert isinstance(fused, nn.Conv2d)
    torch.testing.assert_close(fused(x), layer(x))
    full = Residual(ConvNorm(4, 4, 3))
    assert full.fuse() is full


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SingleHeadAttention(8, 9), "partial_dim=9 must be between 1 and dim=8"),
        (lambda: SingleHeadAttention(8, 0), "partial_dim=0"),
        (lambda: SingleHeadAttention(8, 6, heads=4), "heads=4 must divide"),
        (lambda: SingleHeadAttention(8, 4)(torch.randn(1, 6, 4, 4)), r"input must be \(batch, 8, X, Y\)"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
