"""Stand-in for interpret.attach."""

from __future__ import annotations

from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def attached_attention(model, attend, mask):
    name = f"manyheads_{id(attend)}"
    before = model.config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    try:
        model.set_attn_implementation(name)
        yield []
    finally:
        model.set_attn_implementation(before)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(name)
