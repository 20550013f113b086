"""Attention diversification loss (ADL): the queries of a layer should not all look at the same few tokens.

For the attention maps A_l (batch, heads, N, N) of L layers, rows summing to 1::

    m     = mean over heads of A_l                   (batch, N, N)
    a     = mean over queries of m                   (batch, 1, N)
    m, a <- m [m > t], a [a > t]                     with t = threshold / N
    L_l   = mean over batch and queries of cos(m, a)
    ADL   = sum_l L_l / (L + 1e-6);     total loss = CE + weight * ADL

Where attention is nearly uniform, no token's average reaches t and the loss is zero, as is its gradient.

A layer's term needs no map, see :mod:`manyheads.engines.dense_columns`.

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, resolve_scale
from manyheads.engines.dense_columns import EPS, column_similarity


class SoftmaxInput(NamedTuple):
    """What a layer's attention weights softmax(scale query key^T) come from, and are computed from in blocks.

    Attributes:
        query, key: (batch, heads, N, head_dim).
        scale: factor of the scores; None means ``head_dim ** -0.5``.
    """

    query: Tensor
    key: Tensor
    scale: float | None = None


def attention_diversification_loss(maps: Sequence[Tensor | SoftmaxInput], *, threshold: int | float = 2.0) -> Tensor:
    """Mean cosine similarity between what single queries attend to and what all of them do on average.

    Args:
        maps: for each layer the attention weights (batch, heads, N, N) after the softmax; layers may differ in heads
            and N. Gradients flow through them, not through the comparisons. A ``SoftmaxInput`` stands for the weights
            that it gives, as in ``diversification_from_queries``.
        threshold: weights up to ``threshold / N``, so many times the uniform weight, do not count.

    Returns:
        A scalar in [0, 1], in float32 (float64 for float64 maps). Every batch size is served alike; the authors' code
        gives 0 for a single image.

    Raises:
        ValueError: no map, maps that are not square, a threshold that is not positive.

    Source: arXiv 2303.11126, section 3.2.

    >>> import torch
    >>> focused = torch.zeros(1, 1, 4, 4); focused[..., 0] = 1
    >>> round(attention_diversification_loss([focused]).item(), 4)
    1.0
    >>> attention_diversification_loss([torch.eye(4)[None, None]]).item()
    0.0
    """
    _check_threshold(threshold)
    if not len(maps):
        raise ValueError("maps must hold the attention weights of at least one layer")
    terms = []
    for weights in maps:
        if isinstance(weights, SoftmaxInput):
            terms.append(diversification_from_queries(*weights[:2], scale=weights.scale, threshold=threshold))
            continue
        if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2] or not weights.numel():
            raise ValueError(f"attention weights must be (batch, heads, N, N), got {tuple(weights.shape)}")
        terms.append(_layer(weights, threshold / weights.shape[-1]))
    return sum(terms[1:], terms[0]) / (len(maps) + 1e-6)


def diversification_from_queries(
    query: Tensor, key: Tensor, *, scale: float | None = None, threshold: int | float = 2.0
) -> Tensor:
    """The term L_l of one layer of softmax self-attention, from its queries and keys.

    No map is kept: blocks of it are made anew in each of two passes and in the backward. Memory grows with the tokens,
    not with their square, and the layer itself can use a fused kernel.

    Args:
        query, key: (batch, heads, N, head_dim) as they meet in the layer's softmax.
        scale: factor of the scores; None means ``head_dim ** -0.5``.
        threshold: as in ``attention_diversification_loss``, whose value for L layers is the sum of their terms by
            L + 1e-6.

    Returns:
        A scalar in [0, 1], in float32 (float64 for float64 input), in which half precision is computed throughout. It
        can be differentiated once.

    Raises:
        ValueError: queries and keys of different or other shapes, a threshold that is not positive.

    Source: arXiv 2303.11126, section 3.2.

    >>> import torch
    >>> query, key = 3 * torch.randn(2, 2, 4, 9, 8)
    >>> maps = [(query @ key.mT * 8**-0.5).softmax(-1)]
    >>> difference = diversification_from_queries(query, key) - attention_diversification_loss(maps)
    >>> difference.abs().item() < 1e-5
    True
    """
    _check_threshold(threshold)
    if query.ndim != 4 or query.shape != key.shape or not query.numel():
        raise ValueError(
            f"query and key must both be (batch, heads, N, head_dim), got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    least = threshold / query.shape[2]
    return column_similarity(query, key, resolve_scale(scale, query.shape[-1]), least)


def overfocus(weights: Tensor) -> float:
    """The largest share of all queries' attention that a single token gets, averaged over images and heads.

    Args:
        weights: attention weights (batch, heads, N, N).

    >>> import torch
    >>> overfocus(torch.eye(4)[None, None])
    0.25
    """
    return weights.detach().mean(-2).amax(-1).mean().item()


def _check_threshold(threshold: int | float) -> None:
    if threshold <= 0:
        raise ValueError(f"threshold={threshold} must be positive")


def _layer(weights: Tensor, least: float) -> Tensor:
    mean = weights.to(accumulation_dtype(weights.dtype)).mean(dim=1)
    average = mean.mean(dim=1, keepdim=True)
    mean, average = mean * (mean > least), average * (average > least)
    return F.cosine_similarity(mean, average, dim=-1, eps=EPS).mean()
