"""Ring self-attention: layouts, the streaming form in every layout, the raw scores of the paper's own form."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel import ring_scores, ring_self_attention, shard, token_index
from tests.goldens.systems._ranks import ranks, softmax_outputs
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict, inputs: dict) -> dict:
    if not inputs:
        return arrays(_layouts(config["tokens"], config["world_size"]))
    given = tensors(inputs)
    outputs = softmax_outputs(ring_self_attention, config, given)
    if config.get("layout", "contiguous") == "contiguous":
        rows = ranks(config["world_size"]).run(scores_on_rank, given["q"], given["k"])
        outputs["scores"] = torch.cat(rows, dim=2)
    return arrays(outputs)


def _layouts(tokens: int, world: int) -> dict[str, Tensor]:
    found = {}
    for layout in ("zigzag", "striped", "contiguous"):
        found[f"{layout}_{world}rank"] = token_index(tokens, world, layout=layout)
        for ulysses in (u for u in range(2, world) if world % u == 0):
            name = f"{layout}_ring{world // ulysses}_ulysses{ulysses}"
            found[name] = token_index(tokens, world, layout=layout, ulysses=ulysses)
    return found


def scores_on_rank(query: Tensor, key: Tensor) -> Tensor:
    """This rank's rows of the raw scores."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return ring_scores(*(shard(t, rank, world, dim=2) for t in (query, key)))
