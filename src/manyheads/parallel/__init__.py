"""Sequence parallelism on torch.distributed."""

from manyheads.parallel.context_parallel import ContextParallel, context_parallel
from manyheads.parallel.lasp2 import lasp, lasp2
from manyheads.parallel.lasp2h import lasp2h
from manyheads.parallel.layouts import position_ids, shard, token_index, unshard
from manyheads.parallel.linear_moe import LinearMoEAttention
from manyheads.parallel.local import LocalRanks
from manyheads.parallel.recorder import record
from manyheads.parallel.ring_self_attention import ring_self_attention
from manyheads.parallel.rsa import ring_scores, ring_weighted_sum, rsa_attention, rsa_linformer
from manyheads.parallel.token_ring import token_ring
from manyheads.parallel.ulysses import ulysses_ring_attention
from manyheads.parallel.wire import RankError

__all__ = [
    "ContextParallel",
    "LinearMoEAttention",
    "LocalRanks",
    "RankError",
    "context_parallel",
    "lasp",
    "lasp2",
    "lasp2h",
    "position_ids",
    "record",
    "ring_scores",
    "ring_self_attention",
    "ring_weighted_sum",
    "rsa_attention",
    "rsa_linformer",
    "shard",
    "token_index",
    "token_ring",
    "ulysses_ring_attention",
    "unshard",
]
