"""Streaming attention: every token attends to a few sink tokens at the start and to a recent window.

    out_i = sum_j softmax_j( scale * q_i . k_j ) v_j        over j <= i with i - j < recent or j < sinks

Sources: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453; the streaming heads of
"DuoAttention", arXiv 2410.10819.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.blocksparse import blocksparse_attention
from manyheads.engines.blocksparse_plan import BlockPlan
from manyheads.engines.common import check_choice, check_qkv

QUERY_BLOCK, KEY_BLOCK = 64, 64


def streaming_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    sinks: int,
    recent: int,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention to the first ``sinks`` tokens and the last ``recent`` ones, linear in the number of tokens.

    Args:
        query: (batch, heads, queries, head_dim). With fewer queries than keys the last query is at the last key
            (decoding, chunked prefill).
        key: (batch, key_heads, keys, head_dim); key_heads divides heads.
        value: (batch, key_heads, keys, value_dim).
        sinks: number of sink tokens at the start of the sequence, 0 or more.
        recent: length of the recent window, the query's own token included, 1 or more.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        return_lse: also return the log-sum-exp (batch, heads, queries), natural log, float32.
        backend: as :func:`manyheads.engines.blocksparse.blocksparse_attention`.

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, more queries than keys, a negative ``sinks`` or ``recent < 1``.

    Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 4, 300, 32)
    >>> streaming_attention(q, k, v, sinks=4, recent=64).shape
    torch.Size([1, 4, 300, 32])
    """
    check_choice("backend", backend, ("auto", "reference", "tiles", "dense", "flex"))
    check_qkv(query, key, value)
    if sinks < 0 or recent < 1:
        raise ValueError(f"sinks must be at least 0 and recent at least 1, got sinks={sinks}, recent={recent}")
    (queries, keys) = query.shape[2], key.shape[2]
    if queries > keys:
        raise ValueError(f"streaming attention is causal over {keys} keys and cannot place {queries} queries")
    shift = keys - queries

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i + shift) & ((i + shift - j < recent) | (j < sinks))

    plan = _plan(queries, keys, sinks, recent, query.device)
    return blocksparse_attention(
        query, key, value, plan, predicate=visible, scale=scale, return_lse=return_lse, backend=backend
    )


@lru_cache(maxsize=64)
def _plan(queries: int, keys: int, sinks: int, recent: int, device: torch.device) -> BlockPlan:
    size = min(QUERY_BLOCK, max(queries, 1))
    block = torch.arange(-(-queries // size), device=device)[:, None]
    first, last = block * size + keys - queries, (block * size + size - 1).clamp(max=queries - 1) + keys - queries
    start = torch.arange(-(-keys // KEY_BLOCK), device=device) * KEY_BLOCK
    near = (start <= last) & (start + KEY_BLOCK > first - recent + 1)
    slots = min(len(start), -(-sinks // KEY_BLOCK) + (size + recent + 2 * KEY_BLOCK - 3) // KEY_BLOCK)
    return BlockPlan.from_mask(near | (start < sinks), query_block=size, key_block=KEY_BLOCK, slots=slots)
