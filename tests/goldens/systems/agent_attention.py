"""Agent attention: the operator, the layers, whole models, and the training-free form in diffusion models."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from manyheads.layers.agent import AgentAttention, AgentStripeAttention
from manyheads.ops.agent import agent_attention, agent_weights
from tests.goldens.systems._tensors import arrays, gradients, tensors
from tests.goldens.systems.hosts import build, grid_of, run_model, scale_of


def run(config: dict, state: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model (``image``), a diffusion block (``context``), a layer (it has weights) or the operator."""
    weights, given = tensors(state), tensors(inputs)
    if "image" in given:
        return arrays(run_model(build(config, "agent", weights), weights, given))
    if "agent_ratio" in config:
        from tests.goldens.systems.agent_diffusion import run_block

        return arrays(run_block(config, weights, given))
    return arrays(_layer(config, weights, given) if weights else _operator(config, given))


def _operator(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    found = _names(given)
    mask = given.get("key_mask", given.get("mask"))
    mask = None if mask is None else mask.bool()
    width = given["q"].shape[-1]
    scale = scale_of(config, "scale", "scale1", "s1", "agent_scale", head_dim=width)
    second = scale_of(config, "query_scale", "scale2", "s2", head_dim=width)
    if "k_scale2" in config:
        second = width ** (-0.5 * config["k_scale2"])
    shortcut = config.get("shortcut", config.get("c", config.get("k_shortcut", 0.0))) or 0.0
    wanted = {name: given[name] for name in ("q", "k", "v", *(n for n in found.values() if n))}

    def attend(**t: Tensor) -> Tensor:
        b1, b2 = (t[found[name]] if found[name] else None for name in ("b1", "b2"))
        return agent_attention(
            t["q"], t["k"], t["v"], t[found["a"]], agent_bias=b1, query_bias=b2, key_mask=mask, scale=scale,
            query_scale=second, shortcut=shortcut,
        )  # fmt: skip

    agents = given[found["a"]]
    b1, b2 = (given.get(found[name] or "") for name in ("b1", "b2"))
    outputs = {
        "out": attend(**wanted),
        "agent_weights": agent_weights(
            agents, given["k"], bias=b1, mask=None if mask is None else mask[:, None, None], scale=scale
        ),
        "query_weights": agent_weights(given["q"], agents, bias=b2, scale=scale if second is None else second),
    }
    if "grad_out" in given:
        outputs |= {f"d{name}": gradient for name, gradient in gradients(attend, wanted, given["grad_out"]).items()}
    return outputs


def _names(given: dict[str, Tensor]) -> dict[str, str | None]:
    """What the case calls agents and biases: by the usual names, biases else by their shape."""
    names = {"a": ("a", "A", "agent", "agents", "agent_tokens"), "b1": ("b1", "agent_bias", "bias1", "position_bias")}
    names["b2"] = ("b2", "query_bias", "bias2")
    found = {ours: next((name for name in known if name in given), None) for ours, known in names.items()}
    agents, queries, keys = given[found["a"] or "a"].shape[2], given["q"].shape[2], given["k"].shape[2]
    rest = [name for name in given if name not in ("q", "k", "v", "grad_out", *found.values()) and "mask" not in name]
    for ours, shape in (("b1", (agents, keys)), ("b2", (queries, agents))):
        found[ours] = found[ours] or next((name for name in rest if tuple(given[name].shape[-2:]) == shape), None)
    return found


def _layer(config: dict, weights: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    grad_out = given.pop("grad_out", None)
    weights.pop("relative_position_index", None)
    heads, agents = weights["an_bias"].shape[:2]
    grid = (weights["ha_bias"].shape[2], weights["wa_bias"].shape[3])
    dense = config.get("agent_grid", config.get("agent_hw"))
    if "get_v.weight" in weights:
        stripe = AgentStripeAttention(weights["get_v.weight"].shape[0], heads, grid, agents=agents)
        stripe.load_state_dict(weights)
        whole = grid_of(config, given["qkv"].shape[2])
        call = lambda qkv: stripe(qkv, whole)  # noqa: E731
    else:
        any_size = bool(config.get("dense") or dense)
        layer = AgentAttention(
            weights["proj.weight"].shape[0], heads, grid, agents=agents, class_token="ac_bias" in weights,
            fused="qkv.weight" in weights, reduction=grid[0] // weights["ah_bias"].shape[3],
            qkv_bias="qkv.bias" in weights or "q.bias" in weights, any_size=any_size,
            agent_grid=None if dense is None else tuple(dense),
        )  # fmt: skip
        layer.load_state_dict(weights)
        shape = grid_of(config, given["x"].shape[1]) if any_size else grid
        call = lambda x: layer(x, shape)  # noqa: E731
    given = {name: given[name] for name in ("qkv", "x") if name in given}
    outputs = {"y": call(**given)}
    if grad_out is not None:
        outputs |= {f"d{name}": found for name, found in gradients(call, given, grad_out).items()}
    return outputs | {"out": outputs["y"]}
