"""MEDUSA's parts against the equations written out, and its heads on other networks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyheads.layers.medusa import (
    GlobalAttention,
    MultiScaleHeads,
    ScaleHead,
    legacy_resize,
    same_padding,
    semantic_image,
)


def _resized(x: torch.Tensor, size: tuple[int, int], align: bool) -> torch.Tensor:
    """The rule of the original, one number at a time."""
    height, width = x.shape[2:]

    def place(i: int, given: int, wanted: int) -> tuple[int, int, float]:
        ratio = (given - 1) / max(wanted - 1, 1) if align else given / wanted
        at = np.float32(i) * np.float32(ratio)
        lower = min(math.floor(at), given - 1)
        return lower, min(lower + 1, given - 1), float(at - np.float32(lower))

    out = x.new_zeros(*x.shape[:2], *size)
    for i in range(size[0]):
        for j in range(size[1]):
            (top, bottom, u), (left, right, v) = place(i, height, size[0]), place(j, width, size[1])
            above = x[:, :, top, left] * (1 - v) + x[:, :, top, right] * v
            below = x[:, :, bottom, left] * (1 - v) + x[:, :, bottom, right] * v
            out[:, :, i, j] = above * (1 - u) + below * u
    return out


side = st.integers(1, 9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(given=st.tuples(side, side), wanted=st.tuples(side, side), align=st.booleans())
def test_resizing_is_tensorflows_old_rule(given, wanted, align) -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 2, *given, dtype=torch.double)
    torch.testing.assert_close(legacy_resize(x, wanted, align_corners=align), _resized(x, wanted, align))


def test_resizing_is_none_of_torchs() -> None:
    x = torch.rand(1, 1, 16, 16)
    ours = legacy_resize(x, (7, 7))
    for align in (False, True):
        assert not torch.allclose(ours, F.interpolate(x, (7, 7), mode="bilinear", align_corners=align), atol=1e-3)
    aligned = F.interpolate(x, (7, 7), mode="bilinear", align_corners=True)
    torch.testing.assert_close(legacy_resize(x, (7, 7), align_corners=True), aligned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("side", "kernel", "stride"), [(4, 7, 2), (5, 7, 2), (6, 3, 1), (7, 3, 2)])
def test_padding_leaves_the_ceiling(side: int, kernel: int, stride: int) -> None:
    x = torch.ones(1, 1, side, side)
    padded = same_padding(x, kernel, stride)
    assert (padded.shape[-1] - kernel) // stride + 1 == -(-side // stride)
    before = (padded[0, 0].sum(0) > 0).nonzero()[0].item()
    assert before == (padded.shape[-1] - side) // 2


def test_head_is_the_equation_and_its_gradients_are_right() -> None:
    head = ScaleHead(3).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True)
    weights = torch.rand(2, 1, 8, 8, dtype=torch.double, requires_grad=True)
    attention = F.conv2d(_resized(weights.detach(), (5, 4), False), head.weight, head.bias, padding=3)
    torch.testing.assert_close(head(x, weights), x * (1 + attention))
    assert torch.autograd.gradcheck(head, (x, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    head, body = ScaleHead(4).to(dtype), GlobalAttention(2).to(dtype)
    weights = body(torch.randn(1, 1, 16, 16, dtype=dtype))
    out = head(torch.randn(1, 4, 5, 5, dtype=dtype), weights)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_body_has_the_published_size_and_gives_weights() -> None:
    with torch.device("meta"):
        body = GlobalAttention()
    assert sum(parameter.numel() for parameter in body.parameters()) == 5_468_897
    weights = GlobalAttention(2)(1e3 * torch.randn(1, 1, 16, 32))
    assert weights.shape == (1, 1, 16, 32)
    assert weights.min() >= 0
    assert weights.max() <= 1


def test_semantic_image_is_normed_and_empty_pictures_stay_zero() -> None:
    image = torch.rand(2, 3, 40, 30)
    image[1] = 0.5
    found = semantic_image(image, (16, 16))
    torch.testing.assert_close(found[0].std(correction=0), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    assert found[1].abs().max() < 1


def _net() -> nn.Module:
    return timm.create_model("resnet18", num_classes=4, stem_width=4, channels=(4, 4, 8, 8)).eval()


def test_heads_around_any_network() -> None:
    net = _net()
    names = list(net.state_dict())
    x = torch.rand(2, 3, 48, 48)
    plain = net(x)
    wrapped = MultiScaleHeads(net, ["layer1", "layer3"], image_size=48, semantic_size=(16, 16), width=2).eval()
    assert [head.out_channels for head in wrapped.heads] == [4, 8]
    torch.testing.assert_close(net(x), plain)  # outside of the wrapper the network is what it was
    assert list(net.state_dict()) == names
    weights = wrapped.body(semantic_image(x, (16, 16)))
    hidden = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(x)))))
    hidden = net.layer2(wrapped.heads[0](hidden, weights))
    hidden = net.layer4(wrapped.heads[1](net.layer3(hidden), weights))
    expected = net.forward_head(hidden)
    torch.testing.assert_close(wrapped(x), expected)
    torch.testing.assert_close(wrapped(x, semantic_image(x, (16, 16))), expected)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        wrapped.heads[0].bias.add_(1)
    torch.testing.assert_close(twin(x), expected)
    wrapped(x).square().sum().backward()
    assert wrapped.body.get_parameter("1.weight").grad.abs().sum() > 0


def test_compiles_whole(compiling: None) -> None:
    head, weights, x = ScaleHead(3), torch.rand(1, 1, 8, 8), torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="aot_eager")(x, weights), head(x, weights))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: legacy_resize(torch.rand(1, 1, 4, 4), (0, 3)), "at least one position"),
        (lambda: GlobalAttention(2)(torch.rand(1, 1, 24, 16)), "sides divisible by 16, got"),
        (lambda: GlobalAttention(0), "width=0 must be at least 1"),
        (lambda: ScaleHead(3)(torch.rand(1, 4, 5, 5), torch.rand(1, 1, 8, 8)), r"must be \(batch, 3, H, W\)"),
        (lambda: ScaleHead(3)(torch.rand(2, 3, 5, 5), torch.rand(1, 1, 8, 8)), r"the map must be \(2, 1, h, w\)"),
        (lambda: MultiScaleHeads(_net(), ["layer9"]), r"\['layer9'\] is not in ResNet"),
        (lambda: MultiScaleHeads(_net(), ["fc"], image_size=32), "'fc' returns no feature map"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
