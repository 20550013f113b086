"""MaxViT: the block and grid operators, and whole models in timm's key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.models.vision.maxvit import MaxViT
from manyheads.models.vision.maxvit_checkpoints import checkpoint_filter_fn
from manyheads.ops.multi_axis import block_attention, grid_attention
from tests.goldens.systems._gradients import of_backbone
from tests.goldens.systems._tensors import arrays, gradients, tensors

OPERATORS = {"block_attention": block_attention, "grid_attention": grid_attention}
RENAMED = {"embed_dim": "embed_dims", "dim_head": "head_dim", "init_values": "layer_scale"}
PLAIN = ("in_chans", "num_classes", "img_size", "depths", "stem_width", "head_hidden_size", "window_size", "grid_size",
         "embed_dims", "drop_rate", "axes", "layer_scale")  # fmt: skip
FLAVOURS = {"bias_tf": "tf", "bias": "rw", "mlp": "rmlp"}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``op``; a configuration without one is a model."""
    weights, given = tensors(state), tensors(inputs)
    return arrays(_operator(config, given) if "op" in config else _model(config, weights, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    operator, partition = OPERATORS[config["op"]], config["partition"]
    partition = (partition, partition) if isinstance(partition, int) else tuple(partition)
    scale = config.get("scale")
    scale = None if isinstance(scale, str) else scale

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return operator(q, k, v, partition=partition, bias_table=bias, mask=given.get("mask"), scale=scale)

    wanted = {name: given[name] for name in "qkv"}
    if "bias_table" in given:
        wanted["bias"] = given["bias_table"]
    outputs = {"out": attend(**wanted)}
    if "dout" in given:
        outputs |= {f"d{name}": gradient for name, gradient in gradients(attend, wanted, given["dout"]).items()}
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    # Where the reference nests its options, or prefixes them.
    plain = {name: value for name, value in config.items() if not name.startswith(("conv_", "transformer_"))}
    flat = {name.removeprefix("transformer_"): value for name, value in config.items() if name not in plain}
    config = {**(config.get("transformer_cfg") or {}), **flat, **plain}
    options = {name: config[name] for name in PLAIN if config.get(name) is not None}
    options |= {ours: config[theirs] for theirs, ours in RENAMED.items() if config.get(theirs) is not None}
    flavour = config.get("flavour") or FLAVOURS.get(config.get("rel_pos_type") or "", "")
    model = MaxViT(**options, flavour=flavour or _flavour(weights))
    return of_backbone(model, weights, checkpoint_filter_fn, given, training=bool(config.get("training")))


def _flavour(weights: dict[str, Tensor]) -> str:
    tables = [value for key, value in weights.items() if key.endswith("relative_position_bias_table")]
    if not tables:
        return "rmlp"
    return "tf" if tables[0].ndim == 3 else "rw"
