"""DependencyViT: reversed attention and the model, in the layout of the reimplementation that the cases come from."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from manyheads.layers.dependency import ReversedAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import dependency
from manyheads.ops.reversed import dependency_mask, reversed_attention
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``, or on the inputs where there is none."""
    part = config.get("part", "model" if "image" in inputs else "layer" if state else "operator")
    parts = {"layer": _layer, "operator": _operator if not state else _layer}
    return arrays(parts.get(part.split(":")[0], _model)(config, tensors(state), tensors(inputs)))


def _operator(config: dict, _: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"q": "query", "k": "key", "v": "value"}
    q, k, v = ((given[short] if short in given else given[name]).requires_grad_() for short, name in names.items())
    # Either the product of selector and message, or both of them (batch, tokens, heads) and (batch, tokens).
    weight = given.get("weight")
    if weight is None and "p" in given:
        weight = given["p"].mT * given["m"][:, None] if "m" in given else given["p"].mT
    elif weight is None and "m" in given:
        weight = given["m"][:, None].expand(q.shape[:3])
    options = {"weight": weight, "causal": config.get("causal", False), "scale": config.get("scale")}
    masks = {name: given[name].bool() for name in ("child_mask", "parent_mask") if name in given}
    y = reversed_attention(q, k, v, **options, **masks)
    outputs = {"y": y, "dependency_mask": dependency_mask(q, k, **options, **masks)}
    return outputs | _gradients(y, given, {"q": q, "k": k, "v": v})


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    dim = weights["proj.weight"].shape[0]
    layer = ReversedAttention(
        dim,
        config.get("num_heads", weights["head_selector.weight"].shape[0]),
        qkv_bias="qkv.bias" in weights,
        qk_norm="q_norm.weight" in weights,
        norm_eps=config.get("norm_eps", 1e-5),
        temperature=config.get("head_selector_temperature", 0.1),
        message_hidden_ratio=weights["message_controller.fc1.weight"].shape[0] / dim,
        message_bias=0.0 if "message_controller.fc2.bias" in weights else None,
    ).eval()
    layer.load_state_dict(weights)
    x, message = given["x"].requires_grad_(), given.get("m")
    if message is not None:
        message.requires_grad_()
    options: dict = {"causal": config.get("causal", False), "parents": given.get("parents")}
    options["mask"] = given["mask"].bool() if "mask" in given else None
    y, left = layer(x, message, **options)
    outputs = {"y": y, "m_out": left, "dependency_mask": layer.dependency(x, message, **options)}
    found = {"x": x, **({} if message is None else {"m": message}), **dict(layer.named_parameters())}
    return outputs | _gradients(y, given, found)


def _gradients(y: Tensor, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of ``sum(y * dy)``, where a case gives dy."""
    gradient = next((given[name] for name in ("dy", "grad_y", "grad_out") if name in given), None)
    if gradient is None:
        return {}
    grads = torch.autograd.grad((y * gradient).sum(), list(wanted.values()), allow_unused=True)
    return {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    if config.get("class_token") or "cls_token" in weights:
        raise ValueError("class_token: DependencyViT has none, it takes the mean over the tokens")
    names = ("in_chans", "num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    names += ("head_selector_temperature", "norm_eps")
    options = {name: config[name] for name in names if name in config}
    # Blocks and ratio of the lite variant: no case of the project's own names them, so both are known by their kind.
    for value in (value for name, value in config.items() if name.startswith("prun") and value):
        options["prune_layers" if isinstance(value, (list, tuple)) else "prune_ratio"] = value
    # What the weights tell needs no name in the configuration.
    controller = weights["blocks.0.attn.message_controller.fc1.weight"]
    generators = [int(found[1]) for key in weights if (found := re.match(r"blocks\.(\d+)\.peg\.", key))]
    has_scales = "blocks.0.ls1.gamma" in weights
    model = dependency.DependencyViT(
        **options,
        init_values=(config.get("init_values") or 1e-6) if has_scales else 0,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        cpe_depth=max(generators, default=-1) + 1,
        pos_embed="pos_embed" in weights,
        message_hidden_ratio=controller.shape[0] / controller.shape[1],
        message_bias=0.0 if "blocks.0.attn.message_controller.fc2.bias" in weights else None,
    ).eval()
    load_checkpoint(model, weights, dependency.checkpoint_filter_fn)
    image = given["image"].requires_grad_()
    found = model.dependencies(image)
    features = model.forward_features(image)
    pooled = model.forward_head(features, pre_logits=True)
    logits = model.head(pooled)
    gradient = next((given[name] for name in ("dlogits", "dy", "grad_out") if name in given), None)
    outputs = {
        "features": pooled,
        "logits": logits,
        "tokens": features.flatten(1, 2),
        "message": found.message,
        "message_sorted": found.message.sort(dim=1).values,
        "dependency_first": found.masks[0],
        "dependency_last": found.masks[-1],
    }
    return outputs | _gradients(logits, given | ({} if gradient is None else {"dy": gradient}), {"image": image})
