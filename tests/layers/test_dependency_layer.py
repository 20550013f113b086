"""Reversed attention with its selector and controller against the equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manyheads.layers.dependency import MessageController, ReversedAttention


def _by_hand(layer: ReversedAttention, x: torch.Tensor, message: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over heads, children and parents one by one."""
    selected = (F.linear(x, layer.head_selector.weight) / layer.temperature).softmax(-1)
    left = message * torch.sigmoid(layer.message_controller.fc2(F.gelu(layer.message_controller.fc1(x))))[..., 0]
    q, k, v = layer.qkv(x).chunk(3, -1)
    heads, width = layer.heads, x.shape[-1] // layer.heads
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for b in range(len(x)):
            for child in range(x.shape[1]):
                shares = (k[b, :, part] @ q[b, child, part] * width**-0.5).softmax(0)
                sent = left[b, child] * selected[b, child, h] * v[b, child, part]
                out[b, :, part] += shares[:, None] * sent
    return layer.proj(out), left


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "temperature": 1.0, "message_bias": 2.0}])
def test_layer_is_the_equation(options: dict) -> None:
    layer = ReversedAttention(12, 3, **options).double()
    x, message = torch.randn(2, 5, 12, dtype=torch.double), torch.rand(2, 5, dtype=torch.double)
    for got, wanted in zip(layer(x, message), _by_hand(layer, x, message)):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(layer(x), layer(x, torch.ones_like(message)))


def test_messages_fall_and_columns_add_up_to_them() -> None:
    layer, x = ReversedAttention(12, 3), torch.randn(2, 5, 12)
    message = torch.rand(2, 5)
    _, left = layer(x, message)
    assert (left < message).all()
    torch.testing.assert_close(layer.dependency(x, message).sum(1), left)


def test_norms_of_queries_and_keys() -> None:
    layer, x = ReversedAttention(12, 3, qk_norm=True), torch.randn(2, 5, 12)
    plain = ReversedAttention(12, 3)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "_norm" not in k})
    assert not torch.allclose(layer(x)[0], plain(x)[0])
    with torch.no_grad():
        layer.qkv.weight[:24] *= 7  # the norms take any factor on queries and keys away
    before = layer.dependency(x)
    with torch.no_grad():
        layer.qkv.weight[:24] *= 3
    torch.testing.assert_close(layer.dependency(x), before, rtol=1e-3, atol=1e-4)


def test_padded_tokens_neither_send_nor_receive() -> None:
    layer, x = ReversedAttention(12, 3), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    y, left = layer(x, mask=mask)
    assert y[0, 3:].eq(0).all()
    torch.testing.assert_close(y[0, :3], layer(x[:1, :3])[0][0])
    torch.testing.assert_close(left[1], layer(x)[1][1])
    assert layer.dependency(x, mask=mask)[0, 3:].eq(0).all()


def test_children_can_send_to_other_tokens() -> None:
    layer, x, parents = ReversedAttention(12, 3, qkv_bias=True), torch.randn(2, 5, 12), torch.randn(2, 4, 12)
    y, left = layer(x, parents=parents)
    assert y.shape == (2, 4, 12)
    torch.testing.assert_close(layer(x, parents=x)[0], layer(x)[0])
    torch.testing.assert_close(layer.dependency(x, parents=parents).sum(1), left)
    assert torch.tril(layer.dependency(x, causal=True), -1).eq(0).all()


def test_a_bias_keeps_messages_alive() -> None:
    x = torch.randn(2, 5, 12)
    assert MessageController(12, bias=3).forward(0 * x).mean() > 0.9
    assert MessageController(12)(0 * x).eq(0.5).all()
    assert MessageController(12, hidden_ratio=1).fc1.out_features == 12


def test_every_backend_gives_the_same() -> None:
    layer, x = ReversedAttention(12, 3, backend="reference"), torch.randn(2, 5, 12)
    for backend in ("auto", "dense", "tiles", "sdpa"):
        other = ReversedAttention(12, 3, backend=backend)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(x), layer(x))


def test_dropout_only_while_training() -> None:
    layer, x = ReversedAttention(12, 3, attn_drop=0.5), torch.randn(2, 5, 12)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_gradients_and_half_precision_and_compile(compiling: None) -> None:
    layer = ReversedAttention(6, 2, temperature=1.0).double()
    x = torch.randn(1, 3, 6, dtype=torch.double, requires_grad=True)
    message = torch.rand(1, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x, message))
    for got, wanted in zip(torch.compile(layer, fullgraph=True, backend="aot_eager")(x, message), layer(x, message)):
        torch.testing.assert_close(got, wanted)
    wanted, half = layer(x)[0], layer.bfloat16()(x.bfloat16())[0]
    torch.testing.assert_close(half.double(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReversedAttention(12, 5), "dim=12 is not a multiple of heads=5"),
        (lambda: ReversedAttention(12, 3, temperature=0), "temperature=0"),
        (lambda: ReversedAttention(12, 3, backend="flash"), "backend='flash'"),
        (lambda: ReversedAttention(12, 3)(torch.randn(1, 4, 8)), r"x must be \(batch, tokens, 12\), got \(1, 4, 8\)"),
        (lambda: ReversedAttention(12, 3)(torch.randn(2, 4, 12), parents=torch.randn(1, 4, 12)), "parents must be"),
        (lambda: MessageController(4, hidden_ratio=0), "hidden_ratio=0"),
        (lambda: ReversedAttention(12, 3)(torch.randn(1, 4, 12), torch.ones(1, 5)), r"= \(1, 4\), got \(1, 5\)"),
        (lambda: ReversedAttention(12, 3)(torch.randn(1, 4, 12), -torch.ones(1, 4)), "must not be negative"),
    ],
)
@pytest.mark.usefixtures("compiling")
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
