"""LASP-2 with the states of every rank, and the gathered softmax attention of LASP-2H."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel import lasp2, lasp2h, record, shard, unshard
from tests.goldens.systems._ranks import ranks, softmax_outputs
from tests.goldens.systems._tensors import arrays, tensors

STATES = {
    "local_states": "local_state",
    "prefix_states": "prefix_state",
    "local_grad_states": "local_grad_state",
    "suffix_grad_states": "suffix_grad_state",
}


def run(config: dict, state: dict, inputs: dict) -> dict:
    given = tensors(inputs)
    if "kv_heads" in config:
        return arrays(softmax_outputs(lasp2h, config | {"layout": "contiguous"}, given))
    slopes = given.pop("slopes", config.get("slopes"))
    decay = None if slopes is None else -torch.as_tensor(slopes, dtype=torch.float32).reshape(given["q"].shape[1])
    found = ranks(config["world_size"]).run(on_rank, given, decay, config.get("causal", True), config.get("scale", 1.0))
    outputs = {name: unshard([one[name] for one in found], dim=2) for name in found[0] if name not in STATES}
    outputs |= {name: torch.stack([one[name] for one in found]) for name in STATES if name in found[0]}
    if not config.get("causal", True):
        outputs["total_state"] = outputs["prefix_states"][0]
        if "suffix_grad_states" in outputs:
            outputs["total_grad_state"] = outputs["suffix_grad_states"][0]
    return arrays(outputs)


def on_rank(given: dict[str, Tensor], decay: Tensor | None, causal: bool, scale: float) -> dict[str, Tensor]:
    """One rank's part of a linear case."""
    local = {name: shard(t, dist.get_rank(), dist.get_world_size(), dim=2) for name, t in given.items()}
    leaves = {name: local[name].requires_grad_() for name in ("q", "k", "v")}
    with record(keep=True) as log:
        out = lasp2(*leaves.values(), log_decay=decay, causal=causal, scale=scale)
        result = {"out": out.detach()}
        if "grad_out" in local:
            (out * local["grad_out"]).sum().backward()
            result |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return result | {name: log.kept[kept, 0] for name, kept in STATES.items() if (kept, 0) in log.kept}
