"""Neighborhood attention: masks of one axis, the operator, the layer with its bias table, and whole models."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.models import load_checkpoint
from manyheads.models.vision.nat import NAT, checkpoint_filter_fn
from manyheads.ops.neighborhood import neighborhood_attention, neighborhood_mask
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on what the configuration describes."""
    weights, given = tensors(state), tensors(inputs)
    if "rows" in config:
        return arrays(_masks(config))
    if "embed_dim" in config:
        return arrays(_model(config, weights, given))
    if "q" in given:
        return arrays(_operator(config, given))
    return arrays(_layer(config, weights, given))


def _masks(config: dict) -> dict[str, Tensor]:
    outputs = {}
    for length, window, stride, dilation, causal in config["rows"]:
        mask = neighborhood_mask(length, window, stride=stride, dilation=dilation, causal=bool(causal))
        outputs[f"mask_X{length}_k{window}_s{stride}_d{dilation}_c{int(causal)}"] = mask.to(torch.int64)
    return outputs


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ["q", "k", "v", *(name for name in ("rpb", "additional_k", "additional_v") if name in given)]
    leaves = {name: given[name].requires_grad_() for name in names}
    out, lse = neighborhood_attention(
        *(leaves[name] for name in "qkv"),
        window=config["kernel_size"],
        stride=config.get("stride", 1),
        dilation=config.get("dilation", 1),
        causal=config.get("is_causal", False),
        rel_pos_bias=leaves.get("rpb"),
        additional_key=leaves.get("additional_k"),
        additional_value=leaves.get("additional_v"),
        scale=config.get("scale"),
        return_lse=True,
    )
    outputs = {"out": out, "lse": lse}
    if "d_out" in given:
        (out * given["d_out"]).sum().backward()
        outputs |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return outputs


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = NeighborhoodAttention(
        config["dim"],
        config["num_heads"],
        kernel_size=config["kernel_size"],
        axes=given["x"].ndim - 2,
        dilation=config.get("dilation") or 1,
        stride=config.get("stride") or 1,
        causal=config.get("is_causal") or False,
        rel_pos_bias="rpb" in weights,
        qkv_bias="qkv.bias" in weights,
        qk_scale=config.get("qk_scale"),
    )
    layer.load_state_dict(weights)
    names = dict(layer.named_parameters())
    x = given["x"].requires_grad_()
    outputs = {"y": layer.eval()(x)}
    grad = next((given[name] for name in ("d_y", "dy") if name in given), None)
    if grad is not None:
        (outputs["y"] * grad).sum().backward()
        outputs |= {f"{prefix}x": x.grad for prefix in ("d_", "d")}
        outputs |= {f"d_{name}": tensor.grad for name, tensor in names.items() if tensor.grad is not None}
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = ("in_chans", "num_classes", "embed_dim", "num_heads", "kernel_size", "mlp_ratio", "qkv_bias", "layer_scale")
    options = {name: config[name] for name in plain if name in config}
    depths = config["depths"] if "depths" in config else [config["depth"]]
    options["num_heads"] = config["num_heads"] if isinstance(config["num_heads"], list) else [config["num_heads"]]
    dilations = config.get("dilations")
    if isinstance(dilations, list) and dilations and isinstance(dilations[0], int):
        dilations = [dilations]
    variant = f"{config.get('variant', '')} {config.get('name', '')}".lower().replace("-", "_")
    if "patch_embed.proj.weight" in weights:
        patch = weights["patch_embed.proj.weight"].shape[-1]
        options |= {"patch_size": patch, "merging": "patch" if patch == 4 else "conv"}
        options["mlp_ratio"] = config.get("mlp_ratio", 4)
    if "rpb" in variant or "vit" in variant:
        options |= {"attention": "full", "image_size": config.get("img_size", given["image"].shape[-1])}
    model = NAT(depths=depths, dilations=dilations, drop_path_rate=config.get("drop_path_rate", 0.0), **options)
    load_checkpoint(model, weights, checkpoint_filter_fn)
    image = given["image"].requires_grad_("d_logits" in given)
    features = model.eval().forward_head(model.forward_features(image), pre_logits=True)
    outputs = {"features": features, "logits": model.get_classifier()(features)}
    if "d_logits" in given:
        (outputs["logits"] * given["d_logits"]).sum().backward()
        outputs |= {"d_image": image.grad}
        outputs |= {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs
