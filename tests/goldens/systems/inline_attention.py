"""InLine attention: the operator with its weights, the layers, and whole models in the authors' key layout."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.inline import InLineAttention, InLineStripeAttention
from manyheads.ops.inline import inline_attention, inline_weights
from tests.goldens.systems._tensors import arrays, gradients, tensors
from tests.goldens.systems.hosts import build, grid_of, run_model, scale_of


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model (``model``), a layer (it has weights) or the operator."""
    weights, given = tensors(state), tensors(inputs)
    if "image" in given:
        return arrays(run_model(build(config, "inline", weights), weights, given))
    return arrays(_layer(config, weights, given) if weights else _operator(config, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = given.get("key_mask", given.get("mask"))
    options = {
        "kernel": config.get("kernel", "identity"),
        "scale": scale_of(config, head_dim=given["q"].shape[-1]),
        "causal": bool(config.get("causal", False)),
        "key_mask": None if mask is None else mask.bool(),
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return inline_attention(q, k, v, **options)

    outputs = {"out": attend(given["q"], given["k"], given["v"])}
    outputs["weights"] = inline_weights(given["q"], given["k"], **options)
    if "grad_out" in given:
        found = gradients(attend, {name: given[name] for name in "qkv"}, given["grad_out"])
        outputs |= {f"d{name}": gradient for name, gradient in found.items()}
    return outputs


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    grad_out = given.pop("grad_out", None)
    kernel, local = config.get("kernel", "identity"), "residual.0.weight" in weights
    if "qkv" in given:
        dim = weights["get_v.weight"].shape[0]
        heads = config["num_heads"] if not local else dim // weights["residual.0.weight"].shape[1]
        grid = grid_of(config, given["qkv"].shape[2])
        stripe = InLineStripeAttention(dim, heads, kernel=kernel, local_residual=local)
        stripe.load_state_dict(weights)
        call = lambda qkv, x_mean: stripe(qkv, grid, x_mean.flatten(1))  # noqa: E731
    else:
        dim = weights["proj.weight"].shape[0]
        heads = config["num_heads"] if not local else dim // weights["residual.0.weight"].shape[1]
        token = bool(config.get("class_token", config.get("cls_token", "deit" in str(config.get("model", "")))))
        token = token or str(config.get("layer", "")).endswith("deit")
        grid = grid_of(config, given["x"].shape[1] - int(token))
        if grid[0] * grid[1] == given["x"].shape[1] - 1:
            token = True
        layer = InLineAttention(
            dim, heads, class_token=token, fused="qkv.weight" in weights, kernel=kernel, local_residual=local,
            qkv_bias="qkv.bias" in weights or "q.bias" in weights,
        )  # fmt: skip
        layer.load_state_dict(weights)
        call = lambda x: layer(x, grid)  # noqa: E731
    outputs = {"y": call(**given)}
    if grad_out is not None:
        outputs |= {f"d{name}": found for name, found in gradients(call, given, grad_out).items()}
    return outputs | {"out": outputs["y"]}
