"""The position-aware token module and the two gates against the equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.layers.dual_token import BiDimensionalAttention, HalvingStep, PositionAwareTokens


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Head by head, with the matrix of all pairs."""
    out = []
    for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        out.append((q_h @ k_h.mT * q_h.shape[-1] ** -0.5).softmax(-1) @ v_h)
    return torch.cat(out, -1)


def _by_hand(module: PositionAwareTokens, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the order of the paper: the 1x1 convolution before the mean, means of what is there at the borders."""
    batch, rows, columns, dim = x.shape
    maps = x.permute(0, 3, 1, 2)
    for step in module.down:
        maps = step.pw(step.dw(maps))
        cells = [
            maps[:, :, i : i + 2, j : j + 2].mean((2, 3))
            for i in range(0, maps.shape[2], 2)
            for j in range(0, maps.shape[3], 2)
        ]
        maps = torch.stack(cells, -1).unflatten(-1, (-(-maps.shape[2] // 2), -1))
    side = module.token_size
    if maps.shape[2:] != (side, side):
        maps = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
    q, k, v = module.agg_qkv(module.norm_ds(maps.flatten(2).mT)).chunk(3, -1)
    aggregated = module.agg_proj(_attend(q, k, v, module.heads))
    normed = module.norm_g(g)
    if module.mlp == "mix":
        mixed = torch.einsum("st,btc->bsc", module.token_fc.weight, normed) + module.token_fc.bias[:, None]
        old = module.channel_fc(F.gelu(mixed))
    else:
        old = module.fc2(F.gelu(module.fc1(normed)))
    new = module.alpha * old + (1 - module.alpha) * aggregated
    k, v = module.kv(new).chunk(2, -1)
    spread = module.proj(_attend(module.q(module.norm_x(x.flatten(1, 2))), k, v, module.heads))
    return spread.view(batch, rows, columns, dim), new


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)), steps=st.integers(0, 2), side=st.integers(1, 3),
    mlp=st.sampled_from(["mix", "normal"]), alpha=st.sampled_from([0, 0.1, 1]),
)  # fmt: skip
def test_module_is_the_equations(size, steps, side, mlp, alpha) -> None:
    torch.manual_seed(0)
    module = PositionAwareTokens(4, 2, steps=steps, token_size=side, mlp=mlp, alpha=alpha).double()
    x, g = torch.randn(2, *size, 4, dtype=torch.double), torch.randn(2, side**2, 4, dtype=torch.double)
    for got, wanted in zip(module(x, g), _by_hand(module, x, g)):
        torch.testing.assert_close(got, wanted)


def test_large_maps_can_be_averaged_whole() -> None:
    bilinear, adaptive = (PositionAwareTokens(4, 2, token_size=2, resize=word) for word in ("bilinear", "adaptive"))
    adaptive.load_state_dict(bilinear.state_dict())
    x = torch.zeros(1, 8, 8, 4)
    x[:, 0, 0] = torch.randn(4)  # a corner that bilinear sampling of four points passes over
    empty = torch.zeros_like(x)
    torch.testing.assert_close(bilinear.aggregate(x), bilinear.aggregate(empty))
    assert not torch.allclose(adaptive.aggregate(x), adaptive.aggregate(empty))


def test_halving_reaches_the_borders() -> None:
    step, x = HalvingStep(3), torch.randn(1, 5, 3, 3)
    assert step(x).shape == (1, 3, 2, 3)
    whole = step.pw(step.dw(x.permute(0, 3, 1, 2)))
    torch.testing.assert_close(step(x)[0, 2, 1], whole[0, :, 4, 2])
    assert HalvingStep(3, factor=4)(x).shape == (1, 2, 1, 3)


def test_gates_are_the_equation() -> None:
    layer, x = BiDimensionalAttention(9), torch.randn(2, 3, 4, 9)
    assert layer.reduced == 2
    normed = layer.norm(x).flatten(1, 2)
    a = F.gelu(layer.global_reduce(normed.mean(1, keepdim=True)))
    both = torch.cat([F.gelu(layer.local_reduce(normed)), a.expand(-1, 12, -1)], -1)
    wanted = x.flatten(1, 2) * layer.channel_select(a).sigmoid() * layer.spatial_select(both).sigmoid()
    torch.testing.assert_close(layer(x).flatten(1, 2), wanted)


def test_every_backend_gives_the_same() -> None:
    module, x = PositionAwareTokens(8, 2, token_size=2, backend="reference"), torch.randn(2, 3, 5, 8)
    g = torch.randn(2, 4, 8)
    for backend in ("auto", "sdpa", "blocked"):
        other = PositionAwareTokens(8, 2, token_size=2, backend=backend)
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(other(x, g), module(x, g))


def test_tokens_keep_their_precision_under_autocast() -> None:
    module, x, g = PositionAwareTokens(4, 2, token_size=2), torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4)
    expected = module(x, g)
    with torch.autocast("cpu", torch.bfloat16):
        spread, tokens = module(x, g)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close((spread.float(), tokens), expected, rtol=0.05, atol=0.05)
    half = module.bfloat16()(x.bfloat16(), g.bfloat16())
    assert half[1].dtype == torch.bfloat16
    torch.testing.assert_close(tuple(t.float() for t in half), expected, rtol=0.05, atol=0.05)


def test_gradients_and_compile(compiling: None) -> None:
    module = PositionAwareTokens(4, 2, steps=1, token_size=2).double()
    x, g = (torch.randn(1, *s, 4, dtype=torch.double, requires_grad=True) for s in ((3, 4), (4,)))
    assert torch.autograd.gradcheck(module, (x, g))
    gates = BiDimensionalAttention(4).double()
    assert torch.autograd.gradcheck(gates, (x,))
    for got, wanted in zip(torch.compile(module, fullgraph=True, backend="aot_eager")(x, g), module(x, g)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PositionAwareTokens(8, 3), "dim=8 is not a multiple of heads=3"),
        (lambda: PositionAwareTokens(8, 2, token_size=0), "token_size=0"),
        (lambda: PositionAwareTokens(8, 2, alpha=1.5), "alpha=1.5"),
        (lambda: PositionAwareTokens(8, 2, mlp="wide"), "mlp='wide'"),
        (lambda: PositionAwareTokens(8, 2, resize="nearest"), "resize='nearest'"),
        (
            lambda: PositionAwareTokens(8, 2, token_size=2)(torch.randn(1, 3, 3, 8), torch.randn(1, 9, 8)),
            r"= \(1, 4, 8\)",
        ),
        (
            lambda: PositionAwareTokens(8, 2, token_size=2)(torch.randn(1, 3, 3, 4), torch.randn(1, 4, 8)),
            "x must be a map",
        ),
        (lambda: PositionAwareTokens(8, 2, backend="flash"), "backend='flash'"),
        (lambda: BiDimensionalAttention(3), "reduction=4 must be between 1 and dim=3"),
    ],
)
@pytest.mark.usefixtures("compiling")
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
