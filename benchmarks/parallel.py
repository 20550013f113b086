"""Schemes over two processes of this machine, one thread each, against one process: what the ranks' inputs cost is not
timed, the messages are. Peak memory is that of the measuring process, which computes nothing."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads.parallel import LocalRanks, lasp2h, ring_self_attention, shard, token_ring

WORLD = 2
SCHEMES = {"zigzag ring": ring_self_attention, "TokenRing": token_ring, "LASP-2H": lasp2h}


@functools.cache
def pool() -> LocalRanks:
    """The processes, started by the first call."""
    ranks = LocalRanks(WORLD, timeout=300)
    atexit.register(ranks.close)
    return ranks


@functools.cache
def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """This rank's query, key, value."""
    torch.manual_seed(0)
    whole = torch.randn(3, *shape, dtype=dtype)
    return [shard(t, dist.get_rank(), WORLD, dim=2, layout="zigzag").clone() for t in whole]


def on_rank(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One causal forward pass."""
    with torch.no_grad():
        SCHEMES[name](*inputs(shape, dtype), causal=True, layout="zigzag")


def contestants() -> dict[str, Callable[..., Tensor]]:
    """The schemes as functions of tensors whose shape and dtype they take."""

    def run(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pool().run(on_rank, name, tuple(query.shape), query.dtype)
        return query

    return {name: functools.partial(run, name) for name in SCHEMES}
