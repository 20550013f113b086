"""The head router and its layer: gates on every output, all patterns, losses collected from outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.layers.mixture_of_heads import HeadRouter, MixtureOfHeadsAttention, collect_routing
from manyheads.layers.transnext import AggregatedAttention, CosineAttention
from manyheads.ops.mixture_of_heads import mixture_of_heads_attention, query_norm_routing


def _layer(**options) -> MixtureOfHeadsAttention:
    layer = MixtureOfHeadsAttention(16, 4, **{"shared": 1, "active": 2, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return layer.double()


@pytest.mark.parametrize(
    ("shared", "active", "keys"),
    [(3, 2, {"wg", "wg_0", "wg_1"}), (1, 3, {"wg", "wg_0"}), (0, 3, {"wg"}), (8, 0, {"wg_1"})],
)
def test_a_router_has_the_authors_parts(shared: int, active: int, keys: set[str]) -> None:
    router = HeadRouter(16, 8, shared=shared, active=active)
    assert set(router.state_dict()) == {f"{key}.weight" for key in keys}
    found = router(torch.randn(2, 3, 5, 16))
    assert found.gates.shape == (2, 3, 5, 8)
    assert found.chosen.shape == (2, 3, 5, 8 - shared)
    # All gates of a token sum to the number of heads it uses, before the balance of the two kinds.
    if not (shared and active):
        torch.testing.assert_close(found.gates.sum(-1), torch.full((2, 3, 5), float(shared + active)))


@pytest.mark.parametrize("options", [{}, {"head_dim": 3}, {"kv_heads": 2}, {"causal": True}, {"qkv_bias": False}])
@pytest.mark.parametrize("cross", [False, True])
def test_every_pattern_is_the_equation(options: dict, cross: bool) -> None:
    layer = _layer(**options)
    x = torch.randn(2, 6, 16, dtype=torch.double)
    context = torch.randn(2, 8, 16, dtype=torch.double) if cross else x
    real = torch.ones(2, context.shape[1], dtype=torch.bool)
    real[1, -2:] = False
    d, kv = layer.head_dim, layer.kv_heads
    q = layer.qkv(x)[..., : 4 * d].unflatten(-1, (4, d))
    k, v = layer.qkv(context)[..., 4 * d :].unflatten(-1, (2, kv, d)).unbind(2)
    gates = layer.router(x).gates
    out = torch.zeros(2, 6, 4, d, dtype=torch.double)
    for h in range(4):
        scores = torch.einsum("bnd,bmd->bnm", q[:, :, h], k[:, :, h // (4 // kv)]) * d**-0.5
        seen = real[:, None].expand_as(scores)
        if layer.causal:
            seen = seen & torch.ones_like(scores[0], dtype=torch.bool).tril(context.shape[1] - 6)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[:, :, h] = gates[:, :, h, None] * (weights @ v[:, :, h // (4 // kv)])
    found = layer(x, context if cross else None, real=real)
    torch.testing.assert_close(found, layer.proj(out.flatten(2)))


def test_decoding_with_a_cache_is_exact() -> None:
    layer, x = _layer(causal=True, kv_heads=2), torch.randn(2, 7, 16, dtype=torch.double)
    rows, cache = [], None
    for chunk in x.split([3, 1, 1, 2], dim=1):
        out, cache = layer.step(chunk, cache)
        rows.append(out)
    torch.testing.assert_close(torch.cat(rows, dim=1), layer(x))
    assert cache[0].shape == (2, 2, 7, 4)


def test_the_balance_loss_averages_the_layers_that_route() -> None:
    layers = nn.Sequential(_layer(), _layer(shared=4, active=0), _layer(shared=2, active=1))
    x = torch.randn(2, 5, 16, dtype=torch.double)
    with collect_routing(layers) as routing:
        layers(x)
    losses = []
    for layer, given in ((layers[0], x), (layers[2], layers[1](layers[0](x)))):
        losses.append(layer.router(given).balance_loss())
    torch.testing.assert_close(routing.balance_loss(), torch.stack(losses).mean())
    routing.balance_loss().backward()
    assert layers[0].router.wg.weight.grad.abs().sum() > 0
    # Outside the block nothing is collected, and nothing stays in the layers.
    layers(x)
    assert len(routing) == 3
    assert not any(part._forward_hooks for part in layers.modules())


def test_collecting_a_model_without_routers_gives_nothing() -> None:
    with collect_routing(nn.Linear(2, 2)) as routing:
        pass
    assert routing == {}
    assert routing.balance_loss() == 0


def test_gradients_reach_routers_through_the_values_of_their_gates() -> None:
    layer, x = _layer(), torch.randn(1, 3, 16, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())


@pytest.mark.parametrize("kind", [AggregatedAttention, CosineAttention])
def test_transnext_layers_weigh_their_heads(kind: type) -> None:
    extra = {"sr_ratio": 2} if kind is AggregatedAttention else {}
    plain, gated = kind(8, 4, **extra).double(), kind(8, 4, routing=(1, 2), **extra).double()
    gated.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 4, 6, 8, dtype=torch.double)
    seen: list[torch.Tensor] = []
    plain.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain(x)
    gates = gated.router(x).gates.repeat_interleave(2, dim=-1)
    torch.testing.assert_close(gated(x), gated.proj(seen[0] * gates))
    assert {name for name, _ in gated.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "router.wg.weight",
        "router.wg_0.weight",
    }


def test_dropout_keeps_the_gates() -> None:
    layer = CosineAttention(8, 4, routing=(1, 1), attn_drop=1e-9).train()
    x = torch.randn(1, 4, 4, 8)
    torch.testing.assert_close(layer(x), layer.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    layer, x = _layer().float(), torch.randn(2, 5, 16)
    # The choice is discontinuous, so that the inputs are those of the low precision.
    layer, x = layer.to(dtype).float(), x.to(dtype).float()
    expected = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)


def test_empty_and_strided_inputs() -> None:
    layer, x = _layer(), torch.randn(2, 16, 5, dtype=torch.double).transpose(1, 2)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer(x[:, :0]).shape == (2, 0, 16)
    assert layer(x[:, :1]).shape == (2, 1, 16)


def test_both_routers_compile_whole(compiling: None) -> None:
    layer, x = _layer(), torch.randn(2, 5, 16, dtype=torch.double)

    def both(x: torch.Tensor) -> torch.Tensor:
        query = layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
        gates = query_norm_routing(query, shared=1, active=1).gates.transpose(1, 2)
        return mixture_of_heads_attention(query, query, query, gates, causal=True)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureOfHeadsAttention(10, 3, shared=1, active=1), "dim=10 is not a multiple of heads=3"),
        (lambda: MixtureOfHeadsAttention(12, 6, shared=1, active=1, kv_heads=4), "kv_heads=4 must divide heads=6"),
        (lambda: MixtureOfHeadsAttention(12, 6, shared=5, active=2), "active=2 heads of heads - shared = 1"),
        (lambda: HeadRouter(8, 4, shared=1, active=1)(torch.randn(2, 3, 6)), r"x must be \(..., 8\)"),
        (lambda: _layer().step(torch.randn(1, 1, 16)), "needs causal=True"),
        (lambda: CosineAttention(8, 4, routing=(5, 1)), "shared=5 must lie between 0 and heads=4"),
        (
            lambda: _layer().float()(torch.randn(1, 3, 16), real=torch.ones(1, 2, dtype=torch.bool)),
            r"real must be \(batch, keys\) = \(1, 3\)",
        ),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
