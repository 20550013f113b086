"""Closed formulas of the operators of vision backbones, on maps of N positions."""

from __future__ import annotations

import math
from math import log2

from manyheads.cost.formulas import Cost, Shape


def hilo(shape: Shape, *, window: int = 2, alpha: int | float = 0.9) -> Cost:
    """LITv2: ``int(alpha * heads)`` heads read a map pooled ``window`` x ``window``, the others their own window."""
    low = shape.heads if window == 1 else int(alpha * shape.heads)
    area = window * window
    tokens = shape.batch * shape.length
    operations = 4.0 * tokens * shape.head_dim * ((shape.heads - low) * area + low * shape.length / area)
    return Cost(
        settings=f"{shape.heads - low} heads in windows of {window} x {window}, {low} on the pooled map",
        formula="forward 4 N s^2 D a high head, 4 N (N / s^2) D a low head; backward 2.5 times that",
        causal=False,
        forward_flops=operations,
        backward_flops=2.5 * operations,
        traffic_bytes=shape.operand_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def multi_axis(shape: Shape, *, partition: int = 7) -> Cost:
    """MaxViT: attention in blocks of ``partition`` x ``partition`` neighbours, then in a dilated grid of as many."""
    operations = 2 * 4.0 * shape.rows * shape.head_dim * partition**2
    return Cost(
        settings=f"blocks, then a grid, of {partition} x {partition}",
        formula="forward 4 N P^2 D a head, twice; backward 2.5 times that",
        causal=False,
        forward_flops=operations,
        backward_flops=2.5 * operations,
        traffic_bytes=2.0 * shape.operand_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def halo(shape: Shape, *, block: int = 8, halo: int = 3) -> Cost:
    """HaloNet: a block of ``block`` x ``block`` queries reads itself and ``halo`` positions around it."""
    window = (block + 2 * halo) ** 2
    operations = 4.0 * shape.rows * shape.head_dim * window
    # Every key and value is read once for each block that it lies in the window of.
    again = 2.0 * shape.batch * shape.kv_heads * shape.length * shape.head_dim * (window / block**2 - 1)
    return Cost(
        settings=f"blocks of {block} x {block} with a halo of {halo}",
        formula="forward 4 N (b + 2 h)^2 D a head; backward 2.5 times that",
        causal=False,
        forward_flops=operations,
        backward_flops=2.5 * operations,
        traffic_bytes=shape.operand_bytes + again * shape.element_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def aggregated(shape: Shape, *, window: int = 3, pooled: int = 49) -> Cost:
    """TransNeXt: ``window`` x ``window`` neighbours and ``pooled`` keys of the whole map for every query."""
    near = window * window
    operations = shape.rows * shape.head_dim * (6.0 * near + 4.0 * pooled)
    return Cost(
        settings=f"{window} x {window} neighbours and {pooled} pooled keys",
        formula="forward 4 N (w^2 + P) D a head, plus 2 N w^2 D for the learnable tokens; backward twice that (weights "
        "are kept)",
        causal=False,
        forward_flops=operations,
        backward_flops=2.0 * operations,
        traffic_bytes=shape.operand_bytes
        + 2.0 * shape.batch * shape.kv_heads * pooled * shape.head_dim * shape.element_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def mixture_of_heads(shape: Shape, *, shared: int | None = None, active: int | None = None) -> Cost:
    """MoH: a token reads with ``shared`` heads (a quarter) and ``active`` others (half), chosen from its channels."""
    used = (shape.heads // 4 if shared is None else shared) + (shape.heads // 2 if active is None else active)
    if not 1 <= used <= shape.heads:
        raise ValueError(f"shared + active = {used} must be at least 1 and at most heads ({shape.heads})")
    tokens, width = shape.batch * shape.length, shape.heads * shape.head_dim
    router = 2.0 * tokens * width * (shape.heads + 2)
    operations = 4.0 * tokens * shape.length * shape.head_dim * used
    return Cost(
        settings=f"{used} of {shape.heads} heads a token",
        formula="forward 4 N^2 D for each head used and 2 N D H (H + 2) to choose them; backward 2.5 times the former "
        "and twice the latter",
        causal=False,
        forward_flops=operations + router,
        backward_flops=2.5 * operations + 2 * router,
        traffic_bytes=shape.operand_bytes,
        # Keys and values are cached for all heads: the next token may choose any.
        state_bytes=2.0 * tokens * shape.kv_heads * shape.head_dim * shape.element_bytes,
        decode_flops=(operations + router) / shape.length,
    )


def spectral(shape: Shape) -> Cost:
    """SpectFormer: two Fourier transforms of every channel and a product with the filter; the heads are channels."""
    numbers = float(shape.rows * shape.head_dim)
    return Cost(
        settings=f"{shape.heads * shape.head_dim} channels",
        formula="forward 5 N log2 N and 3 N a channel (two real transforms, half of the complex products); backward "
        "twice that",
        causal=False,
        forward_flops=numbers * (5 * log2(max(shape.length, 2)) + 3),
        backward_flops=2 * numbers * (5 * log2(max(shape.length, 2)) + 3),
        # Input and output, and the complex half spectrum once written and once read.
        traffic_bytes=numbers * (2 * shape.element_bytes + 2 * 4),
        state_bytes=None,
        decode_flops=None,
    )


def predicted_pairs(
    shape: Shape,
    *,
    keep_rate: float = 0.25,
    reduce_channels: int = 2,
    reduce_tokens: int = 6,
    coefficients: int = 8,
    basis_density: float = 1.0,
) -> Cost:
    """Sparsifiner: the low-rank predictor, then attention over the pairs it chooses (token 0 attends to all).

    ``basis_density`` is the share of the predictor's basis that its threshold leaves.
    """
    tokens, width = shape.length, shape.head_dim
    channels, places = max(1, width // reduce_channels), max(1, tokens // reduce_tokens)
    kept = math.ceil(keep_rate * tokens)
    share = min(coefficients, places) * basis_density * tokens
    predictor = 2 * tokens * width * channels + (2 * tokens - 1) * channels * places + (tokens - 1) * share
    pairs = 2 * width * ((tokens - 1) * kept + tokens)
    heads = shape.batch * shape.heads
    operations = 2.0 * heads * (predictor + pairs)
    lists = 8.0 * heads * (tokens - 1) * kept
    return Cost(
        settings=f"{kept} of {tokens} keys by {places} reduced tokens of {channels} channels",
        formula="forward 2 H (2 N D c + (2 N - 1) c K + (N - 1) k' N s) for the predictor and 4 H D ((N - 1) k + N) "
        "for the pairs, with c channels, K reduced tokens, k' coefficients, density s, k keys; backward twice the "
        "pairs",
        causal=False,
        forward_flops=operations,
        backward_flops=4.0 * heads * pairs,
        traffic_bytes=float(4 * heads * tokens * width * shape.element_bytes) + lists,
        state_bytes=None,
        decode_flops=None,
    )


def mixer_gate(shape: Shape, *, tokens_hidden: int = 512, channels_hidden: int = 512) -> Cost:
    """NiNformer: the gating unit with its projection and its inner mixer; the heads are channels.

    Unlike the others' figures this includes weight matrices, which here are the whole operator.
    """
    channels, tokens = shape.heads * shape.head_dim, shape.batch * shape.length
    operations = float(tokens * channels * (2 * channels + 4 * tokens_hidden + 4 * channels_hidden + 1))
    weights = channels**2 + 2 * shape.length * tokens_hidden + 2 * channels * channels_hidden
    biases = 6 * channels + tokens_hidden + shape.length + channels_hidden
    return Cost(
        settings=f"{channels} channels, {tokens_hidden} units over tokens, {channels_hidden} over channels",
        formula="forward 2 N C^2 (projection), 4 N T C (over tokens), 4 N C F (over channels) and N C (gate) for C = H "
        "D channels, T and F units; backward twice that",
        causal=False,
        forward_flops=operations,
        backward_flops=2.0 * operations,
        traffic_bytes=float((2 * tokens * channels + weights + biases) * shape.element_bytes),
        state_bytes=None,
        decode_flops=None,
    )


def injective(shape: Shape) -> Cost:
    """InLine attention: one D x D matrix a head of keys and values, read by every query."""
    operations = 2.0 * shape.batch * (shape.heads + shape.kv_heads) * shape.length * shape.head_dim**2
    return Cost(
        settings="mean key and value over all tokens",
        formula="forward 2 N D^2 a query head and as much a key/value head; backward twice that (the small D x D "
        "matrices are kept)",
        causal=False,
        forward_flops=operations,
        backward_flops=2.0 * operations,
        traffic_bytes=shape.operand_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def reversed_(shape: Shape) -> Cost:
    """DependencyViT: every token sends to all others; the shares are computed twice for the backward."""
    operations = 4.0 * shape.rows * shape.head_dim * shape.length
    return Cost(
        settings="all pairs, children to parents",
        formula="forward 4 N^2 D a head; backward 2.5 times that",
        causal=False,
        forward_flops=operations,
        backward_flops=2.5 * operations,
        traffic_bytes=shape.operand_bytes,
        state_bytes=None,
        decode_flops=None,
    )


def through_agents(shape: Shape, *, agents: int = 49) -> Cost:
    """Agent attention: ``agents`` tokens read all keys, and all queries read the agents."""
    operations = 2 * 4.0 * shape.rows * shape.head_dim * agents
    few = float(shape.batch * shape.heads * agents * shape.head_dim)
    return Cost(
        settings=f"{agents} agents",
        formula="forward 4 N m D a head, twice (agents over keys, queries over agents); backward 2.5 times that",
        causal=False,
        forward_flops=operations,
        backward_flops=2.5 * operations,
        # The agents are read twice, and what they gathered is written and read.
        traffic_bytes=shape.operand_bytes + 4 * few * shape.element_bytes,
        state_bytes=None,
        decode_flops=None,
    )
