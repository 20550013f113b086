"""TransNeXt's layers: the position bias at every pair of sizes, the pooled branch, the gated unit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.layers.conv_ffn import ConvGLU
from manyheads.layers.transnext import AggregatedAttention, CosineAttention, PositionBias
from manyheads.ops.aggregated import aggregated_attention


def _bias_by_hand(bias: PositionBias, grid: tuple[int, int], pooled: tuple[int, int]) -> torch.Tensor:
    """The MLP on the coordinates of every single pair of query and cell."""
    axes = []
    for side, cells in zip(grid, pooled):
        centres = F.adaptive_avg_pool1d(torch.arange(side, dtype=torch.double)[None], cells)[0]
        distance = (torch.arange(side)[:, None] - centres) / max((bias.side or side) - 1, 1) * 8
        axes.append(distance.sign() * (1 + distance.abs()).log2() / math.log2(8))
    rows, columns = axes
    pairs = torch.stack(torch.broadcast_tensors(rows[:, None, :, None], columns[None, :, None]), -1)
    return bias.cpb_fc2(F.relu(bias.cpb_fc1(pairs))).permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data(), side=st.none() | st.integers(2, 9))
def test_position_bias_is_the_network_of_every_distance(data, side) -> None:
    grid = tuple(data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7))))
    pooled = tuple(data.draw(st.integers(1, length)) for length in grid)
    bias = PositionBias(2, side=side).double()
    torch.testing.assert_close(bias(grid, pooled), _bias_by_hand(bias, grid, pooled), rtol=1e-6, atol=1e-6)


def test_position_bias_takes_a_unit_for_each_axis() -> None:
    both, rows, columns = (PositionBias(2, side=side).double() for side in ((4, 9), 4, 9))
    for other in (rows, columns):
        other.load_state_dict(both.state_dict())
    torch.testing.assert_close(both((5, 1), (5, 1)), rows((5, 1), (5, 1)))
    torch.testing.assert_close(both((1, 5), (1, 5)), columns((1, 5), (1, 5)))
    assert not torch.allclose(both((5, 5), (5, 5)), rows((5, 5), (5, 5)))


def test_interpolation_resizes_along_the_keys_then_along_the_queries() -> None:
    bias = PositionBias(2, side=8, base=((8, 8), (4, 4)), mode="interpolate").double()
    table = _bias_by_hand(bias, (8, 8), (4, 4)).view(2, 64, 4, 4)
    table = F.interpolate(table, size=(5, 3), mode="bilinear").flatten(2).mT.reshape(2, 15, 8, 8)
    expected = F.interpolate(table, size=(10, 6), mode="bilinear").flatten(2).mT
    torch.testing.assert_close(bias((10, 6), (5, 3)), expected, rtol=1e-6, atol=1e-6)
    other = PositionBias(2, side=8).double()
    other.load_state_dict(bias.state_dict())
    torch.testing.assert_close(bias((8, 8), (4, 4)), other((8, 8), (4, 4)))
    assert not torch.allclose(bias((10, 6), (5, 3)), other((10, 6), (5, 3)))


def test_the_kept_table_follows_the_weights_and_the_size() -> None:
    bias = PositionBias(2).eval()
    with torch.no_grad():
        first = bias((4, 4), (2, 2))
        assert bias((4, 4), (2, 2)) is first
        assert bias((6, 4), (2, 2)).shape == (2, 24, 4)
        bias.cpb_fc2.bias.add_(1)
        torch.testing.assert_close(bias((4, 4), (2, 2)), first + 1)
    assert bias((4, 4), (2, 2)).requires_grad
    assert set(bias.state_dict()) == {"cpb_fc1.weight", "cpb_fc1.bias", "cpb_fc2.weight", "cpb_fc2.bias"}


def _randomise(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return layer


@pytest.mark.parametrize("options", [{"sr_ratio": 2}, {"sr_ratio": 1, "fixed_pool_size": 3}, {"sr_ratio": 3}])
def test_aggregated_layer_is_the_operator_on_its_projections(options: dict) -> None:
    layer = _randomise(AggregatedAttention(8, 2, **options).double())
    x = torch.randn(2, 6, 7, 8, dtype=torch.double)
    pooled = (3, 3) if "fixed_pool_size" in options else (6 // options["sr_ratio"], 7 // options["sr_ratio"])
    coarse = F.adaptive_avg_pool2d(F.gelu(layer.sr(x)).permute(0, 3, 1, 2), pooled).flatten(2).mT

    def heads(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (2, 4)).movedim(-2, 1)

    key, value = (heads(part) for part in layer.kv(x).chunk(2, -1))
    far_key, far_value = (
        heads(part) for part in layer.kv(F.layer_norm(coarse, (8,), layer.norm.weight, layer.norm.bias)).chunk(2, -1)
    )
    out = aggregated_attention(
        heads(layer.q(x)), key, value, far_key, far_value,
        temperature=layer.temperature, query_embedding=layer.query_embedding,
        bias_local=layer.relative_pos_bias_local, bias_pool=_bias_by_hand(layer.position, (6, 7), pooled),
        learnable_tokens=layer.learnable_tokens, learnable_bias=layer.learnable_bias, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(layer(x), layer.proj(out.movedim(1, -2).flatten(-2)), rtol=1e-5, atol=1e-5)


def test_cosine_attention_is_the_equation() -> None:
    layer = _randomise(CosineAttention(8, 2).double())
    x = torch.randn(2, 3, 5, 8, dtype=torch.double)
    q, k, v = (part.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    scores = (q + layer.query_embedding) @ k.mT * F.softplus(layer.temperature) * math.log(15)
    out = (scores + _bias_by_hand(layer.position, (3, 5), (3, 5))).softmax(-1) @ v
    expected = layer.proj(out.transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_gated_unit_is_the_equation() -> None:
    layer = ConvGLU(4, 5).double()
    x = torch.randn(2, 4, 3, 4, dtype=torch.double)
    gate, value = layer.fc1(x).split(5, -1)
    gate = F.conv2d(gate.permute(0, 3, 1, 2), layer.dwconv.weight, layer.dwconv.bias, padding=1, groups=5)
    torch.testing.assert_close(layer(x), layer.fc2(F.gelu(gate).permute(0, 2, 3, 1) * value))


def test_layers_begin_as_published() -> None:
    layer = AggregatedAttention(48, 2, sr_ratio=2)
    torch.testing.assert_close(F.softplus(layer.temperature), torch.full((2, 1, 1), 1 / 0.24))
    assert layer.learnable_bias.eq(0).all()
    assert layer.learnable_tokens.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("layer", [AggregatedAttention(4, 2, sr_ratio=2), CosineAttention(4, 2), ConvGLU(4, 6)])
def test_gradients(layer: torch.nn.Module) -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 6, 8)
    for layer in (AggregatedAttention(8, 2, sr_ratio=2), CosineAttention(8, 2), ConvGLU(8, 10)):
        expected = layer(x)
        out = layer.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_strided_and_empty_inputs() -> None:
    x = torch.randn(2, 8, 4, 6).permute(0, 2, 3, 1)
    for layer in (AggregatedAttention(8, 2, sr_ratio=2), CosineAttention(8, 2)):
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
        assert layer(x[:0]).shape == (0, 4, 6, 8)


def test_attention_dropout_acts_in_training_only() -> None:
    x = torch.randn(1, 4, 4, 8)
    for layer in (AggregatedAttention(8, 2, sr_ratio=2, attn_drop=0.5), CosineAttention(8, 2, attn_drop=0.5)):
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        torch.testing.assert_close(layer(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AggregatedAttention(10, 3), "dim=10 is not a multiple of heads=3"),
        (lambda: CosineAttention(10, 3), "dim=10 is not a multiple of heads=3"),
        (lambda: AggregatedAttention(8, 2, window=4), "window=4 must be odd"),
        (lambda: AggregatedAttention(8, 2, sr_ratio=0), "sr_ratio=0"),
        (lambda: AggregatedAttention(8, 2, sr_ratio=4)(torch.randn(1, 3, 5, 8)), "smaller than sr_ratio=4"),
        (lambda: AggregatedAttention(8, 2, fixed_pool_size=3)(torch.randn(1, 3, 5, 8)), "must be below both sides"),
        (lambda: AggregatedAttention(8, 2)(torch.randn(1, 3, 5, 6)), r"x must be \(batch, X, Y, 8\)"),
        (lambda: PositionBias(2, side=1), "side=1 at pre-training must be at least 2"),
        (lambda: PositionBias(2, mode="interpolate"), "needs base"),
        (lambda: PositionBias(2, mode="bicubic"), "mode='bicubic'"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
