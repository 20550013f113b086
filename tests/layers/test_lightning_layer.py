"""The TNL attention layer: keys, state in and out, padding, bad input."""

from __future__ import annotations

import pytest
import torch

from manyheads.layers.lightning import TNLAttention


def test_keys_are_the_authors():
    keys = set(TNLAttention(16, 2, bias=True).state_dict())
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "output_gate.0", "output_gate.1")
    assert keys == {f"{n}.{p}" for n in (*linears, "norm") for p in ("weight", "bias")}


def test_state_carries_the_past():
    layer = TNLAttention(16, 2, layer_idx=1, num_layers=3).double()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    whole = layer(x)
    first, state = layer(x[:, :13], return_state=True)
    second, state = layer(x[:, 13:], state=state, return_state=True)
    assert state.shape == (2, 2, 8, 8)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    layer, x = TNLAttention(16, 2), torch.randn(1, 9, 16)
    pad = torch.randn(1, 4, 16)
    mask = torch.ones(1, 13, dtype=torch.bool)
    real = slice(4, 13) if side == "left" else slice(0, 9)
    mask[:, :4] = side == "right"
    mask[:, 9:] = side == "left"
    padded = torch.cat([pad, x] if side == "left" else [x, pad], dim=1)
    torch.testing.assert_close(layer(padded, mask=mask)[:, real], layer(x))


def test_all_parameters_learn():
    layer = TNLAttention(16, 2, bias=True)
    layer(torch.randn(2, 10, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="num_heads=3 must divide embed_dim=16"):
        TNLAttention(16, 3)
    with pytest.raises(ValueError, match="layer=5 is outside"):
        TNLAttention(16, 2, layer_idx=5, num_layers=5)
