"""Fused evaluation: the same numbers as the modules, and never those of yesterday's weights."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from manyheads.layers.activations import TanhGELU
from manyheads.layers.conv_norm import ConvNorm, Residual, normed
from manyheads.layers.fused import _KEPT, add, convolve_norm, excite, fusible, perceive, project, unfused
from manyheads.models import create_model

ACTS = [None, nn.ReLU(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), TanhGELU(), nn.Identity()]


def trained(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A norm in evaluation with statistics, factor and shift of its own."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.uniform_(-1, 1)
        norm.running_var.uniform_(0.3, 2)
    return norm.eval()


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "side"), [(1, 1, 1, 5), (1, 2, 1, 7), (1, 1, 1, 96), (3, 1, 1, 6), (3, 2, 8, 9)]
)
@torch.no_grad()
def test_convolution_norm_activation(act, kernel, stride, groups, side):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 64 if groups == 1 else 8, kernel, stride, kernel // 2, groups=groups, bias=kernel == 3)
    norm = trained(nn.BatchNorm2d(conv.out_channels))
    x = torch.randn(2, 8, side, side - 1)
    wanted = norm(conv(x))
    wanted = act(wanted) if act else wanted
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        for _ in range(3):  # as it comes, then packed
            assert_close(convolve_norm(conv, norm, image, act), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_norm_in_front():
    conv, x = nn.Conv2d(8, 16, 1), torch.randn(2, 8, 4, 3)
    before, after = trained(nn.BatchNorm2d(8)), trained(nn.BatchNorm2d(16))
    assert_close(convolve_norm(conv, after, x, before=before), after(conv(before(x))), rtol=1e-5, atol=1e-5)
    assert convolve_norm(nn.Conv2d(8, 8, 3, padding=1), after, x, before=before) is None, "padding is not normed"


@pytest.mark.parametrize("rows", [1, 3, 5000])
@pytest.mark.parametrize("act", ACTS, ids=str)
@torch.no_grad()
def test_projection(act, rows):
    linear, x = nn.Linear(24, 56, bias=rows > 1), torch.randn(2, rows, 24)
    wanted = act(linear(x)) if act else linear(x)
    for _ in range(3):
        assert_close(project(linear, x, act), wanted, rtol=1e-5, atol=1e-5)
    assert_close(project(linear, x[:1], act), wanted[:1], rtol=1e-5, atol=1e-5)


def _scale(conv, norm):
    conv.weight.mul_(2)


def _statistics(conv, norm):
    norm.running_mean.add_(1)


def _load(conv, norm):
    conv.load_state_dict({name: tensor * 3 for name, tensor in conv.state_dict().items()})
    norm.load_state_dict(trained(nn.BatchNorm2d(6)).state_dict())


def _assign(conv, norm):
    conv.load_state_dict({name: tensor * 3 for name, tensor in conv.state_dict().items()}, assign=True)


def _data(conv, norm):
    for _ in range(3):  # an address may come back
        conv.weight.data = conv.weight.data * 2
        gc.collect()


def _replace(conv, norm):
    norm.weight = nn.Parameter(norm.weight + 1)


def _eps(conv, norm):
    norm.eps = 0.5


def _step(conv, norm):
    with torch.enable_grad():
        optimizer = torch.optim.AdamW([*conv.parameters(), *norm.parameters()], lr=0.1)
        norm(conv(torch.randn(2, 4, 5, 5))).square().sum().backward()
        optimizer.step()


def _double_and_back(conv, norm):
    conv.double().float()
    conv.weight.neg_()


@pytest.mark.parametrize(
    "change", [_scale, _statistics, _load, _assign, _data, _replace, _eps, _step, _double_and_back]
)
@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_no_stale_weights(change, kernel):
    torch.manual_seed(0)
    conv, norm, x = nn.Conv2d(4, 6, kernel), trained(nn.BatchNorm2d(6)), torch.randn(1, 4, 6, 5)
    old = [convolve_norm(conv, norm, x) for _ in range(3)][-1]
    assert _KEPT[conv].packed is not None
    change(conv, norm)
    wanted = norm(conv(x))
    assert (wanted - old).abs().max() > 1e-2, "the change must show"
    assert_close(convolve_norm(conv, norm, x), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_training_drops_what_was_kept():
    layer, x = ConvNorm(4, 6).eval(), torch.randn(2, 4, 5, 5)
    layer(x)
    assert layer.c in _KEPT
    layer.train()(x)
    assert layer.c not in _KEPT
    layer.eval().c.weight.data.mul_(2)
    assert_close(layer(x), layer.bn(layer.c(x)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nothing_is_kept_in_the_module():
    layer, x = ConvNorm(4, 6).eval(), torch.randn(2, 4, 5, 5)
    names, before = set(layer.state_dict()), io.BytesIO()
    torch.save(layer, before)
    layer(x)
    after = io.BytesIO()
    torch.save(layer, after)
    assert set(layer.state_dict()) == names
    assert len(before.getvalue()) == len(after.getvalue())
    twin = copy.deepcopy(layer)
    twin.c.weight.mul_(3)
    assert_close(twin(x), twin.bn(twin.c(x)), rtol=1e-5, atol=1e-5)
    kept = len(_KEPT)
    del layer, twin
    gc.collect()
    assert len(_KEPT) < kept, "kept weights go with their module"


def test_where_nothing_is_fused():
    layer, x = ConvNorm(4, 6).eval(), torch.randn(2, 4, 5, 5)
    assert not fusible(x)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert fusible(x, layer)
        assert not fusible(x.double(), layer)
        assert not fusible(x[:0], layer)
        assert not fusible(x.to("meta"), layer)
        assert not fusible(nn.Parameter(x), layer)
        with unfused():
            assert not fusible(x, layer)
        with torch.autocast("cpu"):
            assert not fusible(x, layer)
            assert layer(x).dtype is torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 2 * 25 * 4 * 6
        seen = []
        handle = layer.bn.register_forward_hook(lambda *_: seen.append(1))
        layer(x)
        handle.remove()
        assert seen == [1]
        assert torch.vmap(layer)(x[:, None]).shape == (2, 1, 6, 5, 5)
    with torch.inference_mode():
        assert_close(layer(x), layer.bn(layer.c(x)), rtol=1e-5, atol=1e-5)
        born = ConvNorm(4, 6).eval()
        assert convolve_norm(born.c, born.bn, x) is None, "its tensors carry no version"
        assert_close(born(x), born.bn(born.c(x)))


@torch.no_grad()
def test_residuals_excitation_and_mlp():
    from timm.layers import Mlp, SqueezeExcite

    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    depthwise = Residual(ConvNorm(8, 8, 3, groups=8)).eval()
    squeeze, mlp = SqueezeExcite(8, rd_channels=4), Mlp(8, 32)
    with unfused():
        wanted = depthwise(x), squeeze(x), mlp(x.permute(0, 2, 3, 1)), x + x
    assert_close(depthwise(x), wanted[0], rtol=1e-5, atol=1e-5)
    assert_close(excite(squeeze, x.clone()), wanted[1], rtol=1e-5, atol=1e-5)
    assert_close(excite(squeeze, x[:, :, 1:]), squeeze(x[:, :, 1:]), rtol=1e-5, atol=1e-5)
    assert_close(perceive(mlp, x.permute(0, 2, 3, 1)), wanted[2], rtol=1e-5, atol=1e-5)
    assert_close(add(x, x.clone()), wanted[3])
    assert add(x, x.bfloat16()).dtype is torch.float32
    assert normed(nn.Conv2d(8, 8, 1), None, x).shape == x.shape


@pytest.mark.parametrize("name", ["shvit_s1", "maxvit_pico_rw_256", "haloregnetz_b", "davit_tiny"])
@torch.no_grad()
def test_models_are_the_same_fused(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained(module).weight.abs_().add_(0.2)
    x = torch.randn(2, 3, 100, 76)
    with unfused():
        wanted = model(x)
    for _ in range(3):
        assert_close(model(x), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
