"""DuoAttention through the public API: deployment in chunks, and one step of the gate optimisation.

Further cases may leave out ``state`` (masks and binarisation need no model).
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.adapt.duo_attention import DuoAttention
from manyheads.adapt.duo_gates import streaming_mask, two_way_hidden
from manyheads.adapt.duo_pattern import binarize
from manyheads.data.cache_names import with_cache
from manyheads.objectives.distillation import gate_regulariser, hidden_distillation
from tests.goldens.systems._tensors import arrays, tensors

NOT_OF_THE_MODEL = {"full_attention_heads", "sink_size", "recent_size", "chunks", "pattern", "reg_weight"}


def run(config: dict, state: dict, inputs: dict) -> dict:
    sinks, recent = config.get("sink_size", 64), config.get("recent_size", 256)
    given = tensors(inputs)
    if not state:
        return _without_a_model(config, given, sinks, recent)
    model = _model(config, state)
    if "chunks" in config:
        return _chunks(model, config, given["input_ids"], sinks, recent)
    return _two_way(model, config, given, sinks, recent)


def _model(config: dict, state: dict) -> torch.nn.Module:
    options = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    options.setdefault("sliding_window", None)
    kind = options.pop("model_type", "llama")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="sdpa")
    missing, unexpected = model.load_state_dict(tensors(state), strict=False)
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    assert not unexpected
    assert set(missing) <= tied
    return model.eval()


def _chunks(model: torch.nn.Module, config: dict, tokens: torch.Tensor, sinks: int, recent: int) -> dict:
    heads = torch.tensor(config["full_attention_heads"], dtype=torch.float32) > 0.5
    duo = DuoAttention(heads, sinks=sinks, recent=recent)
    cache, rows = duo.cache(), []
    with duo(model), torch.no_grad():
        for chunk in tokens.split(config["chunks"], dim=1):
            rows.append(model(chunk, **with_cache(model, cache), logits_to_keep=1).logits[:, -1])
    return {"logits": torch.stack(rows, dim=1).numpy(), "cache_lengths": np.array(cache.slots)}


def _two_way(model: torch.nn.Module, config: dict, given: dict, sinks: int, recent: int) -> dict:
    gates = given["gates"].requires_grad_()
    full, mixed = two_way_hidden(model, given["input_ids"], gates, sinks=sinks, recent=recent)
    supervised = torch.arange(full.shape[1]) >= config.get("first_label", 0)
    distill = hidden_distillation(mixed, full, supervised.expand(full.shape[:2]))
    regulariser = gate_regulariser(gates)
    loss = distill + config.get("reg_weight", 0.05) * regulariser
    (grad,) = torch.autograd.grad(loss, [gates])
    return arrays(
        {
            "full_hidden": full,
            "mixed_hidden": mixed,
            "distill_loss": distill,
            "reg_loss": regulariser,
            "loss": loss,
            "grad_gates": grad,
        }
    )


def _without_a_model(config: dict, given: dict, sinks: int, recent: int) -> dict:
    outputs = {}
    if "gates" in given:
        outputs["retrieval"] = binarize(
            given["gates"], sparsity=config.get("sparsity"), threshold=config.get("threshold")
        )
    if "length" in config:
        outputs["mask"] = streaming_mask(config["length"], sinks, recent)[0, 0]
    return arrays(outputs)
