"""Ring self-attention: layouts, the streaming form in every layout, the raw scores of the paper's own form."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel import ring_scores, ring_self_attention, rsa_linformer, shard, token_index, unshard
from tests.goldens.systems._ranks import layout_of, ranks, softmax_outputs
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict, inputs: dict) -> dict:
    if not inputs:
        return arrays(_layouts(config["tokens"], config["world_size"]))
    given = tensors(inputs)
    if {"E", "F"} <= given.keys():
        return arrays(_linformer(config, given))
    outputs = softmax_outputs(ring_self_attention, config, dict(given))
    if layout_of(config) == "contiguous" and not config.get("per_sequence"):
        rows = ranks(config["world_size"]).run(scores_on_rank, given["q"], given["k"])
        outputs["scores"] = torch.cat(rows, dim=2)
    return arrays(outputs)


def _layouts(tokens: int, world: int) -> dict[str, Tensor]:
    found = {}
    for layout in ("zigzag", "striped", "contiguous"):
        if tokens % ((2 if layout == "zigzag" else 1) * world) == 0:
            found[f"{layout}_{world}rank"] = token_index(tokens, world, layout=layout)
        for ulysses in (u for u in range(2, world) if world % u == 0):
            if tokens % world == 0 and tokens % ((2 if layout == "zigzag" else 1) * world // ulysses) == 0:
                name = f"{layout}_ring{world // ulysses}_ulysses{ulysses}"
                found[name] = token_index(tokens, world, layout=layout, ulysses=ulysses)
    return found


def _linformer(config: dict, given: dict[str, Tensor]) -> dict[str, Tensor]:
    found = ranks(config["world_size"]).run(linformer_on_rank, given, config.get("scale"))
    return {name: unshard([one[name] for one in found], dim=2) for name in found[0]}


def linformer_on_rank(given: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """One rank's part of a case with projected keys and values."""
    rank, world = dist.get_rank(), dist.get_world_size()
    local = {name: shard(t, rank, world, dim=1 if name in ("E", "F") else 2) for name, t in given.items()}
    leaves = [local[name].requires_grad_() for name in ("q", "k", "v")]
    out = rsa_linformer(*leaves, local["E"], local["F"], scale=scale)
    if "grad_out" not in local:
        return {"out": out.detach()}
    (out * local["grad_out"]).sum().backward()
    return {"out": out.detach()} | {f"grad_{name}": leaf.grad for name, leaf in zip("qkv", leaves)}


def scores_on_rank(query: Tensor, key: Tensor) -> Tensor:
    """This rank's rows of the raw scores."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return ring_scores(*(shard(t, rank, world, dim=2) for t in (query, key)))
