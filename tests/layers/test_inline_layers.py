"""InLine attention as layers: the dynamic kernels, the class token, cross-shaped branches, precision, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.layers.inline import InLineAttention, InLineStripeAttention, kernel_maker, local_residual
from manyheads.ops.inline import inline_attention


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_every_sample_is_convolved_with_its_own_kernels() -> None:
    maker = kernel_maker(6, 2).double()
    value, mean = torch.randn(3, 20, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    kernels = maker(mean[..., None])[..., 0].reshape(3, 6, 1, 3, 3)
    maps = value.mT.unflatten(2, (4, 5))
    expected = [F.conv2d(maps[i : i + 1], kernels[i], padding=1, groups=6).flatten(2).mT for i in range(3)]
    torch.testing.assert_close(local_residual(value, (4, 5), mean, maker), torch.cat(expected))


def test_a_head_makes_its_kernels_of_its_own_channels() -> None:
    maker, mean = kernel_maker(6, 2), torch.randn(1, 6, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(maker(mean)[:, : 3 * 9].square().sum(), mean)
    assert gradient[0, :3].ne(0).all()
    assert gradient[0, 3:].eq(0).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("token", [0, 1])
def test_the_layer_is_its_equations(fused, token) -> None:
    layer = InLineAttention(12, 3, class_token=bool(token), fused=fused, kernel="relu").double()
    x = torch.randn(2, 15 + token, 12, dtype=torch.float64)
    q, k, v = (layer.qkv(x) if fused else torch.cat([layer.q(x), layer.kv(x)], -1)).chunk(3, -1)
    out = inline_attention(*(_heads(t, 3) for t in (q, k, v)), kernel="relu").transpose(1, 2).flatten(2)
    # The class token enters the mean of which kernels are made, but has no local term.
    out[:, token:] += local_residual(v[:, token:], (3, 5), x.mean(1), layer.residual)
    torch.testing.assert_close(layer(x, (3, 5)), layer.proj(out))


def test_without_the_local_term_tokens_have_no_places() -> None:
    layer, x, order = InLineAttention(12, 3, local_residual=False), torch.randn(2, 15, 12), torch.randperm(15)
    torch.testing.assert_close(layer(x, (3, 5))[:, order], layer(x[:, order], (5, 3)))


def test_a_branch_adds_position_encoding_and_local_term() -> None:
    branch = InLineStripeAttention(8, 2).double()
    qkv, mean = torch.randn(3, 2, 12, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    out = inline_attention(*(_heads(t, 2) for t in qkv)).transpose(1, 2).flatten(2)
    static = branch.get_v(qkv[2].mT.unflatten(2, (4, 3))).flatten(2).mT
    expected = out + static + local_residual(qkv[2], (4, 3), mean, branch.residual)
    torch.testing.assert_close(branch(qkv, (4, 3), mean), expected)


def test_gradients_reach_every_parameter() -> None:
    layer, x = InLineAttention(6, 2, class_token=True).double(), torch.randn(1, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: layer(x, (2, 2)), x.requires_grad_())
    layer(x, (2, 2)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_bfloat16_stays_close() -> None:
    layer, x = InLineAttention(32, 4), torch.randn(2, 64, 32)
    expected = layer(x, (8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, (8, 8)).float(), expected, atol=0.03, rtol=0.03)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16(), (8, 8)).float(), expected, atol=0.03, rtol=0.03)


def test_the_layer_compiles_whole(compiling) -> None:
    layer, x = InLineAttention(12, 3, class_token=True), torch.randn(2, 16, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, (3, 5)), layer(x, (3, 5)))


@pytest.mark.slow
def test_a_branch_compiles_whole(compiling) -> None:
    branch, given = InLineStripeAttention(8, 2), (torch.randn(3, 2, 12, 8), (4, 3), torch.randn(2, 8))
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), branch(*given))


def test_bad_input() -> None:
    for layer in (InLineAttention, InLineStripeAttention):
        with pytest.raises(ValueError, match="dim=10 is not a multiple of heads=3"):
            layer(10, 3)
        with pytest.raises(ValueError, match="kernel='softmax' is not one of"):
            layer(12, 3, kernel="softmax")
    with pytest.raises(ValueError, match=r"3 x 5 tokens and a class token, got \(2, 15, 12\)"):
        InLineAttention(12, 3, class_token=True)(torch.randn(2, 15, 12), (3, 5))
    with pytest.raises(ValueError, match=r"3 x 4 tokens, got \(2, 15, 12\)"):
        InLineAttention(12, 3)(torch.randn(2, 15, 12), (3, 4))
