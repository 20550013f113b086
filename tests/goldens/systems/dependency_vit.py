"""DependencyViT: reversed attention and the model, in the layout of the reimplementation that the cases come from."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.dependency import ReversedAttention
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import dependency
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on ``part``."""
    part = _layer if config["part"].startswith("layer") else _model
    return arrays(part(config, tensors(state), tensors(inputs)))


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = ReversedAttention(
        config["dim"],
        config["num_heads"],
        qkv_bias=config.get("qkv_bias", False),
        qk_norm=config.get("qk_norm", False),
        temperature=config.get("head_selector_temperature", 0.1),
        message_hidden_ratio=weights["message_controller.fc1.weight"].shape[0] / config["dim"],
        message_bias=0.0 if "message_controller.fc2.bias" in weights else None,
    ).eval()
    layer.load_state_dict(weights)
    gradient = next((given[name] for name in ("dy", "grad_y", "grad_out") if name in given), None)
    x, message = given["x"].requires_grad_(), given.get("m")
    if message is not None:
        message.requires_grad_()
    y, left = layer(x, message)
    outputs = {"y": y, "m_out": left, "dependency_mask": layer.dependency(x, message)}
    if gradient is not None:
        (y * gradient).sum().backward()
        found = {"x": x, "m": message, **dict(layer.named_parameters())}
        outputs |= {f"d{name}": t.grad for name, t in found.items() if t is not None and t.grad is not None}
    return outputs


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_chans", "num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    names += ("qkv_bias", "qk_norm", "head_selector_temperature", "cpe_depth", "norm_eps")
    options = {name: config[name] for name in names if name in config}
    # Blocks and ratio of the lite variant: no case of the project's own names them, so both are known by their kind.
    pruning = [value for name, value in config.items() if name.startswith("prun") and value]
    for value in pruning:
        options["prune_layers" if isinstance(value, list) else "prune_ratio"] = value
    first = "blocks.0.attn.message_controller.fc1.weight"
    model = dependency.DependencyViT(
        **options,
        init_values=1e-6 if config.get("layer_scale", True) else 0,
        pos_embed="pos_embed" in weights,
        message_hidden_ratio=weights[first].shape[0] / config["embed_dim"],
    ).eval()
    load_checkpoint(model, weights, dependency.checkpoint_filter_fn)
    found = model.dependencies(given["image"])
    return {
        "features": model.forward_head(model.forward_features(given["image"]), pre_logits=True),
        "logits": model(given["image"]),
        "message_sorted": found.message.sort(dim=1).values,
        "dependency_first": found.masks[0],
        "dependency_last": found.masks[-1],
    }
