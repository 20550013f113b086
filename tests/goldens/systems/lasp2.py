"""LASP-2 with the states of every rank, the gathered softmax attention of LASP-2H, and the layer of Linear-MoE."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel import LinearMoEAttention, lasp, lasp2, lasp2h, record, shard, unshard
from tests.goldens.systems._ranks import layout_of, ranks, softmax_outputs
from tests.goldens.systems._tensors import arrays, tensors

STATES = {
    "local_states": "local_state",
    "prefix_states": "prefix_state",
    "local_grad_states": "local_grad_state",
    "suffix_grad_states": "suffix_grad_state",
}
GATES = ("log_decay", "g")  # decays that depend on the data, by the token


def run(config: dict, state: dict, inputs: dict) -> dict:
    given = tensors(inputs)
    if state:
        return arrays(_layer(config, tensors(state), given))
    if config.get("kv_heads") is not None or config.get("attention") == "softmax":
        layout = layout_of(config)
        return arrays(softmax_outputs(lasp2h, {"causal": True, **config, "layout": layout}, given))
    slopes = given.pop("slopes", config.get("slopes"))
    causal = config.get("causal", True)
    decay = None if slopes is None else -torch.as_tensor(slopes, dtype=torch.float32).reshape(-1)
    options: dict[str, Any] = {"scale": config.get("scale", 1.0), "normalize": bool(config.get("normalize", False))}
    options["feature_map"] = config.get("feature_map")
    options["cu_seqlens"] = given.pop("cu_seqlens", config.get("cu_seqlens"))
    if str(config.get("method", "lasp2")).lower() == "lasp":
        found = ranks(config["world_size"]).run(on_rank, lasp, given, decay, _without(options, "cu_seqlens"))
    else:
        found = ranks(config["world_size"]).run(on_rank, lasp2, given, decay, options | {"causal": causal})
    same = (*STATES, "final_state", "grad_initial_state")
    outputs = {name: unshard([one[name] for one in found], dim=2) for name in found[-1] if name not in same}
    outputs |= {name: torch.stack([one[name] for one in found]) for name in STATES if name in found[0]}
    outputs |= {name: found[0][name] for name in same[-2:] if name in found[0]}
    if not causal:
        outputs["total_state"] = outputs["prefix_states"][0]
        if "suffix_grad_states" in outputs:
            outputs["total_grad_state"] = outputs["suffix_grad_states"][0]
    return arrays(outputs)


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def on_rank(scheme: Any, given: dict[str, Tensor], decay: Tensor | None, options: dict) -> dict[str, Tensor]:
    """One rank's part of a linear case."""
    rank, world = dist.get_rank(), dist.get_world_size()
    start = given.get("initial_state")
    local = {name: shard(t, rank, world, dim=2) for name, t in given.items() if name != "initial_state"}
    gates = next((name for name in GATES if name in local), None)
    leaves = {name: local[name].requires_grad_() for name in ("q", "k", "v", *([gates] if gates else []))}
    whole = scheme is lasp2 and options["cu_seqlens"] is None
    extra: dict[str, Any] = {"return_state": True} if whole else {}
    if start is not None and rank == 0:
        extra["initial_state"] = start.requires_grad_()
    with record(keep=True) as log:
        out = scheme(*[leaves[name] for name in "qkv"], log_decay=leaves[gates] if gates else decay, **extra, **options)
        out, final = out if whole else (out, None)
        result = {"out": out.detach()} | ({} if final is None else {"final_state": final.detach()})
        if "grad_out" in local:
            (out * local["grad_out"]).sum().backward()
            result |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
            if "initial_state" in extra:
                result["grad_initial_state"] = start.grad
    return result | {name: log.kept[kept, 0] for name, kept in STATES.items() if (kept, 0) in log.kept}


def _layer(config: dict, state: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole layer, (tokens, batch, width) as in Megatron where the configuration says so, sharded over ranks."""
    name = next(name for name in ("x", "hidden_states", "input") if name in given)
    megatron = bool(config.get("tokens_first", False))
    given = {key: t.transpose(0, 1).contiguous() if megatron else t for key, t in given.items()}
    world = config.get("world_size", 1)
    found = ranks(world).run(layer_on_rank, config, state, given[name], given.get("grad_out"))
    outputs = {key: unshard([one[key] for one in found], dim=1) for key in ("out", "grad_x") if key in found[0]}
    outputs = {key: t.transpose(0, 1) if megatron else t for key, t in outputs.items()}
    # Every rank holds all weights: their gradients are summed.
    weights = [key for key in found[0] if key not in ("out", "grad_x")]
    return outputs | {key: torch.stack([one[key] for one in found]).sum(0) for key in weights}


def layer_on_rank(config: dict, state: dict[str, Tensor], x: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
    """One rank's part of a case of the layer."""
    rank, world = dist.get_rank(), dist.get_world_size()
    slopes = config.get("slopes")
    layer = LinearMoEAttention(
        x.shape[-1], config["heads"], feature_map=config.get("feature_map", "silu"),
        norm=any("norm" in key for key in state), group=dist.group.WORLD,
        log_decay=None if slopes is None else -torch.as_tensor(slopes, dtype=torch.float32),
    )  # fmt: skip
    layer.load_state_dict(state)
    own = shard(x, rank, world, dim=1).requires_grad_()
    out = layer(own)
    if grad is None:
        return {"out": out.detach()}
    (out * shard(grad, rank, world, dim=1)).sum().backward()
    weights = {f"grad_{key}": parameter.grad for key, parameter in layer.named_parameters()}
    return {"out": out.detach(), "grad_x": own.grad} | weights
