"""MaxViT's checkpoints: timm's layout (which is ours) and the variables of the authors' TensorFlow code.

TensorFlow's tensors come in any container that ``read_state`` reads, under their own names. Kernels are (rows, columns,
in, out), dense weights (in, out), attention weights (in, heads, head_dim); the averaged shadow variables are taken.

Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from manyheads.layers.relative_bias import RelativeBiasTable, flat_to_offsets, offsets_to_flat
from manyheads.models.checkpoints import CheckpointError, State
from manyheads.ops.multi_axis import resize_relative_table

_SHADOW = "/ExponentialMovingAverage"
_TABLE = "relative_position_bias_table"


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """A published MaxViT checkpoint in our names and shapes, bias tables resized to the model's partitions.

    Raises:
        CheckpointError: weights of another flavour, or a table whose partition cannot be told.
    """
    if any("/" in key for key in state):
        state = _from_tensorflow(state)
    wanted = model.state_dict()
    converted = {}
    for key, value in state.items():
        if key.endswith(f"attn.rel_pos.{_TABLE}"):
            value = _table(key, value, model)
        elif key in wanted and value.ndim == 4 and wanted[key].ndim == 2:
            value = value.flatten(1)  # the same layer as a 1 x 1 convolution
        converted[key] = value
    if getattr(model, "num_classes", 1) == 0:
        converted = {key: value for key, value in converted.items() if not key.startswith("head.fc.")}
    return converted


def _table(key: str, value: Tensor, model: nn.Module) -> Tensor:
    try:
        module = model.get_submodule(key.removesuffix(f".{_TABLE}"))
    except AttributeError:
        return value
    if not isinstance(module, RelativeBiasTable) or (value.ndim == 3) != (module.flavour == "tf"):
        held = "the authors' (tf)" if value.ndim == 3 else "timm's (rw)"
        raise CheckpointError(f"{key} is a table of {held} models, which this model's flavour does not have")
    if value.shape == module.relative_position_bias_table.shape:
        return value
    if module.flavour == "tf":
        return resize_relative_table(value, module.partition)
    side = math.isqrt(value.shape[0])
    if side * side != value.shape[0] or side % 2 == 0:
        raise CheckpointError(
            f"{key} holds {value.shape[0]} offsets, no square table; build the model with the partition it was made for"
        )
    square = (side // 2 + 1, side // 2 + 1)
    return offsets_to_flat(resize_relative_table(flat_to_offsets(value, square), module.partition))


_NAMES = [
    (r"^(?:.*/)?(?:stem/)?conv_0$", "stem.conv1"),
    (r"^(?:.*/)?(?:stem/)?norm_0$", "stem.norm1"),
    (r"^(?:.*/)?(?:stem/)?conv_1$", "stem.conv2"),
    (r"^(?:.*/)?final_layer_norm$", "head.norm"),
    (r"^(?:.*/)?cls_head/inner_dense$", "head.pre_logits.fc"),
    (r"^(?:.*/)?cls_head/logit_dense$", "head.fc"),
]
_MBCONV = {
    "shortcut_conv": "shortcut.expand",
    "pre_norm": "pre_norm",
    "expand_conv": "conv1_1x1",
    "expand_norm": "norm1",
    "depthwise_conv": "conv2_kxk",
    "depthwise_norm": "norm2",
    "se/reduce_conv2d": "se.fc1",
    "se/expand_conv2d": "se.fc2",
    "shrink_conv": "conv3_1x1",
}
_HALF = {
    "attn_layer_norm": "norm1",
    "ffn_layer_norm": "norm2",
    "ffn/expand_dense": "mlp.fc1",
    "ffn/shrink_dense": "mlp.fc2",
    "attention/o": "attn.proj",
}
_LEAVES = {
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_BLOCK = re.compile(r"(?:.*/)?block_(\d+)_(\d+)/(.+)")


def _from_tensorflow(state: State) -> State:
    shadows = {key.removesuffix(_SHADOW): value for key, value in state.items() if key.endswith(_SHADOW)}
    plain = {key: value for key, value in state.items() if not key.endswith(_SHADOW)} | shadows
    converted: State = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, value in plain.items():
        path, _, leaf = key.removesuffix(":0").rpartition("/")
        block = _BLOCK.fullmatch(path)
        attention = re.fullmatch(r"(.*/)?(block_\d+_\d+)/attention(_1)?/([qkv])", path)
        if attention and block:
            half = _half(block, attention[3])
            projections.setdefault(half, {})[f"{leaf}.{attention[4]}"] = value
        elif block and leaf == "relative_bias":
            suffix = "_1" if block[3].endswith("_1") else None
            converted[f"{_half(block, suffix)}.attn.rel_pos.{_TABLE}"] = value
        elif leaf in _LEAVES and (name := _module_name(path, block)):
            converted[f"{name}.{_LEAVES[leaf]}"] = _value(leaf, name, value)
    for half, parts in projections.items():
        weights = [parts[f"weight.{slot}"].flatten(1).T for slot in "qkv"]
        converted[f"{half}.attn.qkv.weight"] = torch.cat(weights).contiguous()
        converted[f"{half}.attn.qkv.bias"] = torch.cat([parts[f"bias.{slot}"].flatten() for slot in "qkv"])
    # TensorFlow does not count the batches of a norm.
    counters = {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in converted
                if key.endswith("running_mean")}  # fmt: skip
    return converted | counters


def _half(block: re.Match, suffix: str | None) -> str:
    return f"stages.{int(block[1])}.blocks.{int(block[2])}.{'attn_grid' if suffix else 'attn_block'}"


def _module_name(path: str, block: re.Match | None) -> str:
    """Our name of a TensorFlow layer; empty for what is no part of the model (an optimizer's slots, counters)."""
    if block is None:
        return next((name for pattern, name in _NAMES if re.fullmatch(pattern, path)), "")
    rest = block[3]
    if rest.startswith("mbconv/"):
        part = _MBCONV.get(rest.removeprefix("mbconv/"))
        return f"stages.{int(block[1])}.blocks.{int(block[2])}.conv.{part}" if part else ""
    first, slash, tail = rest.partition("/")
    suffix = "_1" if first.endswith("_1") else None
    part = _HALF.get(first.removesuffix("_1") + slash + tail)
    return f"{_half(block, suffix)}.{part}" if part else ""


def _value(leaf: str, name: str, value: Tensor) -> Tensor:
    if leaf == "depthwise_kernel":
        return value.permute(2, 3, 0, 1).contiguous()
    if leaf not in ("kernel", "weight"):
        return value
    if name.endswith("attn.proj"):
        return value.flatten(0, -2).T.contiguous()
    return (value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T).contiguous()
