"""The layers between latents and maps: against the equations, gradients, padding, other dtypes, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.layers.latent import CrossLayer, LatentAttention, SelfLayer


def _shaken(layer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def _by_loops(layer: LatentAttention, x: torch.Tensor, y: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for b in range(len(x)):
        q, v = x[b] @ layer.q_proj.weight.T, y[b] @ layer.v_proj.weight.T
        k = y[b] @ layer.k_proj.weight.T + (0 if layer.key_table is None else layer.key_table[0])
        heads = []
        for h in range(layer.heads):
            d, e = q.shape[1] // layer.heads, v.shape[1] // layer.heads
            scores = (q[:, h * d : (h + 1) * d] @ k[:, h * d : (h + 1) * d].T / d**0.5)[:, ~padding[b]]
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            heads.append(weights / weights.sum(1, keepdim=True) @ v[~padding[b], h * e : (h + 1) * e])
        out[b] = torch.cat(heads, 1) @ layer.o_proj.weight.T + layer.o_proj.bias
    return out


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 6),
    keys=st.integers(2, 9),
    table=st.booleans(),
    inner=st.sampled_from([None, 4]),
    seed=st.integers(0, 99),
)
def test_attention_is_its_equation(heads: int, queries: int, keys: int, table: bool, inner: int | None, seed: int):
    torch.manual_seed(seed)
    layer = LatentAttention(8, 6, heads, qk_dim=inner, v_dim=12, keys=keys if table else None).double()
    _shaken(layer)
    x, y = torch.randn(2, queries, 8).double(), torch.randn(2, keys, 6).double()
    padding = torch.rand(2, keys) < 0.4
    padding[:, 0] = False
    torch.testing.assert_close(layer(x, y, padding), _by_loops(layer, x, y, padding))
    torch.testing.assert_close(layer(x, y), _by_loops(layer, x, y, torch.zeros_like(padding)))


def test_reference_and_fast_path_agree() -> None:
    fast = _shaken(LatentAttention(16, 16, 4, keys=9))
    plain = LatentAttention(16, 16, 4, keys=9, backend="reference")
    plain.load_state_dict(fast.state_dict())
    x, y = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    torch.testing.assert_close(fast(x, y), plain(x, y))


def test_layers_are_residual_with_norms_in_front() -> None:
    cross, own = _shaken(CrossLayer(8, 6, 2, mlp_ratio=2)), _shaken(SelfLayer(8, 2, mlp_ratio=2))
    x, y = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    u = x + cross.attention(cross.q_norm(x), cross.kv_norm(y))
    inner = torch.nn.functional.gelu(cross.mlp.fc1(cross.mlp.layernorm(u)))
    torch.testing.assert_close(cross(x, y), u + cross.mlp.fc2(inner))
    u = x + own.attention(own.norm(x), own.norm(x))
    torch.testing.assert_close(own(x), u + own.mlp(u))


def test_padded_keys_do_not_count() -> None:
    layer = _shaken(CrossLayer(8, 8))
    x, y = torch.randn(1, 4, 8), torch.randn(1, 6, 8)
    padding = torch.tensor([[False, False, True, False, True, True]])
    torch.testing.assert_close(layer(x, y, padding), layer(x, y[:, [0, 1, 3]]))
    own = _shaken(SelfLayer(8))
    torch.testing.assert_close(own(y, padding)[:, [0, 1, 3]], own(y[:, [0, 1, 3]]))
    nothing = layer.attention(x, y, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(nothing, layer.attention.o_proj.bias.expand(1, 4, 8))


def test_dropout_thins_the_weights_in_training_alone() -> None:
    layer = _shaken(LatentAttention(8, 8, 2, dropout=0.5))
    x, padding = torch.randn(1, 6, 8), torch.tensor([[False] * 3 + [True] * 3])
    assert not torch.equal(layer(x, x), layer(x, x))
    assert torch.equal(layer.eval()(x, x), layer(x, x))
    layer.train()
    mean = torch.stack([layer(x, x, padding) for _ in range(1000)]).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x, x, padding), atol=0.2, rtol=0)
    hidden = layer.train()(x, x, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(hidden, layer.o_proj.bias.expand(1, 6, 8))


def test_gradients() -> None:
    layer = _shaken(CrossLayer(4, 3, 2, keys=3)).double()
    x, y = (torch.randn(1, n, d, dtype=torch.double, requires_grad=True) for n, d in ((2, 4), (3, 3)))
    names, values = zip(*layer.named_parameters())

    def run(x: torch.Tensor, y: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x, y))

    assert torch.autograd.gradcheck(run, (x, y, *values))


def test_bfloat16_and_views() -> None:
    layer = _shaken(CrossLayer(16, 16, 2))
    x = torch.randn(2, 16, 5).mT
    y = torch.randn(1, 7, 16).expand(2, -1, -1)
    expected = layer(x.contiguous(), y.contiguous())
    torch.testing.assert_close(layer(x, y), expected)
    half = layer.bfloat16()(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.1)


def test_large_scores_stay_finite() -> None:
    layer = LatentAttention(4, 4)
    x = 1e4 * torch.randn(1, 3, 4)
    assert layer(x, x).isfinite().all()


def test_compiles_whole(compiling: None) -> None:
    layer = _shaken(CrossLayer(8, 8, 2, keys=5)).eval()
    x, y = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    padding = torch.rand(2, 5) < 0.3
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(x, y, padding), layer(x, y, padding))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads=3 must divide"),
        ({"qk_dim": 6, "heads": 4}, "qk_dim=6"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"keys": 0}, "keys=0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentAttention(8, 8, **options)


@pytest.mark.parametrize(
    ("query", "key", "padding", "message"),
    [
        ((1, 2, 7), (1, 5, 8), None, r"query must be \(batch, N, 8\)"),
        ((1, 2, 8), (2, 5, 8), None, r"key must be \(1, L, 8\)"),
        ((1, 2, 8), (1, 4, 8), None, "for 5 keys, got 4"),
        ((1, 2, 8), (1, 5, 8), (1, 4), "other attention masks are not supported"),
    ],
)
def test_bad_input(query: tuple, key: tuple, padding: tuple | None, message: str) -> None:
    mask = None if padding is None else torch.zeros(padding, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        LatentAttention(8, 8, keys=5)(torch.randn(query), torch.randn(key), mask)
