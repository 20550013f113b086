"""Selected attention on CPUs where every head has lists of its own: nothing is gathered into a copy.

    scores   s_nj = scale q_n . k_j        all products of a head, then the listed ones, where the lists are dense;
                                           listed products alone (a sampled product of matrices) where they are sparse
    output   sum_j softmax(s)_nj v_j       bags of rows, weighted and summed in place
    backward dq likewise; dk and dv are products with the weights as a matrix, in which listed twice adds up

Lists that hold at least one key in ``SPARSEST`` are worth it, and only many of them: fewer queries than would read
every key once (decoding) are served better by copying the rows they list.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.engines.common import accumulation_dtype

SAMPLED_BELOW = 0.15  # share of listed keys from which all products are faster than single ones
SPARSEST = 128
TILE = 1 << 20  # scores at a time


def suits_bags(query: Tensor, key: Tensor, index: Tensor) -> bool:
    """Whether these lists, one for every query and head, are computed faster by bags than by copies of rows."""
    keys, (heads, queries, selected) = key.shape[2], index.shape[1:]
    return query.is_cpu and heads == query.shape[1] and queries * selected >= keys and selected * SPARSEST >= keys


def bag_forward(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; tensors as in ``manyheads.engines.select.select_attention``."""
    wide = accumulation_dtype(query.dtype)
    batch, heads, queries = query.shape[:3]
    out = query.new_empty(batch * heads, queries, value.shape[3])
    lse = query.new_empty(batch * heads, queries, dtype=wide)
    for at, q, k, v, listed in _tiles(query, key, value, index):
        scores = _scores(q, k, listed, _part(bias, at, index, heads), scale)
        # The largest weight is exp(peak - lse); weights of a row without keys come out as NaN.
        weights, peak = scores.softmax(-1), scores.amax(-1)
        lse[at] = torch.where(peak == -math.inf, peak, peak - weights.amax(-1).log())
        out[at] = _bags(weights if listed.full else weights.nan_to_num_(0.0), listed, v)
    return out.unflatten(0, (batch, heads)), lse.unflatten(0, (batch, heads))


