from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyheads import catalog
from manyheads.cost import FORMULAS, cost
from manyheads.ops.channel import channel_attention

SIZES = dict(batch=2, heads=3, head_dim=16, element_bytes=4)


def _counted(function, *inputs) -> tuple[int, int]:
    """Operations of the forward and of the backward pass, counted by torch."""
    leaves = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as forward:
        out = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def _inputs(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, tokens, 16) for _ in range(3)]


def test_dense_counts_what_torch_counts():
    def attend(query, key, value):
        return torch.softmax(query @ key.transpose(-2, -1) / 4, -1) @ value

    forward, backward = _counted(attend, *_inputs(50))
    expected = cost("dense", 50, **SIZES)
    assert forward == expected.forward_flops
    # Kept scores need four products in the backward; a fused kernel recomputes them: five.
    assert backward * 5 / 4 == expected.backward_flops


def test_channel_attention_counts_what_torch_counts():
    forward, backward = _counted(channel_attention, *_inputs(50))
    expected = cost("davit", 50, **SIZES)
    assert (forward, backward) == (expected.forward_flops, expected.backward_flops)


def test_lightning_counts_what_its_tiles_do():
    def tiles(query, key, value, block=10):
        state, parts = torch.zeros(2, 3, 16, 16), []
        for start in range(0, 50, block):
            q, k, v = (x[:, :, start : start + block] for x in (query, key, value))
            parts.append((q @ k.transpose(-2, -1)).tril() @ v + q @ state)
            state = state + k.transpose(-2, -1) @ v
        return torch.cat(parts, 2)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tiles(*_inputs(50))
    assert counter.get_total_flops() == cost("lightning_attention", 50, block=10, **SIZES).forward_flops


def test_routing_reads_the_chosen_regions_only():
    def regions(query, key, value):
        scores = query.unflatten(2, (5, 10)).mean(3) @ key.unflatten(2, (5, 10)).mean(3).transpose(-2, -1)
        chosen = scores.topk(2, dim=-1).indices[..., None, None]
        gathered = [
            x.unflatten(2, (5, 10))[:, :, None].expand(-1, -1, 5, -1, -1, -1).take_along_dim(chosen, 3).flatten(3, 4)
            for x in (key, value)
        ]
        return torch.softmax(query.unflatten(2, (5, 10)) @ gathered[0].transpose(-2, -1), -1) @ gathered[1]

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        regions(*_inputs(50))
    assert counter.get_total_flops() == cost("biformer", 50, regions=5, topk=2, **SIZES).forward_flops


def test_duo_cache_is_what_its_heads_keep():
    sizes = dict(heads=6, kv_heads=4, head_dim=16, element_bytes=2)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        cost("duo_attention", 1000, **sizes)
    sizes["heads"] = 8
    found = cost("duo_attention", 1000, retrieval=0.25, sinks=4, recent=28, **sizes)
    assert found.state_bytes == 2 * 16 * 2 * (1 * 1000 + 3 * 32)
    everything = cost("duo_attention", 1000, retrieval=1.0, **sizes)
    dense = cost("dense", 1000, causal=True, **sizes)
    assert everything.state_bytes == dense.state_bytes
    assert everything.forward_flops == dense.forward_flops
    assert everything.decode_flops == dense.decode_flops


@pytest.mark.parametrize("system", ["lightning_attention", "neighborhood_attention", "davit"])
def test_linear_systems_are_linear(system):
    assert cost(system, 32768).forward_flops == 2 * cost(system, 16384).forward_flops
    assert cost("dense", 32768).forward_flops == 4 * cost("dense", 16384).forward_flops


def test_every_working_operator_has_formulas():
    assert {system.slug for system in catalog.systems(room="ops", state="works")} <= set(FORMULAS)


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        (("lightening_attention", 10), {}, "did you mean 'lightning_attention'"),
        (("neighborhood_attention", 10), {"windw": 3}, "no setting 'windw'; did you mean 'window'"),
        (("davit", 10), {"window": 3}, "it has none"),
        (("dense", 0), {}, "length must be at least 1, got 0"),
        (("biformer", 10), {"topk": 0}, "topk must be at least 1"),
    ],
)
def test_bad_input_is_named(arguments, settings, words):
    with pytest.raises(ValueError, match=words):
        cost(*arguments, **settings)
