"""How much the rows of softmax attention resemble their average, without the matrix of all pairs.

For weights A (batch, heads, N, N) with rows summing to 1, and a least weight t::

    m = mean over heads of A        a = mean over queries of m        m, a <- m [m > t], a [a > t]
    similarity = mean over batch and queries of cos(m, a)

a comes from column sums over blocks of queries, the cosines from a second pass over them. With the sums
S = sum_i m_i / |m_i| and c = sum_i cos(m_i, a) kept from it, every block of the gradient stands alone::

    BN dL/dm_ij = [m_ij > t] (a_j / |a| - cos_i m_ij / |m_i|) / |m_i| + [a_j > t] (S_j - c a_j / |a|) / N |a|

so that a third pass takes it to queries and keys.

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126; recomputation in the backward as in
"FlashAttention", arXiv 2205.14135.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.engines.common import accumulation_dtype

EPS = 1e-8
# Attention weights that a tile holds: on the CPU what its caches keep, on the GPU what fills it.
_TILE = {"cpu": 2**18, "cuda": 2**24}


def column_similarity(query: Tensor, key: Tensor, scale: float, least: float) -> Tensor:
    """The mean cosine of the rows of ``softmax(scale query key^T)``, averaged over heads, and their average.

    Args:
        query, key: (batch, heads, N, head_dim), not empty.
        scale: factor of the scores.
        least: weights up to this do not count.

    Returns:
        A scalar in float32 (float64 for float64 input); it can be differentiated once.
    """
    return _Similarity.apply(query, key, scale, least)  # pyright: ignore[reportReturnType]


class _Similarity(torch.autograd.Function):
    """In tiles: several images, or some queries of one."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, scale: float, least: float) -> Tensor:
        batch, _, n, _ = query.shape
        averages, pulls, totals = [], [], []
        with torch.autocast(query.device.type, enabled=False):
            for images, blocks in _tiles(query):
                group = (query[images], key[images], scale, blocks)
                # What fits into one tile is not computed twice.
                whole = list(_means(*group)) if len(blocks) == 1 else None
                average = torch.stack([part.sum(1) for part in whole or _means(*group)]).sum(0)[:, None] / n
                average = average * (average > least)
                direction, norm = _unit(average)
                sums, cosines = [], []
                for part in whole or _means(*group):
                    rows, _ = _unit(part * (part > least))
                    sums.append(rows.sum(1, keepdim=True))
                    cosines.append((rows @ direction.mT).sum(1, keepdim=True))
                along, cosine = torch.stack(sums).sum(0), torch.stack(cosines).sum(0)
                averages.append(average)
                pulls.append((average > 0) * (along - cosine * direction) / (n * norm))
                totals.append(cosine.sum())
        ctx.save_for_backward(query, key, torch.cat(averages), torch.cat(pulls))
        ctx.scale, ctx.least = scale, least
        return torch.stack(totals).sum() / (batch * n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, average, pull = ctx.saved_tensors
        batch, heads, n, _ = query.shape
        d_query, d_key = (torch.zeros_like(part, dtype=average.dtype) for part in (query, key))
        direction, _ = _unit(average)
        share = grad * ctx.scale / (batch * n * heads)
        with torch.autocast(query.device.type, enabled=False):
            for images, blocks in _tiles(query):
                keys = key[images].to(average.dtype)
                for rows in blocks:
                    queries = query[images, :, rows].to(average.dtype)
                    weights = _weights(queries, keys, ctx.scale)
                    mean = weights.mean(1)
                    seen = mean > ctx.least
                    unit, norm = _unit(mean * seen)
                    cosine = unit @ direction[images].mT
                    d_mean = share * (seen * (direction[images] - cosine * unit) / norm + pull[images])
                    d_weights = weights * d_mean[:, None]
                    d_scores = d_weights.addcmul_(weights, d_weights.sum(-1, keepdim=True), value=-1)
                    d_query[images, :, rows] = d_scores @ keys
                    d_key[images] += d_scores.mT @ queries
        return d_query.to(query.dtype), d_key.to(key.dtype), None, None


def _tiles(query: Tensor) -> list[tuple[slice, list[slice]]]:
    """Groups of images, each with blocks of queries, whose weights for all heads and keys fit into a tile."""
    batch, heads, n, _ = query.shape
    size = _TILE.get(query.device.type, _TILE["cuda"])
    images, rows = max(1, size // (heads * n * n)), min(n, max(1, size // (heads * n)))
    blocks = [slice(start, start + rows) for start in range(0, n, rows)]
    return [(slice(start, start + images), blocks) for start in range(0, batch, images)]


def _means(query: Tensor, key: Tensor, scale: float, blocks: list[slice]) -> Iterator[Tensor]:
    """The mean over heads of the attention weights, block by block of queries."""
    for rows in blocks:
        yield _weights(query[:, :, rows], key, scale).mean(1)


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    dtype = accumulation_dtype(query.dtype)
    return (query.to(dtype) * scale @ key.to(dtype).mT).softmax(-1)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows by their norms, and these; zeros stay zeros."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=EPS)
    return rows / norm, norm
