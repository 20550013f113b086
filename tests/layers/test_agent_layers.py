"""Agent attention as layers: agent biases, pooling, class token, reduced keys, any size, stripes, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.layers.agent import AgentAttention, AgentBias, AgentStripeAttention


def _layer(*args, **options) -> AgentAttention:
    return AgentAttention(*args, **options).double()


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _stretched(table: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(table, size, mode="bilinear", align_corners=False)


def _pooled(x: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Means over the published bins: rows floor(i H / p) to ceil((i + 1) H / p) - 1, row-major."""
    maps, means = x.unflatten(1, grid), []
    for i in range(cells[0]):
        for j in range(cells[1]):
            rows = slice(i * grid[0] // cells[0], -(-(i + 1) * grid[0] // cells[0]))
            columns = slice(j * grid[1] // cells[1], -(-(j + 1) * grid[1] // cells[1]))
            means.append(maps[:, rows, columns].mean((1, 2)))
    return torch.stack(means, 1)


@pytest.mark.parametrize("token", [0, 1])
def test_the_layer_is_its_equations(token) -> None:
    layer, grid = _layer(12, 3, (5, 8), agents=9, class_token=bool(token)), (5, 8)
    x = torch.randn(2, 40 + token, 12, dtype=torch.float64)
    query, key, value = layer.qkv(x).chunk(3, -1)
    agents = _pooled(query[:, token:], grid, (3, 3))
    b1 = (_stretched(layer.an_bias, grid) + (layer.ah_bias + layer.aw_bias)[0]).flatten(2)
    b2 = _stretched(layer.na_bias, grid).flatten(2).mT + (layer.ha_bias + layer.wa_bias)[0].flatten(1, 2)
    if token:
        b1, b2 = torch.cat([layer.ac_bias[0], b1], 2), torch.cat([layer.ca_bias[0], b2], 1)
    q, k, v, a = (_heads(t, 3) for t in (query, key, value, agents))
    gathered = (a @ k.mT / 2 + b1).softmax(-1) @ v
    out = ((q @ a.mT / 2 + b2).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    out[:, token:] += layer.dwc(value[:, token:].mT.unflatten(2, grid)).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.proj(out))


def test_reduced_keys_are_those_of_the_smaller_map() -> None:
    layer = _layer(12, 3, (4, 6), agents=4, fused=False, reduction=2)
    x = torch.randn(2, 24, 12, dtype=torch.float64)
    assert (layer.ah_bias.shape[3], layer.aw_bias.shape[4], layer.ha_bias.shape[2]) == (2, 3, 4)
    source = layer.norm(layer.sr(x.mT.unflatten(2, (4, 6))).flatten(2).mT)
    key, value = layer.kv(source).chunk(2, -1)
    b1, b2 = layer.biases((4, 6), (2, 3))
    q, k, v, a = (_heads(t, 3) for t in (layer.q(x), key, value, _pooled(layer.q(x), (4, 6), (2, 2))))
    out = (q @ a.mT / 2 + b2).softmax(-1) @ ((a @ k.mT / 2 + b1).softmax(-1) @ v)
    local = layer.dwc(_stretched(value.mT.unflatten(2, (2, 3)), (4, 6))).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).flatten(2) + local))


def test_dense_biases_are_resized_over_the_map_and_over_the_agents() -> None:
    bias = AgentBias(2, 9, (7, 5), any_size=True, agent_grid=(2, 4))
    first, second = bias.biases((6, 8), (6, 8))
    assert (first.shape, second.shape) == ((2, 8, 48), (2, 48, 8))
    lines = (bias.ha_bias + bias.wa_bias)[0].permute(0, 3, 1, 2)
    over_map = _stretched(bias.na_bias, (6, 8)) + _stretched(lines, (6, 8))
    over_agents = _stretched(over_map.flatten(2).mT.unflatten(2, (3, 3)), (2, 4))
    torch.testing.assert_close(second, over_agents.flatten(2))


