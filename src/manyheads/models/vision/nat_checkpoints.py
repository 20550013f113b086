"""Checkpoints of NAT and DiNAT: the authors' layouts, the hub's with separate projections, and other window sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.models.checkpoints import State, rename


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """Any published layout of a NAT or DiNAT checkpoint, renamed to ours (which is the authors' NAT layout).

    Known: NAT and DiNAT (``levels``), DiNAT_s (``layers``), isotropic (``blocks``), and the transformers library's
    (``nat.encoder`` or ``dinat.encoder``), which splits the fused projection. Tables of relative biases are resized
    bicubically where the model's window differs from the file's.
    """
    if any(".encoder.levels." in key for key in state):
        state = _from_hub(state)
    state = rename(state, [(r"^layers\.", "levels."), (r"^blocks\.", "levels.0.blocks.")])
    state = {key: value for key, value in state.items() if not key.endswith(".relative_position_index")}
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    wanted = model.state_dict()
    return {
        key: resize_bias(value, wanted[key].shape[-2:]) if key.endswith(".rpb") and key in wanted else value
        for key, value in state.items()
    }


def resize_bias(table: Tensor, size: tuple[int, ...]) -> Tensor:
    """A table of relative biases (heads, 2w-1, 2w-1) for another window, interpolated bicubically.

    >>> resize_bias(torch.ones(4, 13, 13), (21, 21)).shape
    torch.Size([4, 21, 21])
    """
    if table.ndim != 3 or tuple(table.shape[-2:]) == tuple(size):
        return table
    resized = F.interpolate(table[None].float(), size=tuple(size), mode="bicubic", align_corners=False)[0]
    return resized.to(table.dtype)


_HUB = [
    (r"^(nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]


def _from_hub(state: State) -> State:
    state = rename(state, _HUB)
    for key in [key for key in state if key.endswith(".layer_scale_parameters")]:
        block = key.removesuffix("layer_scale_parameters")
        state[f"{block}gamma1"], state[f"{block}gamma2"] = state.pop(key).unbind(0)
    for key in [key for key in state if ".attn.query." in key]:
        parts = [key.replace(".query.", f".{name}.") for name in ("query", "key", "value")]
        # A file that lacks one of the three keeps its keys, so that the error can name them.
        if all(part in state for part in parts):
            state[key.replace(".query.", ".qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state
