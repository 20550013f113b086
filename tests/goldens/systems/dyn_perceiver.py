"""Dynamic Perceiver: cross and self layers, and whole models with any of the three branches in the authors' layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.layers.latent import CrossLayer, SelfLayer
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision.dyn_perceiver import DynPerceiver, checkpoint_filter_fn
from manyheads.models.vision.dyn_perceiver_cnn import REGNETS
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
    """A model, or a layer; with the gradients of what is named "d" and an output's name."""
    weights, given = tensors(state), tensors(inputs)
    wanted = {name: value for name, value in given.items() if not name.startswith("d") and value.is_floating_point()}
    asked = {name[1:]: value for name, value in given.items() if name.startswith("d")}
    if asked:
        for leaf in wanted.values():
            leaf.requires_grad_()
    outputs = _model(config, weights, given) if config["part"] == "model" else _layer(config, weights, given)
    if asked:
        torch.stack([(outputs[name] * gradient).sum() for name, gradient in asked.items()]).sum().backward()
        outputs |= {f"d{name}": leaf.grad for name, leaf in wanted.items()}
    return arrays(outputs)


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    widths = {"qk_dim": config.get("qk_channels"), "v_dim": config.get("v_channels")}
    options = {"mlp_ratio": config.get("widening_factor", 1), **widths}
    heads = config["num_heads"]
    padding = given.get("pad_mask")
    if "self" in config["part"]:
        layer: nn.Module = SelfLayer(
            config.get("num_channels", given.get("x", given.get("x_q")).shape[-1]), heads, **options
        )
        asks = [given.get("x", given.get("x_q"))]
    else:
        keys = config["feat_w"] * config["feat_h"] if config.get("key_position_bias") else None
        layer = CrossLayer(config["q_channels"], config["kv_channels"], heads, keys=keys, **options)
        asks = [given["x_q"], given["x_kv"]]
    load_checkpoint(layer, weights, checkpoint_filter_fn)
    return {"y": layer.eval()(*asks, None if padding is None else padding.bool())}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    cnn, width = _branch(weights)
    model = DynPerceiver(
        in_chans=given["image"].shape[1],
        num_classes=config["num_classes"],
        cnn=cnn,
        width=width,
        num_latents=config["num_latents"],
        num_heads=config["num_SA_heads"],
        mlp_ratio=config["SA_widening_factor"],
        depth_factor=config["depth_factor"],
        cnn_classes=[value for name, value in weights.items() if name.startswith("classifier_cnn.")][-1].shape[0],
        **{ours: bool(config.get(theirs, True)) for theirs, ours in FLAGS.items()},
    ).eval()
    # Cases leave out the counters, which the model keeps under other names.
    weights = checkpoint_filter_fn(weights, model)
    load_checkpoint(model, with_counters(weights, model))
    return dict(zip(NAMES, model.forward_exits(given["image"]), strict=True))


def _branch(weights: dict[str, Tensor]) -> tuple[str, float]:
    """The branch and its factor on the channels, from the shapes of the weights."""
    first = weights["latent"].shape[1]
    if "cnn_body_stage1.0.conv1.weight" in weights:
        return "resnet50", first / 64
    if any(name.startswith("cnn_body.block") for name in weights):
        second = weights["self_att2.0.self_attn.norm.weight"].shape[0]
        third = weights["self_att3.0.self_attn.norm.weight"].shape[0]
        return next(name for name, (_, dims, _) in REGNETS.items() if dims[:2] == (second, third)), 1
    return "mobilenet_v3", weights["classifier_cnn.0.weight"].shape[1] / 960
