"""Attaching to every family of decoders, and leaving them bit-identical."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.interpret.attach import (
    Geometry,
    attention_function,
    attention_layers,
    decoder,
    geometry,
    head_outputs,
    visible_keys,
)

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=128)
GROUPED = dict(**SIZES, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2)
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": GROUPED,
    "gpt2": dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1, bos_token_id=2),
    "gpt_neox": SIZES | dict(num_attention_heads=4, eos_token_id=1, bos_token_id=2),
    "opt": dict(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    ),
}  # fmt: skip
# Gemma 2 caps its scores, which transformers computes in its eager attention only.
BACKENDS = [(family, name) for family in FAMILIES for name in ("sdpa", "eager") if (family, name) != ("gemma2", "sdpa")]


def make(family: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 12))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found(family) -> None:
    model = make(family)
    sizes = geometry(model)
    assert (sizes.layers, sizes.heads) == (2, 4)
    assert sizes.kv_heads == (2 if "num_key_value_heads" in FAMILIES[family] else 4)
    assert [layer.index for layer in attention_layers(model)] == [0, 1]
    assert all(layer.attention.layer_idx == layer.index for layer in attention_layers(model))


@pytest.mark.parametrize(("family", "implementation"), BACKENDS)
def test_the_original_is_exact_and_everything_is_undone(family, implementation, ids) -> None:
    model = make(family, attn_implementation=implementation)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    before = logits(model, ids, attention_mask=mask)
    registered = set(transformers.AttentionInterface._global_mapping)
    called = []

    def same(call, module, *args, **options):
        called.append((call.layer, call.past))
        return call.original(module, *args, **options)

    with attention_function(model, same):
        inside = logits(model, ids, attention_mask=mask)
    after = logits(model, ids, attention_mask=mask)
    assert torch.equal(before, inside)
    assert torch.equal(before, after)
    assert called == [(0, 0), (1, 0)]
    assert model.config._attn_implementation == implementation
    assert set(transformers.AttentionInterface._global_mapping) == registered
    assert set(transformers.AttentionMaskInterface._global_mapping).isdisjoint({f"manyheads_{i}" for i in range(1000)})
    assert not decoder(model)[0]._forward_pre_hooks


@pytest.mark.parametrize(("family", "implementation"), BACKENDS)
def test_explicit_rows_from_visible_keys_are_the_original(family, implementation, ids) -> None:
    model = make(family, attn_implementation=implementation)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    worst = []

    def check(call, module, query, key, value, mask, **options):
        output, weights = call.original(module, query, key, value, mask, **options)
        rows = torch.tensor([[6, 11], [0, 3]])
        seen = visible_keys(mask, query.shape[2], key.shape[2], rows)
        if seen is None:
            seen = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        group = query.shape[1] // key.shape[1]
        chosen = query[torch.arange(2)[:, None], :, rows].transpose(1, 2)
        scores = chosen @ key.repeat_interleave(group, 1).transpose(-1, -2) * options["scaling"]
        if options.get("softcap"):
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        explicit = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 1)
        worst.append((explicit.transpose(1, 2) - output[torch.arange(2)[:, None], rows]).abs().max().item())
        return output, weights

    for options in ({"attention_mask": padding}, {}):
        with attention_function(model, check):
            logits(model, ids, **options)
    assert max(worst) < 1e-5


def test_the_cache_length_is_known_before_the_update(ids) -> None:
    model = make("llama")
    seen = []

    def same(call, module, query, *args, **options):
        seen.append((call.past, query.shape[2]))
        return call.original(module, query, *args, **options)

    with attention_function(model, same):
        generated = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen == [(0, 12)] * 2 + [(12, 1)] * 2 + [(13, 1)] * 2
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False))


def test_attaching_twice_is_refused_and_an_error_inside_is_cleaned_up(ids) -> None:
    model = make("llama")
    before = logits(model, ids)

    def same(call, module, *args, **options):
        return call.original(module, *args, **options)

    with attention_function(model, same):
        with pytest.raises(RuntimeError, match="attached to this model already"), attention_function(model, same):
            pass
        assert torch.equal(before, logits(model, ids))
    with pytest.raises(ZeroDivisionError), attention_function(model, lambda *_, **__: 1 / 0):
        logits(model, ids)
    assert torch.equal(before, logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_outputs_are_seen_and_replaced(family, ids) -> None:
    model = make(family)
    sizes = geometry(model)
    before = logits(model, ids)
    shapes = []
    with head_outputs(model, lambda layer, heads: shapes.append((layer, tuple(heads.shape)))):
        assert torch.equal(before, logits(model, ids))
    assert shapes == [(layer, (2, 12, 4, sizes.head_dim)) for layer in (0, 1)]
    with head_outputs(model, lambda layer, heads: heads * 2 if layer else None):
        assert not torch.allclose(before, logits(model, ids))
    assert torch.equal(before, logits(model, ids))
    with pytest.raises(ValueError, match="were replaced by"), head_outputs(model, lambda _, heads: heads[..., :1]):
        logits(model, ids)


def test_bad_models_and_heads_are_named() -> None:
    with pytest.raises(TypeError, match="PreTrainedModel"):
        geometry(nn.Linear(2, 2))
    model = make("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    with pytest.raises(ValueError, match=r"tried model\.layers"):
        attention_layers(model)
    model = make("llama")
    model.model.layers[1].self_attn.o_proj = nn.Linear(7, 32)
    with pytest.raises(ValueError, match=r"input width 32 .* found one of width 7"):
        attention_layers(model)
    sizes = Geometry(2, 4, 2, 8)
    assert sizes.check_heads([(1, 3), (0, 1), [1, 3]]) == [(0, 1), (1, 3)]
    with pytest.raises(ValueError, match="layers 0 to 1, query heads 0 to 3"):
        sizes.check_heads([(0, 4)])
    with pytest.raises(ValueError, match="key/value heads 0 to 1"):
        sizes.check_heads([(0, 3)], kv=True)
    with pytest.raises(ValueError, match="pairs"):
        sizes.check_heads([3])
