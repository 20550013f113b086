"""Attention operators: pure functions on tensors, one file per operator."""

from manyheads.ops.agent import agent_attention, agent_weights
from manyheads.ops.aggregated import aggregated_attention, length_scaled_cosine_attention, length_scaled_query
from manyheads.ops.bilevel_routing import bilevel_routing_attention
from manyheads.ops.channel import channel_attention
from manyheads.ops.halo import halo_attention
from manyheads.ops.hilo import hilo_attention, low_head_count
from manyheads.ops.inline import inline_attention, inline_attention_step, inline_weights
from manyheads.ops.lightning import lightning_attention, lightning_attention_step, lightning_slopes
from manyheads.ops.mixer_gate import GateWeights, mixer_gating, resize_token_mixing, token_mixing_gate
from manyheads.ops.mixture_of_heads import (
    Routing,
    learned_routing,
    load_balance_loss,
    mixture_of_heads_attention,
    query_norm_routing,
)
from manyheads.ops.multi_axis import block_attention, grid_attention, relative_bias
from manyheads.ops.neighborhood import neighborhood_attention, neighborhood_decode
from manyheads.ops.neighborhood_plan import neighborhood_mask
from manyheads.ops.reversed import dependency_mask, reversed_attention
from manyheads.ops.sparse_connectivity import PairRule, pair_index, pair_mask, predict_scores, sparse_attention
from manyheads.ops.spectral import resize_filter, spectral_gating
from manyheads.ops.streaming import streaming_attention
from manyheads.ops.token_merge import TokenMatching, match_tokens
from manyheads.ops.window import window_attention, window_means, window_merge, window_partition

__all__ = [
    "GateWeights",
    "PairRule",
    "Routing",
    "TokenMatching",
    "agent_attention",
    "agent_weights",
    "aggregated_attention",
    "bilevel_routing_attention",
    "block_attention",
    "channel_attention",
    "dependency_mask",
    "grid_attention",
    "halo_attention",
    "hilo_attention",
    "inline_attention",
    "inline_attention_step",
    "inline_weights",
    "learned_routing",
    "length_scaled_cosine_attention",
    "length_scaled_query",
    "lightning_attention",
    "lightning_attention_step",
    "lightning_slopes",
    "load_balance_loss",
    "low_head_count",
    "match_tokens",
    "mixer_gating",
    "mixture_of_heads_attention",
    "neighborhood_attention",
    "neighborhood_decode",
    "neighborhood_mask",
    "pair_index",
    "pair_mask",
    "predict_scores",
    "query_norm_routing",
    "relative_bias",
    "resize_filter",
    "resize_token_mixing",
    "reversed_attention",
    "sparse_attention",
    "spectral_gating",
    "streaming_attention",
    "token_mixing_gate",
    "window_attention",
    "window_means",
    "window_merge",
    "window_partition",
]
