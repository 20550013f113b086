"""Sequence parallelism on torch.distributed."""

from manyheads.parallel.lasp2 import lasp, lasp2
from manyheads.parallel.layouts import position_ids, shard, token_index, unshard
from manyheads.parallel.local import LocalRanks
from manyheads.parallel.recorder import record
from manyheads.parallel.ring_self_attention import ring_self_attention
from manyheads.parallel.token_ring import token_ring
from manyheads.parallel.wire import RankError

__all__ = [
    "LocalRanks",
    "RankError",
    "lasp",
    "lasp2",
    "position_ids",
    "record",
    "ring_self_attention",
    "shard",
    "token_index",
    "token_ring",
    "unshard",
]
