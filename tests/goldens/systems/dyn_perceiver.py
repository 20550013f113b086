"""Dynamic Perceiver: cross and self layers, and whole models with any of the three branches in the authors' layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from manyheads.layers.latent import CrossLayer, LatentAttention, SelfLayer
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.dyn_perceiver import DynPerceiver, checkpoint_filter_fn
from manyheads.models.vision.dyn_perceiver_cnn import REGNETS
from tests.goldens.systems._gradients import Computed, by_their_names, with_gradients
from tests.goldens.systems._tensors import arrays, tensors, with_counters

NAMES = ("y_early3", "y_att", "y_cnn", "y_merge")
FLAGS = {
    "with_x2z": "read",
    "with_z2x": "write",
    "with_dwc": "read_conv",
    "with_last_CA": "last_write",
    "with_isc": "transfer",
}


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model (with a latent code), or a layer."""
    weights, given = tensors(state), tensors(inputs)
    compute = _model if "latent" in weights else _layer
    return arrays(with_gradients(lambda given: compute(config, weights, given), given))


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    """Which layer it is, and its widths, are read off its tensors; heads and table come from the config."""
    padding = next((given[name].bool() for name in given if "mask" in name), None)
    asked = given.get("x_q", given.get("x"))
    attended = given.get("x_kv", asked)
    assert asked is not None
    assert attended is not None
    (query,) = (value for name, value in weights.items() if name.endswith("q_proj.weight"))
    (values,) = (value for name, value in weights.items() if name.endswith("v_proj.weight"))
    table = next((value for name, value in weights.items() if name.endswith("relative_position_bias")), None)
    options = {"qk_dim": len(query), "v_dim": len(values)}
    heads, keys = config.get("num_heads", 1), None if table is None else table.shape[1]
    hidden = weights.get("mlp.fc1.weight")
    if hidden is None:
        weights = {name.rpartition("attention.")[2]: value for name, value in weights.items()}
        layer: nn.Module = LatentAttention(asked.shape[2], attended.shape[2], heads, keys=keys, **options)
        arguments = (asked, attended)
    else:
        ratio = len(hidden) // hidden.shape[1]
        if any(name.startswith("self_attn.") for name in weights):
            layer, arguments = SelfLayer(asked.shape[2], heads, mlp_ratio=ratio, **options), (asked,)
        else:
            layer = CrossLayer(asked.shape[2], attended.shape[2], heads, keys=keys, mlp_ratio=ratio, **options)
            arguments = (asked, attended)
    # The leading dot is what the rule for the table looks for.
    converted = {name.removeprefix("."): value for name, value in checkpoint_filter_fn(
        {f".{name}": value for name, value in weights.items()}, layer
    ).items()}  # fmt: skip
    load_checkpoint(layer, converted)
    y = layer.eval()(*arguments, padding)
    return {"y": y, "out": y}, by_their_names(layer, weights, converted)


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> Computed:
    cnn, width = _branch(weights)
    model = DynPerceiver(
        in_chans=given["image"].shape[1],
        num_classes=config.get("num_classes", len(weights["early_classifier3.bias"])),
        cnn=cnn,
        width=width,
        num_latents=weights["latent"].shape[0],
        num_heads=config.get("num_SA_heads", (1, 2, 4, 8)),
        mlp_ratio=config.get("SA_widening_factor", 4),
        depth_factor=config.get("depth_factor", (1, 1, 1, 1)),
        cnn_classes=[value for name, value in weights.items() if name.startswith("classifier_cnn.")][-1].shape[0],
        **{ours: bool(config.get(theirs, True)) for theirs, ours in FLAGS.items()},
    ).train(bool(config.get("training", False)))
    converted = checkpoint_filter_fn(weights, model)
    # Cases leave out the counters, which the model keeps under other names.
    load_checkpoint(model, with_counters(converted, model))
    exits = dict(zip(NAMES, model.forward_exits(given["image"]), strict=True))
    if config.get("exit") is not None and int(config["exit"]) >= 0:
        # The ResNets' argument: the logits of one exit.
        exits["y"] = list(exits.values())[int(config["exit"])]
    return exits, by_their_names(model, weights, converted)


def _branch(weights: dict[str, Tensor]) -> tuple[str, float]:
    """The branch and its factor on the channels, from the shapes of the weights."""
    first = weights["latent"].shape[1]
    if "cnn_body_stage1.0.conv1.weight" in weights:
        return "resnet50", first / 64
    if any(name.startswith("cnn_body.block") for name in weights):
        dims = tuple(weights[f"self_att{s}.0.self_attn.norm.weight"].shape[0] for s in (2, 3, 4))
        return next(name for name, (_, known, _) in REGNETS.items() if known[:3] == dims), 1
    return "mobilenet_v3", weights["classifier_cnn.0.weight"].shape[1] / 960
