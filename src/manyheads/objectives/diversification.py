"""Attention diversification loss (ADL): the queries of a layer should not all look at the same few tokens.

For the attention maps A_l (batch, heads, N, N) of L layers, rows summing to 1::

    m     = mean over heads of A_l                   (batch, N, N)
    a     = mean over queries of m                   (batch, 1, N)
    m, a <- m [m > t], a [a > t]                     with t = threshold / N
    L_l   = mean over batch and queries of cos(m, a)
    ADL   = sum_l L_l / (L + 1e-6);     total loss = CE + weight * ADL

Where attention is nearly uniform, no token's average reaches t and the loss is zero, as is its gradient.

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.engines.common import accumulation_dtype


def attention_diversification_loss(maps: Sequence[Tensor], *, threshold: int | float = 2.0) -> Tensor:
    """Mean cosine similarity between what single queries attend to and what all of them do on average.

    Args:
        maps: for each layer the attention weights (batch, heads, N, N) after the softmax; layers may differ in heads
            and N. Gradients flow through them, not through the comparisons.
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
    if threshold <= 0:
        raise ValueError(f"threshold={threshold} must be positive")
    if not len(maps):
        raise ValueError("maps must hold the attention weights of at least one layer")
    total = torch.zeros((), device=maps[0].device)
    for weights in maps:
        if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2] or not weights.numel():
            raise ValueError(f"attention weights must be (batch, heads, N, N), got {tuple(weights.shape)}")
        total = total + _layer(weights, threshold / weights.shape[-1])
    return total / (len(maps) + 1e-6)


def overfocus(weights: Tensor) -> float:
    """The largest share of all queries' attention that a single token gets, averaged over images and heads.

    Args:
        weights: attention weights (batch, heads, N, N).

    >>> overfocus(torch.eye(4)[None, None])
    0.25
    """
    return weights.detach().mean(-2).amax(-1).mean().item()


def _layer(weights: Tensor, least: float) -> Tensor:
    mean = weights.to(accumulation_dtype(weights.dtype)).mean(dim=1)
    average = mean.mean(dim=1, keepdim=True)
    mean, average = mean * (mean > least), average * (average > least)
    return F.cosine_similarity(mean, average, dim=-1, eps=1e-8).mean()
