"""DualToken-ViT: token module, gates, merging, block and model, in the key layout of the specification."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.layers.dual_token import BiDimensionalAttention, PositionAwareTokens
from manyheads.models.checkpoints import load_checkpoint
from manyheads.models.vision import dualtoken
from tests.goldens.systems._tensors import arrays, tensors, with_counters

Tensors = dict[str, Tensor]


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Dispatch on what the weights are of."""
    weights, given = tensors(state), tensors(inputs)
    parts = {"patch_embed.proj.weight": _model, "bi_attn.norm.weight": _block, "global_reduce.weight": _gates,
             "reduction.weight": _merge}  # fmt: skip
    part = next((part for key, part in parts.items() if key in weights), _module)
    return arrays(part(config, weights, given))


def _module_options(config: dict, weights: Tensors) -> dict:
    """What the weights tell of a token module, and the share of the old tokens, which only the configuration tells."""
    mixing = weights.get("token_fc.weight")
    side = config.get("token_size", 7) if mixing is None else round(mixing.shape[0] ** 0.5)
    steps = {key.split(".")[1] for key in weights if key.startswith("down.")}
    return {"steps": len(steps), "token_size": side, "mlp": "normal" if mixing is None else "mix",
            "alpha": config.get("alpha", 0.1)}  # fmt: skip


def _module(config: dict, weights: Tensors, given: Tensors) -> Tensors:
    module = PositionAwareTokens(weights["q.weight"].shape[0], config["num_heads"], **_module_options(config, weights))
    module.load_state_dict(weights)
    x, tokens = (given[name].requires_grad_() for name in ("x", "g"))
    maps = x.permute(0, 2, 3, 1)
    spread, new = module(maps, tokens)
    outputs = {"x_global": spread.permute(0, 3, 1, 2), "g_new": new, "x_ga": module.aggregate(maps)}
    return outputs | _gradients(outputs, given, {"x": x, "g": tokens}, module)


def _gates(config: dict, weights: Tensors, given: Tensors) -> Tensors:
    reduced, dim = weights["global_reduce.weight"].shape
    gates = BiDimensionalAttention(dim, reduction=dim // reduced)
    gates.load_state_dict(weights)
    outputs = {"y": gates(given["x"].requires_grad_().view(len(given["x"]), 1, -1, dim)).view(given["x"].shape)}
    return outputs | _gradients(outputs, given, {"x": given["x"]}, gates)


def _merge(config: dict, weights: Tensors, given: Tensors) -> Tensors:
    width, four = weights["reduction.weight"].shape
    merge = dualtoken.Merge(four // 4, width)
    merge.load_state_dict(weights)
    x, tokens = (given[name].requires_grad_() for name in ("x", "g"))
    merged, new = merge(x.permute(0, 2, 3, 1), tokens)
    outputs = {"x_out": merged.permute(0, 3, 1, 2), "g_out": new}
    return outputs | _gradients(outputs, given, {"x": x, "g": tokens}, merge)


def _block(config: dict, weights: Tensors, given: Tensors) -> Tensors:
    named = {f"stages.0.0.{key}": value for key, value in weights.items()}
    named = dualtoken.checkpoint_filter_fn(named, nn.Identity())
    dim, ratios = len(weights["norm2.weight"]), [weights[key] for key in ("conv_encoder.pw1.weight", "fc1.weight")]
    inner = {key[len("token_module.") :]: value for key, value in weights.items() if key.startswith("token_module.")}
    block = dualtoken.Block(dim, *(ratio.shape[0] / dim for ratio in ratios), 0.0, heads=config["num_heads"],
                            **_module_options(config, inner)).eval()  # fmt: skip
    block.load_state_dict({key.removeprefix("stages.0.blocks.0."): value for key, value in named.items()})
    x, tokens = (given[name].requires_grad_() for name in ("x", "g"))
    y, new = block(x.permute(0, 2, 3, 1), tokens)
    outputs = {"y": y.permute(0, 3, 1, 2), "g_new": new}
    return outputs | _gradients(outputs, given, {"x": x, "g": tokens})


def _model(config: dict, weights: Tensors, given: Tensors) -> Tensors:
    names = ("embed_dims", "num_heads", "mlp_ratios", "conv_ratio", "alpha")
    options = {name: config[name] for name in names if name in config}
    mixing = weights.get("stages.0.0.token_module.token_fc.weight")
    stages = range(len(config["embed_dims"]))
    halvings = [
        len({key for key in weights if re.match(rf"stages\.{stage}\.0\.token_module\.down\.\d+\.dw\.weight", key)})
        for stage in stages
    ]
    model = dualtoken.DualTokenViT(
        **options,
        depths=config["num_layers" if "num_layers" in config else "depths"],
        in_chans=weights["patch_embed.stem.0.weight"].shape[1],
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
        steps=halvings,
        token_size=round(weights["global_token"].shape[1] ** 0.5),
        mlp="normal" if mixing is None else "mix",
    ).eval()
    load_checkpoint(model, with_counters(weights, model), dualtoken.checkpoint_filter_fn)
    image = given["image"].requires_grad_()
    features, tokens = model.forward_tokens(image)
    pooled = model.forward_head(features, pre_logits=True)
    outputs = {"features": pooled, "global_tokens": tokens, "logits": model.head(pooled)}
    return outputs | _gradients({"y": outputs["logits"]}, given, {"image": image})


def _gradients(outputs: Tensors, given: Tensors, wanted: Tensors, module: nn.Module | None = None) -> Tensors:
    """Gradients of the outputs, weighted as a case says: each ``dNAME`` is of one output, dy of the first of them."""
    total = sum((output * given[f"d{name}"]).sum() for name, output in outputs.items() if f"d{name}" in given)
    if not isinstance(total, Tensor):
        named = next((given[name] for name in ("dy", "dlogits", "grad_out") if name in given), None)
        if named is None:
            return {}
        total = (next(iter(outputs.values())) * named).sum()
    wanted = wanted | dict(module.named_parameters() if module is not None else ())
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
