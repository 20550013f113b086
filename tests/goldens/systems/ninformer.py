"""NiNformer: the gating unit, its inner mixer, the block and the image model, in the authors' key layout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.layers.mixer_gate import MixerGating
from manyheads.models.checkpoints import load_checkpoint, rename
from manyheads.models.vision.ninformer import OFFICIAL, GatedBlock, NiNformer, checkpoint_filter_fn
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on what the weights are of: an image model, a block, or a gating unit."""
    weights, given = tensors(state), tensors(inputs)
    part = _model if "patcher.weight" in weights else _block if "norm.weight" in weights else _unit
    return arrays(part(config, weights, given))


def _unit(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = rename(weights, OFFICIAL)
    layer = MixerGating(*_sizes(ours)).eval()
    layer.load_state_dict(ours)
    x = given["x"].requires_grad_()
    y = layer(x)
    return {"y": y, "gate": layer.mixer(x), **_gradients(y, given, {"x": x, **_parameters(weights, layer)})}


def _block(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = rename(weights, OFFICIAL)
    dim, tokens, hidden, inner = _sizes({k.removeprefix("mgu."): v for k, v in ours.items() if k.startswith("mgu.")})
    block = GatedBlock(dim, tokens, hidden, inner, config.get("dropout", 0.5), 0.0).eval()
    block.load_state_dict(ours)
    x = given["x"].requires_grad_()
    y = block(x)
    return {"y": y, **_gradients(y, given, {"x": x, **_parameters(weights, block)})}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    width, in_chans, patch, _ = weights["patcher.weight"].shape
    blocks = {int(key.split(".")[1]) for key in weights if key.startswith("model.")}
    hidden, channels = (weights[f"model.0.{name}.weight"].shape[0] for name in ("mgu.Mixer.token_mix.2.net.0", _INNER))
    model = NiNformer(
        in_chans=in_chans,
        num_classes=weights["classifier.weight"].shape[0],
        img_size=config["image_size"],
        patch_size=patch,
        embed_dim=width,
        depth=max(blocks, default=-1) + 1,
        mlp_dim=channels,
        token_dim=hidden,
        dropout=config.get("dropout", 0.5),
    ).eval()
    load_checkpoint(model, weights, checkpoint_filter_fn)
    image = given["image" if "image" in given else "x"].requires_grad_()
    x = model.forward_features(image)
    logits = model.forward_head(x)
    wanted = {"image": image, **_parameters(weights, model)}
    return {"tokens": x.flatten(1, 2), "logits": logits, **_gradients(logits, given, wanted)}


_INNER = "mgu.Mixer.channel_mix.1.net.0"


def _sizes(unit: dict[str, Tensor]) -> tuple[int, int, int, int]:
    """dim, tokens, hidden units over tokens and over channels."""
    hidden, tokens = unit["mixer.token_in.weight"].shape
    return unit["proj.weight"].shape[0], tokens, hidden, unit["mixer.channel_in.weight"].shape[0]


def _parameters(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters by the authors' names."""
    ours = dict(module.named_parameters())
    return {name: ours[next(iter(rename({name: weight}, OFFICIAL)))] for name, weight in weights.items()}


def _gradients(y: Tensor, given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of ``sum(y * dy)``, where a case gives dy."""
    gradient = next((given[name] for name in ("dy", "dlogits", "grad_out") if name in given), None)
    if gradient is None:
        return {}
    grads = torch.autograd.grad((y * gradient).sum(), list(wanted.values()))
    return {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
