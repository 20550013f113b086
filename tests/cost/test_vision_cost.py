"""The cost formulas of vision operators against what torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads.cost import cost
from manyheads.layers.mixer_gate import MixerGating
from manyheads.ops.agent import agent_attention
from manyheads.ops.aggregated import aggregated_attention
from manyheads.ops.halo import halo_attention
from manyheads.ops.hilo import hilo_attention, low_head_count
from manyheads.ops.inline import inline_attention
from manyheads.ops.multi_axis import block_attention, grid_attention
from manyheads.ops.reversed import reversed_attention

SIZES = dict(batch=2, heads=4, head_dim=16, element_bytes=4)


def _counted(function, *inputs) -> int:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        function(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("window", "alpha"), [(2, 0.9), (2, 0), (4, 0.5), (1, 0.5)])
def test_hilo_counts_what_torch_counts(window: int, alpha: float) -> None:
    x = torch.randn(2, 4, 8, 12, 16, device="meta")
    low = low_head_count(4, alpha, window)
    found = cost("litv2", 96, window=window, alpha=alpha, **SIZES)
    assert _counted(lambda: hilo_attention(x, x, x, window=window, low_heads=low)) == found.forward_flops
    assert found.backward_flops == 2.5 * found.forward_flops


def test_a_spectral_filter_costs_n_log_n() -> None:
    short, long = cost("spectformer", 1024, **SIZES), cost("spectformer", 4096, **SIZES)
    assert long.forward_flops / short.forward_flops == pytest.approx(4 * 63 / 53)
    assert short.forward_flops == 2 * 4 * 16 * 1024 * 53


@pytest.mark.parametrize("window", [3, 5])
def test_aggregated_counts_what_torch_counts(window: int) -> None:
    x, far = torch.randn(2, 4, 8, 12, 16, device="meta"), torch.randn(2, 4, 6, 16, device="meta")
    learnt = {"temperature": torch.ones(4, 1, 1, device="meta")}
    learnt |= {"learnable_tokens": torch.ones(4, 16, window**2, device="meta")}
    found = cost("transnext", 96, window=window, pooled=6, **SIZES)
    counted = _counted(lambda: aggregated_attention(x, x, x, far, far, window=window, backend="reference", **learnt))
    assert counted == found.forward_flops


def test_block_and_grid_count_what_torch_counts() -> None:
    x = torch.randn(2, 4, 8, 12, 16, device="meta")
    found = cost("maxvit", 96, partition=4, **SIZES)
    both = [_counted(lambda f=f: f(x, x, x, partition=4)) for f in (block_attention, grid_attention)]
    assert sum(both) == found.forward_flops


def test_a_halo_counts_what_torch_counts() -> None:
    x = torch.randn(2, 4, 8, 12, 16, device="meta")
    found = cost("halonet", 96, block=4, halo=1, **SIZES)
    assert _counted(lambda: halo_attention(x, x, x, block=4, halo=1)) == found.forward_flops
    assert found.traffic_bytes > cost("maxvit", 96, **SIZES).traffic_bytes / 2


def test_a_mixer_gate_counts_what_torch_counts() -> None:
    unit, x = MixerGating(64, 96, 24, 40).to("meta"), torch.randn(2, 96, 64, device="meta")
    found = cost("ninformer", 96, tokens_hidden=24, channels_hidden=40, **SIZES)
    # torch counts products of matrices, not the product with the gate.
    assert _counted(unit.eval(), x) + x.numel() == found.forward_flops
    parameters = sum(parameter.numel() for parameter in unit.parameters())
    assert found.traffic_bytes == 4 * (2 * x.numel() + parameters)
    assert cost("ninformer", 4096, **SIZES).forward_flops == 4 * cost("ninformer", 1024, **SIZES).forward_flops


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_inline_counts_what_torch_counts(kv_heads: int) -> None:
    query, key = (torch.randn(2, heads, 96, 16, device="meta") for heads in (4, kv_heads))
    found = cost("inline_attention", 96, kv_heads=kv_heads, **SIZES)
    assert _counted(lambda: inline_attention(query, key, key)) == found.forward_flops
    assert cost("inline_attention", 192, kv_heads=kv_heads, **SIZES).forward_flops == 2 * found.forward_flops


def test_agents_count_what_torch_counts() -> None:
    x, few = (torch.randn(2, 4, tokens, 16, device="meta") for tokens in (96, 9))
    found = cost("agent_attention", 96, agents=9, **SIZES)
    assert _counted(lambda: agent_attention(x, x, x, few)) == found.forward_flops
    assert cost("agent_attention", 192, agents=9, **SIZES).forward_flops == 2 * found.forward_flops


def test_reversed_counts_what_torch_counts() -> None:
    x = torch.randn(2, 4, 40, 16, requires_grad=True)
    found = cost("dependency_vit", 40, **SIZES)
    with FlopCounterMode(display=False) as counter:
        out = reversed_attention(x, x, x, backend="tiles")
    assert counter.get_total_flops() == found.forward_flops
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == found.backward_flops


def test_a_mixture_of_heads_costs_its_share_of_dense_attention() -> None:
    router = 2 * 2 * 96 * 64 * 6
    found, dense = cost("moh", 96, shared=1, active=1, **SIZES), cost("dense", 96, **SIZES)
    assert found.forward_flops - router == dense.forward_flops / 2
    assert found.backward_flops - 2 * router == dense.backward_flops / 2
    assert found.state_bytes == dense.state_bytes
    with pytest.raises(ValueError, match=r"shared \+ active = 5 must be at least 1 and at most heads \(4\)"):
        cost("moh", 96, shared=2, active=3, **SIZES)


def test_predicted_pairs_are_the_formula() -> None:
    tokens, heads, width, channels, places, kept, coefficients, density = 197, 6, 64, 32, 32, 50, 8, 0.25
    predictor = 2 * tokens * width * channels + (2 * tokens - 1) * channels * places
    predictor += (tokens - 1) * coefficients * density * tokens
    pairs = 2 * width * ((tokens - 1) * kept + tokens)
    found = cost("sparsifiner", tokens, heads=heads, head_dim=width, keep_rate=0.25, basis_density=density)
    assert found.forward_flops == 2 * heads * (predictor + pairs)
    for name in ("keep_rate", "basis_density"):
        for wrong in (0.0, 1.5):
            with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\]"):
                cost("sparsifiner", tokens, **{name: wrong})
