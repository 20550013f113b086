"""Token-aware pooling against the sum written out, the FAN block's parts, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyheads.layers.fan import ChannelProcessing, ClassAttentionBlock, FANBlock, TokenMixing
from manyheads.layers.tap import PooledNorm, TokenAwarePooling, grid_of, token_aware_pooling


def _by_hand(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    height, width = x.shape[2:]
    for s in range(weights.shape[1]):
        for i in range(height):
            for j in range(width):
                places = [(i, j)] if s == 0 else [(i + a, j + b) for a in (-s, 0, s) for b in (-s, 0, s)]
                inside = [x[:, :, a, b] for a, b in places if 0 <= a < height and 0 <= b < width]
                out[:, :, i, j] += weights[:, s, i, j, None] * sum(inside) / (1 if s == 0 else 9)
    return out


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)), scales=st.integers(1, 5), channels=st.integers(1, 3),
    backend=st.sampled_from(["auto", "reference", "depthwise"]), channels_last=st.booleans(),
)  # fmt: skip
def test_pooling_is_the_sum(size, scales, channels, backend, channels_last) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, channels, *size).double(), torch.randn(2, scales, *size).double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    torch.testing.assert_close(token_aware_pooling(x, weights, backend=backend), _by_hand(x, weights))
    torch.testing.assert_close(x, before)


@pytest.mark.parametrize("backend", ["reference", "depthwise"])
def test_gradients(backend: str) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.double, requires_grad=True)
    weights = torch.randn(1, 3, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: token_aware_pooling(a, b, backend=backend), (x, weights))
    layer = TokenAwarePooling(2, 3).double().eval()
    assert torch.autograd.gradcheck(layer, (x,))


def test_scale_weights_sum_to_one_and_temperature_sharpens() -> None:
    x = torch.randn(2, 6, 5, 4)
    soft, sharp = TokenAwarePooling(6), TokenAwarePooling(6, temperature=0.1)
    sharp.load_state_dict(soft.state_dict())
    weights = soft.eval().scale_weights(x)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 5, 4))
    assert sharp.eval().scale_weights(x).amax(1).mean() > weights.amax(1).mean()


def test_one_scale_is_the_identity() -> None:
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(TokenAwarePooling(3, 1)(x), x)


def test_bfloat16_expanded_and_large_inputs() -> None:
    layer = TokenAwarePooling(4).eval()
    x = torch.randn(1, 4, 6, 5).expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer.float()(x), rtol=0.05, atol=0.05)
    assert layer(1e4 * x).isfinite().all()


def test_prefix_tokens_pass_by() -> None:
    layer = PooledNorm(nn.Identity(), 4, grid=(2, 3), prefix=2).eval()
    x = torch.randn(2, 8, 4)
    out = layer(x)
    torch.testing.assert_close(out[:, :2], x[:, :2])
    pooled = layer.pool(x[:, 2:].view(2, 2, 3, 4).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out[:, 2:], pooled.reshape(2, 6, 4))
    torch.testing.assert_close(layer(x[:, 2:].view(2, 2, 3, 4)), pooled)
    # Blocks that the class token joins later see the patches alone.
    torch.testing.assert_close(layer(x[:, 2:]), pooled.reshape(2, 6, 4))


def _block_by_hand(block: FANBlock, x: torch.Tensor) -> torch.Tensor:
    batch, height, width, dim = x.shape
    heads = block.attn.heads
    pooled = block.dilation_predictor(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(batch, -1, dim)
    x = x.reshape(batch, -1, dim)
    n = block.norm1(pooled)
    split = lambda y: y.view(batch, -1, heads, dim // heads).transpose(1, 2)  # noqa: E731
    k, v = block.attn.kv(n).chunk(2, -1)
    scores = split(block.attn.q(n)) @ split(k).mT * (dim // heads) ** -0.5
    x = x + block.gamma1 * block.attn.proj((scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(batch, -1, dim))
    u, mlp = block.norm2(x), block.mlp
    q = split(mlp.q(u)).softmax(2)
    k = split(u).softmax(2).mean(3, keepdim=True)
    gate = (q.mT @ k).sigmoid() * mlp.temperature
    z = mlp.mlp_v.fc1(u)
    maps = z.mT.reshape(batch, -1, height, width)
    conv = mlp.mlp_v.dwconv
    mixed = conv.conv2(conv.bn(nn.functional.gelu(conv.conv1(maps)))).flatten(2).mT
    v = mlp.norm_v(mlp.mlp_v.fc2(mlp.mlp_v.gamma * mixed + z))
    return (x + block.gamma2 * (v.mT * gate.flatten(1, 2)).mT).view(batch, height, width, dim)


def test_fan_block_is_the_equation() -> None:
    block = FANBlock(8, 2, mlp_ratio=3).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 5, 8, dtype=torch.double)
    expected = _block_by_hand(block, x)
    torch.testing.assert_close(block(x), expected)
    block.attn.fused_attn = False
    torch.testing.assert_close(block(x), expected)


def test_patches_are_doubled_in_class_blocks() -> None:
    block = ClassAttentionBlock(8, 2).eval()
    x = torch.randn(1, 5, 8)
    with torch.no_grad():
        block.gamma1.zero_()
    torch.testing.assert_close(block(x)[:, 1:], 2 * block.norm2(x)[:, 1:])


def test_compiles_whole(compiling: None) -> None:
    block = FANBlock(8, 2).eval()
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenAwarePooling(4, 0), "num_scales=0 must be at least 1"),
        (lambda: TokenAwarePooling(4, temperature=0), "temperature=0 must be positive"),
        (lambda: TokenAwarePooling(4)(torch.randn(1, 3, 2, 2)), r"input must be \(batch, 4, H, W\)"),
        (lambda: token_aware_pooling(torch.randn(1, 3, 2, 2), torch.randn(1, 0, 2, 2)), "at least one scale"),
        (lambda: grid_of(6), "6 tokens make no square map, and no grid was given"),
        (lambda: grid_of(6, (2, 2)), "the grid is 2 x 2"),
        (lambda: TokenMixing(8, 3), "heads=3 must divide dim=8"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_channel_processing_takes_any_grid() -> None:
    assert ChannelProcessing(8, 4, 16)(torch.randn(1, 10, 8), (5, 2)).shape == (1, 10, 8)