def bag_backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, with a bias, of the scores (batch, heads, queries, selected)."""
    wide = accumulation_dtype(query.dtype)
    batch, heads = query.shape[:2]
    shared = heads // key.shape[1]
    d_query, d_key, d_value = (
        tensor.new_zeros(batch * heads, *tensor.shape[2:], dtype=wide) for tensor in (query, key, value)
    )
    d_scores = query.new_empty(batch * heads, *index.shape[2:], dtype=wide) if bias is not None else None
    grads, outs = (tensor.flatten(0, 1) for tensor in (grad, out))
    logs, log_grads = (tensor.flatten(0, 1).to(wide)[..., None] for tensor in (lse, grad_lse))
    for at, q, k, v, listed in _tiles(query, key, value, index):
        empty = logs[at] == -math.inf
        scores = _scores(q, k, listed, _part(bias, at, index, heads), scale)
        weights = scores.sub_(logs[at].masked_fill(empty, math.inf)).exp_()
        do = grads[at].to(wide)
        pull = log_grads[at].masked_fill(empty, 0) - (do * outs[at]).sum(-1, keepdim=True)
        matrix = _matrix(weights, listed, k.shape[1])
        if listed.dense:
            products = (do @ v.mT).add_(pull)
            if d_scores is not None:
                d_scores[at] = products.gather(2, listed.keys).mul_(weights)
            ds = products.mul_(matrix)
            d_query[at] = (ds @ k).mul_(scale)
        else:
            listed_ds = _products(do, v, listed).add_(pull).mul_(weights)
            if d_scores is not None:
                d_scores[at] = listed_ds
            d_query[at] = _bags(listed_ds, listed, k).mul_(scale)
            ds = _matrix(listed_ds, listed, k.shape[1])
        d_key[at[0]] += (ds.mT @ q).mul_(scale)
        d_value[at[0]] += matrix.mT @ do
    d_key, d_value = (
        tensor.unflatten(0, (batch, heads // shared, shared)).sum(2) for tensor in (d_key, d_value)
    )  # fmt: skip
    d_query = d_query.unflatten(0, (batch, heads)).to(query.dtype)
    d_scores = None if d_scores is None else d_scores.unflatten(0, (batch, heads))
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_scores


def uncounted(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *, backward: bool) -> int:
    """Operations of bags and sampled products, which torch's counter of operations does not know; 0 where none is used.

    >>> import torch
    >>> x, lists = torch.zeros(1, 1, 100, 8), torch.zeros(1, 1, 100, 10, dtype=torch.int64)
    >>> uncounted(x, x, x, lists, backward=False) == 2 * 100 * 10 * (8 + 8)
    True
    """
    if not query.numel() or not index.numel() or not key.shape[2] or not suits_bags(query, key, index):
        return 0
    dense = index.shape[3] >= SAMPLED_BELOW * key.shape[2]
    width, value_width = query.shape[3], value.shape[3]
    forward = value_width if dense else width + value_width
    again = 0 if dense else 2 * width + value_width
    wide = again if backward else forward
    return 2 * query.shape[0] * query.shape[1] * query.shape[2] * index.shape[3] * wide


class _Lists:
    """The lists of a tile's heads.

    Attributes:
        shape: (heads, queries, selected).
        full: whether every entry names a key.
        dense: whether all products are made.
        keys: positions (heads, queries, selected); 0 where none is named, which gets no weight.
        rows: the same among the keys of all heads of the tile.
    """

    def __init__(self, index: Tensor, keys: int, full: bool) -> None:
        self.shape, self.full, self.dense = index.shape, full, index.shape[2] >= SAMPLED_BELOW * keys
        self.missing = None if full else index < 0
        self.keys = index if full else index.clamp(min=0)
        self.rows = self.keys + torch.arange(len(index)).mul_(keys)[:, None, None]


def _tiles(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor, Tensor, _Lists]]:
    """Some heads, or some queries of one: which, (heads, queries, width), (heads, keys, width), their values, lists."""
    wide = accumulation_dtype(query.dtype)
    heads, keys = query.shape[1], key.shape[2]
    shared, full = heads // key.shape[1], int(index.min()) >= 0
    flat, lists = query.flatten(0, 1), index.flatten(0, 1)
    queries = query.shape[2]
    step, blocks = max(1, TILE // (queries * keys)), -(-queries * keys // TILE)
    size = -(-queries // blocks)
    owners = torch.arange(len(flat)) // shared
    rows = [tensor.flatten(0, 1) for tensor in (key, value)]
    for start in range(0, len(flat), step):
        some = slice(start, min(len(flat), start + step))
        k, v = (tensor[some] if shared == 1 else tensor[owners[some]] for tensor in rows)
        k, v = k.to(wide), v.to(wide).contiguous()
        for first in range(0, queries, size):
            at = (some, slice(first, min(queries, first + size)))
            yield at, flat[at].to(wide), k, v, _Lists(lists[at], keys, full)


def _scores(q: Tensor, k: Tensor, listed: _Lists, bias: Tensor | None, scale: float) -> Tensor:
    scores = _products(q * scale, k, listed)
    if bias is not None:
        scores += bias
    return scores if listed.missing is None else scores.masked_fill_(listed.missing, -math.inf)


def _products(q: Tensor, k: Tensor, listed: _Lists) -> Tensor:
    """q_n . k_j for the listed j (anything where none is listed), (heads, queries, selected)."""
    if listed.dense:
        return (q @ k.mT).gather(2, listed.keys)
    columns = listed.rows.flatten()
    ends = torch.arange(0, columns.numel() + 1, listed.shape[2])
    with warnings.catch_warnings():
        # Its interface may still change, says the warning; the test that compares it with the reference would say so.
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR.*")
        pattern = torch.sparse_csr_tensor(
            ends, columns, q.new_zeros(columns.shape), (q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]),
            check_invariants=False,
        )  # fmt: skip
        found = torch.sparse.sampled_addmm(pattern, q.flatten(0, 1), k.flatten(0, 1).contiguous().mT, beta=0.0)
    return found.values().view(listed.shape)


def _bags(weights: Tensor, listed: _Lists, rows: Tensor) -> Tensor:
    """sum_j weights_nj rows_j, (heads, queries, width)."""
    bags = F.embedding_bag(
        listed.rows.flatten(0, 1), rows.reshape(-1, rows.shape[2]), mode="sum",
        per_sample_weights=weights.flatten(0, 1),
    )  # fmt: skip
    return bags.unflatten(0, listed.shape[:2])


def _matrix(weights: Tensor, listed: _Lists, keys: int) -> Tensor:
    """Weights at their keys' columns, (heads, queries, keys)."""
    return weights.new_zeros(*listed.shape[:2], keys).scatter_add_(2, listed.keys, weights)


def _part(bias: Tensor | None, at: tuple[slice, slice], index: Tensor, heads: int) -> Tensor | None:
    return None if bias is None else bias.expand(index.shape[0], heads, *index.shape[2:]).flatten(0, 1)[at]
