"""A character tokenizer and tiny random decoders of every family, shared by the tests of this room."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=1024)
SPECIAL = dict(pad_token_id=256, eos_token_id=257, bos_token_id=258)
GROUPED = SIZES | SPECIAL | dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
FAMILIES = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": GROUPED,
    "gpt2": SPECIAL | dict(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.3),
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"})
    return made


def tiny(family: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()
