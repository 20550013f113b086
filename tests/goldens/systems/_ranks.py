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

from manyheads.parallel import LocalRanks, record, shard, unshard

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


def softmax_outputs(scheme: Callable[..., Any], config: dict, given: dict[str, Tensor], **options: Any) -> dict:
    """Output, lse, gradients in global order, and the partial results of every rank and step."""
    world, layout = config["world_size"], config.get("layout", config.get("split", "contiguous"))
    settings = dict(causal=config.get("causal", False), scale=config.get("scale"), layout=layout, **options)
    if config.get("valid_lengths") is not None:
        keys = torch.arange(given["k"].shape[2])
        settings["key_mask"] = keys < torch.tensor(config["valid_lengths"])[:, None]
    found = ranks(world).run(on_rank, scheme, given, settings)
    outputs = {name: unshard([one[name] for one in found], dim=2, layout=layout) for name in found[0]["whole"]}
    if "partial_out" in found[0]:
        outputs["partial_out"] = torch.stack([one["partial_out"] for one in found])
        outputs["partial_lse"] = torch.stack([one["partial_lse"] for one in found])
    if "partial_grad_k" in found[0]:
        outputs["rank_partial_grad_k"] = torch.stack([one["partial_grad_k"] for one in found])
    return outputs


def on_rank(scheme: Callable[..., Any], given: dict[str, Tensor], settings: dict) -> dict:
    """One rank's part of a softmax case."""
    rank, world = dist.get_rank(), dist.get_world_size()
    local = {name: shard(t, rank, world, dim=2, layout=settings["layout"]) for name, t in given.items()}
    leaves = {name: local[name].requires_grad_() for name in ("q", "k", "v")}
    with record(keep=True) as log:
        out, lse = scheme(*leaves.values(), return_lse=True, **settings)
        result = {"out": out.detach(), "lse": torch.where(lse == -torch.inf, NOTHING, lse).detach()}
        if "grad_out" in local:
            (out * local["grad_out"]).sum().backward()
            result |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    result["whole"] = tuple(result)
    if ("partial_out", 0) in log.kept:
        parts = [[log.kept[name, step] for step in range(world)] for name in ("partial_out", "partial_lse")]
        result["partial_out"], lses = (torch.stack(part) for part in parts)
        result["partial_lse"] = torch.where(lses == -torch.inf, NOTHING, lses)
    if ("partial_grad_key", 0) in log.kept:
        parts = [log.kept["partial_grad_key", owner] for owner in range(world)]
        result["partial_grad_k"] = unshard(parts, dim=2, layout=settings["layout"])
    return result
