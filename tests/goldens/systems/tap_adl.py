"""TAP and ADL: the pooling, the loss with its gradients, FAN and RVT in the authors' key layout."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.layers.tap import TokenAwarePooling
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import fan, rvt
from manyheads.models.vision.token_robustness import attention_maps
from manyheads.objectives.diversification import attention_diversification_loss
from tests.goldens.systems._tensors import arrays, tensors, with_counters

Convert = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]
PREFIX = "dilation_predictor."


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The case is told by its inputs and keys: raw scores for the loss, blocks for a model, else a map to pool."""
    weights, given = tensors(state), tensors(inputs)
    if any(name.startswith("raw_") for name in given):
        return arrays(_loss(config, given))
    if any(".blocks." in name or name.startswith("blocks.") for name in weights):
        return arrays(_model(config, weights, given))
    return arrays(_pooling(config, weights, given))


def _loss(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = sorted((name.removeprefix("raw_") for name in given if name.startswith("raw_")), key=int)
    leaves = {name: x.requires_grad_() for name, x in given.items() if name.startswith(("raw_", "column_"))}
    maps = [(leaves[f"raw_{i}"] + leaves.get(f"column_{i}", torch.zeros(()))).softmax(-1) for i in layers]
    loss = attention_diversification_loss(maps, threshold=config.get("threshold", 2))
    loss.backward()
    return {"loss": loss, "adl": loss, **{f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}}


def _pooling(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    scales, dim = own["proj.0.weight"].shape[:2]
    layer = TokenAwarePooling(dim, scales, temperature=config.get("temperature", config.get("tau", 1)))
    layer.load_state_dict(with_counters(own, layer))
    layer.train(_trains(config))
    given["x"].requires_grad_(_wanted(given) is not None)
    # Weights first: in training, a second pass would use the same batch statistics.
    return {"scale_weights": layer.scale_weights(given["x"]), **_with_gradients("y", layer(given["x"]), given, layer)}


def _model(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    model, convert = (_rvt if any(name.startswith("transformers.") for name in weights) else _fan)(config, weights)
    load_checkpoint(model, with_counters(convert(weights, model), model), convert)
    model.train(_trains(config))
    image = given["image" if "image" in given else "x"].requires_grad_(_wanted(given) is not None)
    with attention_maps(model) as maps:
        last = model.forward_features(image)
    adl = attention_diversification_loss(maps, threshold=config.get("threshold", 1))
    outputs = {"features": model.forward_head(last, pre_logits=True), "adl": adl}
    outputs |= {"attention_first": maps[0], "attention_last": maps[-1]}
    outputs |= {f"attention_{layer}": weights for layer, weights in enumerate(maps)}
    return outputs | _with_gradients("logits", model.forward_head(last), given, model)


def _rvt(config: dict, weights: dict[str, Tensor]) -> tuple[rvt.RVT, Convert]:
    stages = range(_count(weights, r"transformers\.(\d+)\."))
    first = [f"transformers.{s}.blocks.0." for s in stages]
    dims = [weights[f"{block}norm1.weight"].shape[0] for block in first]
    masks = {name: value.shape for name, value in weights.items() if name.endswith(".att_mask")}
    heads = config.get("heads", config.get("num_heads"))
    stem = weights["patch_embed.proj.3.weight"]
    model = rvt.RVT(
        weights["patch_embed.proj.0.weight"].shape[1],
        _classes(weights),
        patch_size=4 * stem.shape[-1],
        base_dims=[dim // count for dim, count in zip(dims, heads)],
        depths=[_count(weights, rf"transformers\.{s}\.blocks\.(\d+)\.") for s in stages],
        num_heads=heads,
        mlp_ratio=weights[f"{first[0]}mlp.fc1.weight"].shape[0] / dims[0],
        num_scales=_scales(weights, first[0]),
        masked_blocks=len(masks),
        mask_tokens=max((shape[-1] for shape in masks.values()), default=196),
    )
    return model, rvt.checkpoint_filter_fn


def _fan(config: dict, weights: dict[str, Tensor]) -> tuple[fan.FAN, Convert]:
    dim = weights["cls_token"].shape[-1]
    convolutions = r"patch_embed\.backbone\.stages\."
    stages = range(_count(weights, convolutions + r"(\d+)\."))
    first = [f"patch_embed.backbone.stages.{s}.blocks.0.norm.weight" for s in stages]
    stem = "patch_embed.backbone.stem.0.weight" if stages else "patch_embed.proj.0.0.weight"
    model = fan.FAN(
        weights[stem].shape[1],
        _classes(weights),
        embed_dim=dim,
        depth=_count(weights, r"blocks\.(\d+)\."),
        num_heads=weights["blocks.0.mlp.temperature"].shape[0],
        mlp_ratio=weights["blocks.0.mlp.mlp_v.fc1.weight"].shape[0] / dim,
        num_scales=_scales(weights, "blocks.0."),
        class_depth=_count(weights, r"cls_attn_blocks\.(\d+)\."),
        conv_depths=[_count(weights, rf"{convolutions}{s}\.blocks\.(\d+)\.") for s in stages],
        conv_dims=[weights[name].shape[0] for name in first] or (128, 256),
    )
    return model, fan.checkpoint_filter_fn


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers the keys have there."""
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


def _scales(weights: dict[str, Tensor], block: str) -> int:
    predictor = weights.get(f"{block}{PREFIX}proj.2.weight")
    return 0 if predictor is None else predictor.shape[0]


def _classes(weights: dict[str, Tensor]) -> int:
    return weights["head.weight"].shape[0] if "head.weight" in weights else 0


def _trains(config: dict) -> bool:
    return bool(config.get("training", config.get("train", config.get("mode") == "train")))


def _wanted(given: dict[str, Tensor]) -> Tensor | None:
    return next((given[name] for name in ("dout", "grad_out", "dy", "dlogits") if name in given), None)


def _with_gradients(name: str, out: Tensor, given: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The output and, where a gradient comes in, those of the inputs and parameters."""
    grad = _wanted(given)
    if grad is None:
        return {name: out}
    (out * grad).sum().backward()
    leaves = {**given, **dict(module.named_parameters())}
    return {name: out, **{f"d{key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}}
