"""Models with their sequence sharded from outside equal the same models on one device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from manyheads.parallel import context_parallel
from tests.parallel import model_cases as cases

EXACT = {"logits": 1e-12, "loss": 1e-6, "gradients": 1e-6, "weights": 1e-6}  # float64, but losses are float32


def _padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = cases.tokens(batch, length)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _plain(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = cases.tokens(batch, length)
    return {"input_ids": ids, "labels": ids}


def _packed(*lengths: int) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    # With a cache transformers does not look for packed sequences.
    return {**_plain(1, int(positions.shape[1])), "position_ids": positions, "use_cache": False}


SHARDED = {
    "ring": ("llama", 4, _plain(2, 24), {}),
    "two ranks": ("llama", 2, _plain(1, 20), {}),
    "three ranks, striped": ("llama", 3, _plain(1, 21), {"layout": "striped"}),
    "token ring": ("llama", 4, _plain(2, 24), {"method": "token_ring"}),
    "gathered keys": ("llama", 4, _plain(2, 24), {"method": "lasp2h", "layout": "contiguous"}),
    "padded": ("llama", 4, _padded(2, 24), {}),
    "packed": ("llama", 4, _packed(3, 10, 11), {}),
    "whole logits": ("llama", 4, _plain(2, 24), {"gather_logits": True}),
    "recomputed": ("llama", 2, _padded(2, 24), {"checkpointing": True}),
    "learned positions": ("gpt2", 4, _plain(2, 24), {}),
    "within a window": ("mistral", 4, _plain(2, 16), {}),
    "beyond a window": ("mistral", 4, _plain(2, 24), {}),
    "windows, token ring": ("qwen3", 4, _plain(2, 24), {"method": "token_ring"}),
    "windows, padded": ("gemma3", 4, _padded(2, 24), {}),
    "windows, packed, gathered keys": ("mistral", 4, _packed(20, 12), {"method": "lasp2h"}),
    "soft caps": ("gemma2", 4, _plain(2, 24), {}),
    "sinks": ("gpt_oss", 4, _plain(2, 24), {}),
    "hybrid": ("hybrid", 4, _plain(2, 24), {}),
    "hybrid, gathered keys": ("hybrid", 2, _plain(2, 24), {"method": "lasp2h"}),
}


# Gemma 2's own softmax is float32 whatever the model is, and so are all of GPT-OSS and its routers.
ROUNDED = {"logits": 1e-6, "loss": 1e-6, "gradients": 3e-6}


def check(results: list[dict | None], limits: dict[str, float] = EXACT) -> None:
    found = [result for result in results if result is not None]
    assert found
    for name, limit in limits.items():
        assert max(result.get(name, 0.0) for result in found) < limit, (name, found)
    assert all(result.get("undone", True) for result in found)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_is_the_model(four_ranks, name):
    kind, world, call, options = SHARDED[name]
    results = four_ranks.run(_sharded, kind, world, call, options)
    check(results, ROUNDED if kind in ("gemma2", "gpt_oss") else EXACT)
    assert all(result["type"] for result in results if result)
    schemes = {"ring": "ring_self_attention", "token_ring": "token_ring", "lasp2h": "lasp2h"}
    used = schemes[options.get("method", "ring")]
    assert {used, f"{used} backward"} <= set(results[0]["calls"])
    assert ("lasp2" in results[0]["calls"]) == (kind == "hybrid")


def _sharded(kind, world, call, options):
    return cases.sharded_case(kind, world, call, **options)


@pytest.mark.parametrize("world", [2, 4])
def test_linear_layers_exchange_states_of_one_size(four_ranks, world):
    counts = []
    for length in (world * 4, world * 10):
        results = four_ranks.run(cases.linear_case, world, length)
        check(results)
        counts.append((results[0]["states"], results[0]["gradient states"]))
    # Four layers, one gather each; float64 states of 2 sequences and 4 heads of 32 x 32.
    assert counts == [((4, 4 * 2 * 4 * 32 * 32 * 8), 4)] * 2


@pytest.mark.parametrize("wrap", ["nothing", "DDP", "DDP over all", "FSDP", "FSDP over all"])
def test_two_dimensions_train_as_one_device(four_ranks, wrap):
    if wrap == "nothing":
        assert max(four_ranks.run(cases.accumulated_case)) < EXACT["gradients"]
        return
    check(four_ranks.run(cases.two_dimensions_case, wrap))


REFUSED = {
    "tokens": ("llama", _plain(1, 22), {}, "22 tokens"),
    "mask": ("llama", {**_plain(1, 24), "attention_mask": torch.ones(1, 1, 24, 24)}, {}, "attention_mask must mark"),
    "cache": ("llama", {**_plain(1, 24), "use_cache": True}, {}, "no cache to generate from"),
    "kept": ("llama", {**_plain(1, 24), "logits_to_keep": 1}, {}, "logits_to_keep"),
    "labels": ("llama", {**_plain(1, 24), "labels": cases.tokens(1, 23)}, {}, "labels must have shape .1, 24."),
    "chunks": ("llama4", _plain(1, 24), {}, "within chunks of 8 of the 24 tokens"),
    "convolutions": ("mamba", _plain(1, 24), {}, "meet outside its attention|mixes tokens outside"),
    "routers": ("gpt_oss", {**_plain(1, 24), "output_router_logits": True}, {}, "output_router_logits"),
    "differ": ("llama", _plain(1, 24), {"differ": True}, "disagree on input_ids"),
    "packs": ("llama", {**_plain(2, 24), "position_ids": torch.arange(12).repeat(2, 2)}, {}, "need a batch of 1"),
    "options": ("llama", _plain(1, 24), {"method": "rings"}, "did you mean 'ring'|method"),
    "layout": ("hybrid", _plain(1, 24), {"layout": "zigzag"}, "linear layers need their tokens in order"),
    "token ring": ("llama", _plain(1, 24), {"method": "token_ring", "layout": "contiguous"}, "needs layout='zigzag'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_says_what_is_wrong(four_ranks, name):
    kind, call, options, words = REFUSED[name]
    for said in four_ranks.run(_refused, kind, call, options):
        assert said.startswith("ValueError")
        assert re.search(words, said), said


def _refused(kind, call, options):
    return cases.refused(kind, call, **options)


def test_a_failing_rank_is_named_on_all_others(four_ranks):
    said = four_ranks.run(cases.dies_in_the_middle, 2)
    assert said[2] == "OSError: the disk is full"
    for rank in (0, 1, 3):
        assert said[rank].startswith("RankError")
        assert "rank 2" in said[rank]


def test_attaching_to_nothing(one_rank):
    with pytest.raises(TypeError, match="neither a Hugging Face model"):
        context_parallel(nn.Linear(2, 2))
    model = cases.tiny("llama")
    with context_parallel(model) as context:
        with pytest.raises(RuntimeError, match="open already"):
            context.__enter__()
        with pytest.raises(RuntimeError, match="attached to this model's attention already"):
            context_parallel(model).__enter__()
        with pytest.raises(RuntimeError, match="the inner parts of a sharded model"):
            model.model(cases.tokens(1, 8))
    before = model.config._attn_implementation
    assert before == "sdpa"
    gpt2 = cases.tiny("gpt2")
    gpt2.config.attn_pdrop = 0.1
    gpt2.transformer.h[0].attn.attn_dropout.p = 0.1
    with context_parallel(gpt2), pytest.raises(ValueError, match=r"attention dropout is 0\.1"):
        gpt2(cases.tokens(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "method"), [(2, "ring"), (4, "ring"), (4, "token_ring"), (4, "lasp2h")])
def test_smollm2_is_smollm2(four_ranks, monkeypatch, world, method):
    # Four models of 135M parameters on a machine that may have two cores.
    monkeypatch.setattr(four_ranks, "timeout", 900.0)
    for result in four_ranks.run(cases.smollm2_case, world, 512, method):
        if result is not None:
            assert max(result.values()) < 1e-4, result
