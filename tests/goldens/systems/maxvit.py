"""MaxViT: the block and grid operators, and whole models in timm's key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.maxvit import PartitionAttention
from manyheads.models.vision.maxvit import MaxViT
from manyheads.models.vision.maxvit_checkpoints import checkpoint_filter_fn
from manyheads.ops.multi_axis import block_attention, grid_attention
from tests.goldens.systems._gradients import Computed, of_backbone, with_gradients
from tests.goldens.systems._tensors import arrays, tensors

OPERATORS = {"block_attention": block_attention, "grid_attention": grid_attention}
RENAMED = {"embed_dim": "embed_dims", "dim_head": "head_dim", "init_values": "layer_scale"}
PLAIN = ("in_chans", "num_classes", "img_size", "depths", "stem_width", "head_hidden_size", "window_size", "grid_size",
         "embed_dims", "drop_rate", "axes", "layer_scale")  # fmt: skip
FLAVOURS = {"bias_tf": "tf", "bias": "rw", "mlp": "rmlp"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``op``; a configuration without one is a model or, with a single width, half a block."""
    weights, given = tensors(state), tensors(inputs)
    if "op" in config:
        return arrays(_operator(config, given))
    return arrays((_layer if "dim" in config else _model)(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    operator, partition = OPERATORS[config["op"]], config["partition"]
    partition = (partition, partition) if isinstance(partition, int) else tuple(partition)
    scale = config.get("scale")
    scale = None if isinstance(scale, str) else scale

    mask = given.pop("mask", None)

    def compute(inputs: dict[str, Tensor]) -> Computed:
        q, k, v = (inputs[name] for name in "qkv")
        keys = None if mask is None else mask.bool().reshape(-1, *k.shape[2:4]).expand(k.shape[0], -1, -1)
        return {"out": operator(q, k, v, partition=partition, bias_table=inputs.get("bias_table"), mask=keys,
                                scale=scale)}, {}  # fmt: skip

    outputs = with_gradients(compute, given)
    return outputs | ({"dbias": outputs["dbias_table"]} if "dbias_table" in outputs else {})


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """One half of a block, on channels-last maps."""
    axis = config.get("partition_type") or config.get("axis") or "block"
    named = ("partition", "partition_size", "window_size" if axis == "block" else "grid_size")
    partition = next(config[name] for name in named if config.get(name))
    scales = config.get("init_values")
    layer = PartitionAttention(
        config["dim"], partition if isinstance(partition, int) else tuple(partition), axis=axis,
        head_dim=config.get("dim_head") or 32, layer_scale=scales, flavour=_named(config) or _flavour(weights),
    )  # fmt: skip
    layer.eval().load_state_dict(weights)
    return with_gradients(lambda inputs: ({"out": layer(inputs["x"])}, dict(layer.named_parameters())), given)


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    # Where the reference nests its options, or prefixes them.
    plain = {name: value for name, value in config.items() if not name.startswith(("conv_", "transformer_"))}
    flat = {name.removeprefix("transformer_"): value for name, value in config.items() if name not in plain}
    config = {**(config.get("transformer_cfg") or {}), **flat, **plain}
    options = {name: config[name] for name in PLAIN if config.get(name) is not None}
    options |= {ours: config[theirs] for theirs, ours in RENAMED.items() if config.get(theirs) is not None}
    model = MaxViT(**options, flavour=_named(config) or _flavour(weights))
    return of_backbone(model, weights, checkpoint_filter_fn, given, training=bool(config.get("training")))


def _named(config: dict) -> str:
    return config.get("flavour") or FLAVOURS.get(config.get("rel_pos_type") or "", "")


def _flavour(weights: dict[str, Tensor]) -> str:
    tables = [value for key, value in weights.items() if key.endswith("relative_position_bias_table")]
    if not tables:
        return "rmlp"
    return "tf" if tables[0].ndim == 3 else "rw"
