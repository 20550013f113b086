"""Dense attention whose scores are softly capped, as in Gemma 2: for a cap c the softmax is over c tanh(S / c).

::

    S = scale Q K^T        T = c tanh(S / c)        l = ln sum exp(T)        O = exp(T - l) V
    dT = P * (dO V^T + dl - D)        dS = dT * (1 - (T / c)^2)        P = exp(T - l), with l over all keys

Some query rows at a time, so that no more than about a tile of scores exists at once.

Source: "Gemma 2: Improving Open Language Models at a Practical Size", arXiv 2408.00118, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.engines.dense_blocked import TILE


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of a block; -inf for rows that see none."""
    out, lse = query.new_zeros(*query.shape[:3], value.shape[-1]), query.new_full(query.shape[:3], -math.inf)
    for rows in _rows(query, key):
        scores, _ = _scores(query, key, mask, causal, scale, cap, rows)
        total = scores.logsumexp(-1, keepdim=True)
        weights = (scores - total.masked_fill(total == -math.inf, 0)).exp()
        out[:, :, rows] = (weights @ value.unsqueeze(2)).flatten(1, 2)
        lse[:, :, rows] = total.squeeze(-1).flatten(1, 2)
    return out, lse


def backward(
    grad: Tensor, shift: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, mask: Tensor | None,
    causal: bool, scale: float, cap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key and value through this block; ``lse`` is over all keys, ``shift`` dl - D."""
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    heads = key.shape[1]
    for rows in _rows(query, key):
        scores, slope = _scores(query, key, mask, causal, scale, cap, rows)
        total, some_shift, some_grad = (t[:, :, rows].unflatten(1, (heads, -1)) for t in (lse, shift, grad))
        empty = (total == -math.inf)[..., None]
        weights = (scores - total[..., None].masked_fill(empty, math.inf)).exp()
        d_scores = some_grad @ value.unsqueeze(2).transpose(-2, -1) + some_shift[..., None].masked_fill(empty, 0)
        d_scores = d_scores * weights * slope * scale
        d_query[:, :, rows] = (d_scores @ key.unsqueeze(2)).flatten(1, 2)
        d_key += (d_scores.transpose(-2, -1) @ query[:, :, rows].unflatten(1, (heads, -1))).sum(2)
        d_value += (weights.transpose(-2, -1) @ some_grad).sum(2)
    return d_query, d_key, d_value


def _rows(query: Tensor, key: Tensor) -> Iterator[slice]:
    size = max(16, TILE // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], size):
        yield slice(start, min(query.shape[2], start + size))


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float, cap: float, rows: slice
) -> tuple[Tensor, Tensor]:
    """Capped scores of some rows, -inf where hidden, (batch, kv_heads, groups, rows, keys); and the cap's slope."""
    some = (query[:, :, rows] * scale).unflatten(1, (key.shape[1], -1))
    bent = (some @ key.unsqueeze(2).transpose(-2, -1)).div_(cap).tanh_()
    hidden = None
    if mask is not None:
        hidden = ~(mask[:, :, rows] if mask.shape[2] > 1 else mask).unsqueeze(1)
    if causal:
        queries, keys = query.shape[2], key.shape[2]
        at = torch.arange(rows.start, rows.stop, device=query.device)[:, None] + (keys - queries)
        ahead = torch.arange(keys, device=query.device) > at
        hidden = ahead if hidden is None else hidden | ahead
    scores = bent * cap
    return scores if hidden is None else scores.masked_fill_(hidden, -math.inf), 1 - bent.square()