def test_dense_layers_are_ordinary_ones_at_their_own_size() -> None:
    layer, dense = _layer(12, 3, (5, 8), agents=9), _layer(12, 3, (5, 8), agents=9, any_size=True)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(1, 40, 12, dtype=torch.float64)
    torch.testing.assert_close(dense(x), layer(x))
    assert dense(torch.randn(1, 77, 12, dtype=torch.float64), (7, 11)).shape == (1, 77, 12)


def test_stripes_do_not_see_each_other() -> None:
    layer = AgentStripeAttention(8, 2, (4, 2), agents=4).double()
    qkv = torch.randn(3, 1, 24, 8, dtype=torch.float64)
    changed = qkv.unflatten(2, (4, 6)).clone()
    changed[:, :, :, 2:4] += 1
    before, after = (layer(t, (4, 6)).unflatten(1, (4, 6)) for t in (qkv, changed.flatten(2, 3)))
    same = (before == after).all(-1)[0]
    assert same[:, [0, 1, 4, 5]].all()
    assert not same[:, 2:4].any()


def test_gradients_reach_every_parameter() -> None:
    layer = _layer(6, 2, (3, 3), agents=4, class_token=True)
    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_weights_are_dropped_in_training_alone() -> None:
    layer, x = AgentAttention(12, 3, (4, 4), agents=4, attn_drop=0.5), torch.randn(1, 16, 12)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_biases_are_made_once_in_evaluation_and_follow_the_weights() -> None:
    layer = AgentAttention(8, 2, (4, 3), agents=4).eval()
    with torch.no_grad():
        first = layer.biases((4, 3), (4, 3))
        assert layer.biases((4, 3), (4, 3)) is first
        layer.ah_bias.add_(1)
        torch.testing.assert_close(layer.biases((4, 3), (4, 3))[0], first[0] + 1)
    assert layer.biases((4, 3), (4, 3))[0].requires_grad
    assert not any("kept" in name for name in layer.state_dict())


def test_bfloat16_stays_close() -> None:
    layer, x = AgentAttention(32, 4, (8, 8), agents=16), torch.randn(2, 64, 32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, atol=0.03, rtol=0.03)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), expected, atol=0.03, rtol=0.03)


def test_the_layer_compiles_whole(compiling) -> None:
    layer, x = AgentAttention(12, 3, (3, 5), agents=4, class_token=True), torch.randn(2, 16, 12)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.slow
def test_stripes_compile_whole(compiling) -> None:
    stripes, qkv = AgentStripeAttention(8, 2, (4, 2), agents=4), torch.randn(3, 2, 24, 8)
    compiled = torch.compile(stripes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, (4, 6)), stripes(qkv, (4, 6)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((12, 5, (4, 4)), {}, "dim=12 is not a multiple of heads=5"),
        ((12, 3, (4, 4)), {"agents": 10}, "agents=10 must be a perfect square"),
        ((12, 3, (4, 4)), {"agents": 0}, "agents=0 must be a perfect square"),
        ((12, 3, (4, 4)), {"agents": 4, "reduction": 3, "fused": False}, "reduction=3 must divide the map of 4 x 4"),
        ((12, 3, (4, 4)), {"agents": 4, "reduction": 2}, "needs fused=False"),
        ((12, 3, (4, 4)), {"agents": 4, "agent_grid": (2, 3)}, r"agent_grid=\(2, 3\) .* needs any_size"),
    ],
)
def test_bad_options(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        AgentAttention(*arguments, **options)


def test_maps_that_do_not_fit() -> None:
    layer = AgentAttention(12, 3, (4, 4), agents=4)
    with pytest.raises(ValueError, match=r"4 x 4 tokens, got \(2, 15, 12\)"):
        layer(torch.randn(2, 15, 12))
    with pytest.raises(ValueError, match="of a map of 4 x 4 tokens, got 3 x 5; set_input_size"):
        layer(torch.randn(2, 15, 12), (3, 5))
    with pytest.raises(ValueError, match="stripes of 4 x 4 tokens do not divide a map of 4 x 6"):
        AgentStripeAttention(12, 3, (4, 4), agents=4)(torch.randn(3, 1, 24, 12), (4, 6))
