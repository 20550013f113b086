"""Mixer gating: the fast path against the formula, and what the operator promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.ops.mixer_gate import GateWeights, mixer_gating, resize_token_mixing, token_mixing_gate


def _weights(tokens: int, channels: int, hidden: int = 5, inner: int = 3, dtype: torch.dtype = torch.double) -> tuple:
    def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(shape, dtype=dtype) / 2, torch.randn(shape[0], dtype=dtype)

    gate = GateWeights(
        pair(channels), pair(hidden, tokens), pair(tokens, hidden), pair(channels), pair(inner, channels),
        pair(channels, inner),
    )  # fmt: skip
    return pair(channels, channels), gate


@settings(max_examples=20, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 9), channels=st.integers(1, 7), hidden=st.integers(1, 6), inner=st.integers(1, 6))
def test_the_fast_path_is_the_formula(tokens: int, channels: int, hidden: int, inner: int) -> None:
    x, weights = torch.randn(2, tokens, channels, dtype=torch.double), _weights(tokens, channels, hidden, inner)
    torch.testing.assert_close(mixer_gating(x, *weights), mixer_gating(x, *weights, backend="reference"))


def test_the_formula_token_by_token() -> None:
    projection, weights = _weights(4, 3)
    x = torch.randn(1, 4, 3, dtype=torch.double)
    normed = torch.nn.functional.layer_norm(x, (3,), *weights.token_norm)
    hidden = torch.nn.functional.gelu(torch.einsum("tn,bnc->btc", weights.token_in[0], normed).mT + weights.token_in[1])
    mixed = x + (torch.einsum("nt,bct->bcn", weights.token_out[0], hidden) + weights.token_out[1]).mT
    normed = torch.nn.functional.layer_norm(mixed, (3,), *weights.channel_norm)
    hidden = torch.nn.functional.gelu(normed @ weights.channel_in[0].T + weights.channel_in[1])
    gate = mixed + hidden @ weights.channel_out[0].T + weights.channel_out[1]
    for backend in ("fused", "reference"):
        torch.testing.assert_close(token_mixing_gate(x, weights, backend=backend), gate)
        expected = (x @ projection[0].T + projection[1]) * gate
        torch.testing.assert_close(mixer_gating(x, projection, weights, backend=backend), expected)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_gradients(backend: str) -> None:
    projection, weights = _weights(4, 3, 2, 2)
    flat = [tensor.requires_grad_() for pair in (projection, *weights) for tensor in pair]

    def run(x: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        pairs = list(zip(flat[::2], flat[1::2]))
        return mixer_gating(x, pairs[0], GateWeights(*pairs[1:]), backend=backend)

    x = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *flat))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    (p, gate), x = _weights(6, 8, dtype=torch.float32), torch.randn(2, 6, 8)
    half = [tuple(tensor.to(dtype) for tensor in pair) for pair in (p, *gate)]
    out = mixer_gating(x.to(dtype), half[0], GateWeights(*half[1:]))
    assert out.dtype == dtype
    exact = [tuple(tensor.float() for tensor in pair) for pair in half]
    expected = mixer_gating(x.to(dtype).float(), exact[0], GateWeights(*exact[1:]), backend="reference")
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_large_strided_expanded_and_empty_inputs() -> None:
    weights = _weights(6, 4)
    x = torch.randn(4, 6, 2, dtype=torch.double).permute(2, 1, 0)
    torch.testing.assert_close(mixer_gating(x, *weights), mixer_gating(x.contiguous(), *weights))
    one = torch.randn(1, 6, 4, dtype=torch.double).expand(3, -1, -1)
    torch.testing.assert_close(mixer_gating(one, *weights), mixer_gating(one.clone(), *weights))
    for backend in ("fused", "reference"):
        assert mixer_gating(x[:0], *weights, backend=backend).shape == (0, 6, 4)
        assert mixer_gating(1e4 * x, *weights, backend=backend).isfinite().all()


def test_dropout_thins_the_gate_and_nothing_else() -> None:
    projection, weights = _weights(6, 4)
    x = torch.randn(64, 6, 4, dtype=torch.double)
    # With every second linear at zero but for its bias, the gate is x plus what is left of the biases.
    silent = weights._replace(
        token_out=(torch.zeros(6, 5).double(), torch.ones(6).double()),
        channel_out=(torch.zeros(4, 3).double(), torch.ones(4).double()),
    )
    for backend in ("fused", "reference"):
        added = token_mixing_gate(x, silent, dropout=0.5, backend=backend) - x
        assert {round(value, 6) for value in added.flatten().tolist()} == {0.0, 2.0, 4.0}
        assert abs(added.mean().item() - 2) < 0.15
    torch.manual_seed(3)
    gate = token_mixing_gate(x, weights, dropout=0.5)
    torch.manual_seed(3)
    out = mixer_gating(x, projection, weights, dropout=0.5)
    torch.testing.assert_close(out, (x @ projection[0].T + projection[1]) * gate)


def test_resizing_keeps_the_answer_on_constant_maps() -> None:
    _, weights = _weights(36, 4)
    gate = weights._replace(
        token_in=(torch.randn(5, 1).double().expand(5, 36) / 36, weights.token_in[1]),
        token_out=(torch.randn(1, 5).double().expand(36, 5), torch.randn(1).double().expand(36)),
    )
    token_in, token_out = resize_token_mixing(gate.token_in, gate.token_out, (6, 6), (4, 10))
    x = torch.randn(2, 1, 4, dtype=torch.double)
    before = token_mixing_gate(x.expand(2, 36, 4), gate)
    after = token_mixing_gate(x.expand(2, 40, 4), gate._replace(token_in=token_in, token_out=token_out))
    torch.testing.assert_close(after, before[:, :1].expand(2, 40, 4))
    same = resize_token_mixing(weights.token_in, weights.token_out, (6, 6), (6, 6))
    assert same[0] is weights.token_in
    with pytest.raises(ValueError, match="not for a map of 5 x 7"):
        resize_token_mixing(weights.token_in, weights.token_out, (5, 7), (6, 6))


def test_compiles_and_exports_whole(compiling: None) -> None:
    x, weights = torch.randn(2, 6, 4, dtype=torch.double), _weights(6, 4)
    compiled = torch.compile(mixer_gating, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *weights), mixer_gating(x, *weights))


def test_autocast() -> None:
    x, weights = torch.randn(2, 6, 4), _weights(6, 4, dtype=torch.float32)
    expected = mixer_gating(x, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        out = mixer_gating(x, *weights)
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
        assert mixer_gating(x.bfloat16(), *weights).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 5, 4), {}, "the weights mix 6 tokens, x has 5"),
        ((2, 6, 3), {}, r"token_norm must be \(3,\)"),
        ((6, 4), {}, r"\(batch, tokens, channels\)"),
        ((2, 6, 4), {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ((2, 6, 4), {"dropout": -0.1}, "dropout=-0.1"),
        ((2, 6, 4), {"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_input(shape: tuple[int, ...], options: dict, message: str) -> None:
    if len(shape) == 3:
        with pytest.raises(ValueError, match=message):
            mixer_gating(torch.ones(shape, dtype=torch.double), *_weights(6, 4), **options)
    else:
        # Tests check annotated shapes before the operator does.
        with pytest.raises(Exception, match="x"):
            mixer_gating(torch.ones(shape, dtype=torch.double), *_weights(6, 4), **options)


def test_bad_weights() -> None:
    (p, gate), x = _weights(6, 4), torch.ones(1, 6, 4, dtype=torch.double)
    with pytest.raises(ValueError, match=r"projection must be \(4, 4\)"):
        mixer_gating(x, (p[0][:3], p[1][:3]), gate)
    with pytest.raises(ValueError, match=r"token_out must be \(6, 5\)"):
        mixer_gating(x, p, gate._replace(token_out=gate.token_in))
    with pytest.raises(TypeError, match=r"must be torch.float32 like x"):
        mixer_gating(x.float(), p, gate)
    with pytest.raises(TypeError, match=r"floating-point|parameter 'x'"):
        token_mixing_gate(torch.ones(1, 6, 4, dtype=torch.complex64), gate)
