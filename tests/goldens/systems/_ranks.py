"""What the adapters of the parallel schemes share: ranks, started once, and tensors put together from theirs."""

from __future__ import annotations

import atexit
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel import LocalRanks, record, shard, ulysses_ring_attention, unshard

ROOT = str(Path(__file__).parents[3])
NOTHING = -10000.0  # the log-sum-exp that the golden files give to rows without keys


@functools.cache
def ranks(world: int) -> LocalRanks:
    """Processes that stay until the tests end."""
    if ROOT not in sys.path:
        sys.path.append(ROOT)
    pool = LocalRanks(world)
    atexit.register(pool.close)
    return pool


PACKS = ("cu_seqlens", "cu_seqlens_key", "per_sequence")


def layout_of(config: dict) -> str:
    """The layout's name: the first word of what says how the tokens are split."""
    return str(config.get("layout") or config.get("split") or "contiguous").split()[0].strip(",;:")


def softmax_outputs(scheme: Callable[..., Any], config: dict, given: dict[str, Tensor], **options: Any) -> dict:
    """Output, lse, gradients in global order, and the partial results of every rank and step."""
    world, layout = config["world_size"], layout_of(config)
    settings = dict(causal=config.get("causal", False), scale=config.get("scale"), layout=layout, **options)
    packs = {name: given.pop(name, config.get(name)) for name in PACKS}
    packs = {name: value for name, value in packs.items() if value is not None}
    for name in ("window", "softcap"):
        if config.get(name) is not None:
            settings[name] = config[name]
    if config.get("valid_lengths") is not None:
        keys = torch.arange(given["k"].shape[2])
        settings["key_mask"] = keys < torch.tensor(config["valid_lengths"])[:, None]
    elif "key_mask" in given:
        settings["key_mask"] = given.pop("key_mask").bool()
    given = {name: tensor for name, tensor in given.items() if name in ("q", "k", "v", "grad_out", "grad_lse")}
    ulysses = config.get("ulysses_degree") or 1
    found = ranks(world).run(on_rank, scheme, given, settings, packs, ulysses)
    outputs = {
        name: unshard([one[name] for one in found], dim=2, layout=layout, ulysses=ulysses, **_laid_out(name, packs))
        for name in found[0]["whole"]
    }
    if "partial_out" in found[0]:
        outputs["partial_out"] = torch.stack([one["partial_out"] for one in found])
        outputs["partial_lse"] = torch.stack([one["partial_lse"] for one in found])
    if "partial_grad_k" in found[0]:
        for name in ("k", "v"):
            outputs[f"rank_partial_grad_{name}"] = torch.stack([one[f"partial_grad_{name}"] for one in found])
    return outputs


def _laid_out(name: str, packs: dict[str, Any]) -> dict[str, Any]:
    """The options of shard and unshard: only sequences that are laid out one by one need their borders."""
    if not packs.get("per_sequence"):
        return {}
    of_keys = name.removeprefix("grad_") in ("k", "v") and "cu_seqlens_key" in packs
    return {"cu_seqlens": packs["cu_seqlens_key" if of_keys else "cu_seqlens"], "per_sequence": True}


@functools.cache
def ulysses_groups(ulysses: int) -> dict[str, Any]:
    """This rank's Ulysses group of adjacent ranks, and the ring of those with its place in theirs."""
    world, found = dist.get_world_size(), {}
    for start in range(0, world, ulysses):
        group = dist.new_group(list(range(start, start + ulysses)))
        if start <= dist.get_rank() < start + ulysses:
            found["ulysses_group"] = group
    for place in range(ulysses):
        group = dist.new_group(list(range(place, world, ulysses)))
        if dist.get_rank() % ulysses == place:
            found["ring_group"] = group
    return found


def on_rank(scheme: Callable[..., Any], given: dict[str, Tensor], settings: dict, packs: dict, ulysses: int) -> dict:
    """One rank's part of a softmax case."""
    rank, world, layout = dist.get_rank(), dist.get_world_size(), settings["layout"]
    local = {
        name: shard(t, rank, world, dim=2, layout=layout, ulysses=ulysses, **_laid_out(name, packs))
        for name, t in given.items()
    }
    leaves = {name: local[name].requires_grad_() for name in ("q", "k", "v")}
    with record(keep=True) as log:
        if ulysses > 1:
            out, lse = ulysses_ring_attention(*leaves.values(), **ulysses_groups(ulysses), **settings), None
        else:
            out, lse = scheme(*leaves.values(), return_lse=True, **settings, **packs)
        result = {"out": out.detach()}
        if lse is not None:
            result["lse"] = torch.where(lse == -torch.inf, NOTHING, lse).detach()
        if "grad_out" in local:
            total = (out * local["grad_out"]).sum()
            if "grad_lse" in local and lse is not None:
                total = total + torch.where(lse == -torch.inf, 0, lse * local["grad_lse"]).sum()
            total.backward()
            result |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    result["whole"] = tuple(result)
    if ("partial_out", 0) in log.kept and ulysses == 1:
        parts = [[log.kept[name, step] for step in range(world)] for name in ("partial_out", "partial_lse")]
        result["partial_out"], lses = (torch.stack(part) for part in parts)
        result["partial_lse"] = torch.where(lses == -torch.inf, NOTHING, lses)
    if ("partial_grad_key", 0) in log.kept:
        for name, kept in (("k", "partial_grad_key"), ("v", "partial_grad_value")):
            parts = [log.kept[kept, owner] for owner in range(world)]
            result[f"partial_grad_{name}"] = unshard(parts, dim=2, layout=layout, **_laid_out(name, packs))
    return result
