"""Block-sparse softmax attention: every query block reads a list of key blocks, with a mask or bias inside them.

    out_i = sum_j softmax_j( scale * q_i . k_j + bias_ij ) v_j        over the keys j that the plan lists for i's block
                                                                      and the predicate lets i attend to

The plan says what is read, the predicate and the plan's own mask classes say which pairs of it attend. Windows,
neighbourhoods, strides, routed blocks and streaming heads are plans.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from manyheads.engines.blocksparse_operator import tiled
from manyheads.engines.blocksparse_plan import BlockPlan, TableBias
from manyheads.engines.common import (
    Predicate,
    accumulation_dtype,
    check_choice,
    check_qkv,
    repeat_heads,
    resolve_scale,
)

DENSE_PAIRS = 512 * 512  # below so many pairs one dense tile beats many small ones


def blocksparse_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    plan: BlockPlan,
    *,
    predicate: Predicate | None = None,
    bias: Tensor | TableBias | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the key blocks that a plan lists for each query block.

    Memory beyond inputs, outputs and their gradients: one chunk of tiles (some MiB; at least one tile of
    query_block x slots * key_block scores), forward and backward, whatever the number of tokens. Scores are computed
    again in the backward pass. Under torch.compile a predicate, a bias or unused slots of the plan are laid out once
    for all pairs of the plan, which is linear in tokens for a plan with a fixed number of slots.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, key_heads, keys, head_dim); key_heads divides heads.
        value: (batch, key_heads, keys, value_dim).
        plan: which key blocks each query block reads; for all, per head, or per batch entry and head.
        predicate: ``predicate(batch, head, query, key) -> bool`` on broadcasting integer tensors: which of the read
            pairs attend. A causal mask for decoding is ``key <= query + keys - queries``.
        bias: added to the scaled scores: a tensor that broadcasts to (batch, heads, queries, keys), or a
            :class:`TableBias`. Both receive gradients.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        cu_seqlens: (sequences + 1,) offsets of sequences packed along the tokens of a batch of 1: pairs of different
            sequences do not attend, and key blocks of other sequences are not read.
        return_lse: also return the log-sum-exp of the scores, (batch, heads, queries), natural log, float32, -inf for
            rows without keys. It is differentiable.
        backend: "reference" (the equation with a dense mask), "tiles" (query tiles against their keys; every device,
            forward and backward), "dense" (tiles, with all queries and keys as one tile), "flex" (FlexAttention with
            a BlockMask; without backward on a CPU) or "auto".

    Rows without keys give zeros, lse -inf and no gradient.

    Raises:
        TypeError: mixed or integer dtypes, or a bias that is neither tensor nor TableBias.
        ValueError: shapes that do not fit each other or the plan.

    Source: the block-sparse form of "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    arXiv 2205.14135, section 3.3.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 64, 16)
    >>> plan = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool), query_block=16, key_block=16)
    >>> blocksparse_attention(q, k, v, plan, predicate=lambda b, h, i, j: j <= i).shape
    torch.Size([1, 2, 64, 16])
    """
    check_choice("backend", backend, ("auto", "reference", "tiles", "dense", "flex"))
    _check(query, key, value, plan, bias, cu_seqlens)
    scale = resolve_scale(scale, query.shape[-1])
    if cu_seqlens is not None:
        plan, predicate = _pack(plan, predicate, cu_seqlens, query.shape[2])
    if plan.index.ndim == 4 and plan.index.shape[:2] != query.shape[:2]:
        plan = dataclasses.replace(plan, index=plan.index.expand(*query.shape[:2], -1, -1), _groups={})
    if backend == "auto":
        backend = _choose(query, key, plan, bias)
    if backend == "reference":
        out, lse = _reference(query, key, value, plan, predicate, bias, scale)
    elif backend == "flex":
        out, lse = _flex(query, key, value, plan, predicate, bias, scale)
    else:
        if backend == "dense" and query.shape[2] and key.shape[2]:
            plan, predicate = _one_tile(query, key, plan, predicate)
        out, lse = tiled(query, key, value, plan, predicate, bias, scale)
    return (out, lse) if return_lse else out


def _choose(query: Tensor, key: Tensor, plan: BlockPlan, bias: Tensor | TableBias | None) -> str:
    if query.is_cuda:
        flexible = plan.key_block % 16 == 0 and plan.query_block % 16 == 0 and plan.mask is None
        return "flex" if flexible and query.dtype != torch.float64 else "tiles"
    queries, keys = query.shape[2], key.shape[2]
    read = plan.index.shape[-1] * plan.key_block
    small = queries * keys <= DENSE_PAIRS and plan.index.ndim == 2 and plan.index.shape[0] > 1
    by_class = isinstance(bias, TableBias) and isinstance(bias.index, Tensor)
    return "dense" if small and 2 * read > keys and not by_class else "tiles"


def _reference(query, key, value, plan, predicate, bias, scale) -> tuple[Tensor, Tensor]:
    wide, (queries, keys) = accumulation_dtype(query.dtype), (query.shape[2], key.shape[2])
    batch, head, i, j = _positions(query, keys)
    attends = plan.expand_mask(queries, keys)
    attends = attends.expand(*query.shape[:2], queries, keys)
    if predicate is not None:
        attends = attends & predicate(batch, head, i, j)
    scores = scale * torch.einsum("bhid,bhjd->bhij", query.to(wide), repeat_heads(key, query.shape[1]).to(wide))
    if isinstance(bias, TableBias):
        scores = scores + _dense_table(bias, plan, query, keys).to(wide)
    elif bias is not None:
        scores = scores + bias.to(wide)
    scores = scores.masked_fill(~attends, -torch.inf)
    some = attends.any(-1, keepdim=True)
    # Rows without keys get harmless scores, so that neither the softmax nor its gradient sees a row of -inf.
    safe = torch.where(some, scores, 0.0)
    weights = torch.where(some, safe.softmax(-1), 0.0)
    lse = torch.where(some[..., 0], safe.logsumexp(-1), -torch.inf)
    out = torch.einsum("bhij,bhjd->bhid", weights, repeat_heads(value, query.shape[1]).to(wide))
    return out.to(query.dtype), lse


def _positions(query: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, views = (*query.shape[:3], keys), ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1))
    batch, head, i, j = (torch.arange(n, device=query.device).view(view) for n, view in zip(shape, views))
    return batch, head, i, j


def _dense_table(bias: TableBias, plan: BlockPlan, query: Tensor, keys: int) -> Tensor:
    """The table laid out over all pairs: (1 | heads, queries, keys)."""
    _, _, i, j = _positions(query, keys)
    if not isinstance(bias.index, Tensor):
        return bias.table[:, bias.index(i, j)[0, 0]]
    assert plan.mask_of is not None
    columns = torch.where(plan.index < 0, -(-keys // plan.key_block), plan.index).long()[..., None] * plan.key_block
    columns = (columns + torch.arange(plan.key_block, device=columns.device)).flatten(-2)
    entries = torch.zeros(len(columns) * plan.query_block, int(columns.max()) + 1, dtype=torch.long)
    entries.scatter_(1, columns.repeat_interleave(plan.query_block, 0), bias.index[plan.mask_of].flatten(0, 1).long())
    return bias.table[:, entries[: query.shape[2], :keys]]


def _one_tile(query: Tensor, key: Tensor, plan: BlockPlan, predicate: Predicate | None):
    """The same pairs with all queries as one tile."""
    if plan.index.ndim != 2:
        raise ValueError(f"backend='dense' needs one plan for all heads, got an index {tuple(plan.index.shape)}")
    queries, keys = query.shape[2], key.shape[2]
    wanted = ("dense", queries, keys)
    if wanted not in plan._groups:
        index = torch.zeros(1, 1, dtype=torch.long, device=query.device)
        mask = plan.expand_mask(queries, keys)[None]
        plan._groups[wanted] = BlockPlan(queries, keys, index, mask, torch.zeros_like(index[0]), padded=False)
    return plan._groups[wanted], predicate


def _pack(plan: BlockPlan, predicate: Predicate | None, cu_seqlens: Tensor, tokens: int):
    """Plan and predicate that keep pairs of different packed sequences apart."""
    sequence = torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens[1:], right=True)

    def together(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = sequence[query] == sequence[key]
        return same if predicate is None else same & predicate(batch, head, query, key)

    rows = torch.arange(plan.index.shape[-2], device=plan.index.device) * plan.query_block
    first_query = sequence[rows.clamp(max=tokens - 1)][:, None]
    last_query = sequence[(rows + plan.query_block - 1).clamp(max=tokens - 1)][:, None]
    first_key = plan.index.long().clamp(min=0) * plan.key_block
    last_key = (first_key + plan.key_block - 1).clamp(max=tokens - 1)
    meet = (sequence[first_key] <= last_query) & (sequence[last_key] >= first_query)
    if plan.mask is not None:  # mask classes are laid out by slot: leave the slots where they are
        return plan, together
    index = torch.where(meet, plan.index, -1)
    return BlockPlan.from_index(index, query_block=plan.query_block, key_block=plan.key_block), together


def _flex(query, key, value, plan, predicate, bias, scale) -> tuple[Tensor, Tensor]:
    queries, keys = query.shape[2], key.shape[2]
    index = plan.index if plan.index.ndim == 4 else plan.index[None] if plan.index.ndim == 3 else plan.index[None, None]
    count = (index >= 0).sum(-1).to(torch.int32)
    blocks = -(-keys // plan.key_block)
    listed = torch.where(index < 0, 0, index).to(torch.int32)
    listed = torch.cat([listed, listed.new_zeros(*listed.shape[:-1], blocks - listed.shape[-1])], dim=-1)
    elements = plan.expand_mask(queries, keys) if plan.mask is not None else None

    # Without torch.compile FlexAttention looks at the mask alone, so the mask repeats which blocks are read.
    read = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=query.device)
    read.scatter_(-1, torch.where(index < 0, blocks, index).long(), True)

    def attends(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = read[batch % read.shape[0], head % read.shape[1], i // plan.query_block, j // plan.key_block]
        if elements is not None:
            allowed = allowed & elements[i, j]
        return allowed if predicate is None else allowed & predicate(batch, head, i, j)

    change = None
    if isinstance(bias, TableBias):
        by_class = isinstance(bias.index, Tensor)
        change = _add(_dense_table(bias, plan, query, keys)[None]) if by_class else _add_table(bias)
    elif bias is not None:
        change = _add(bias[(None,) * (4 - bias.ndim)])
    mask = BlockMask.from_kv_blocks(
        count,
        listed,
        BLOCK_SIZE=(plan.query_block, plan.key_block),
        mask_mod=attends,
        seq_lengths=(queries, keys),
    )
    grouped = query.shape[1] != key.shape[1]
    out, aux = (torch.compile(flex_attention) if query.is_cuda else flex_attention)(
        query, key, value, change, mask, scale, grouped, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return out, aux.lse


def _add_table(bias: TableBias):
    table, entry = bias.table, bias.index
    assert not isinstance(entry, Tensor)

    def change(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[head % table.shape[0], entry(i, j)]

    return change


def _add(bias: Tensor):
    def change(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        where = zip(bias.shape, (batch, head, i, j), strict=True)
        return score + bias[tuple(torch.zeros_like(at) if size == 1 else at for size, at in where)]

    return change


def _check(query, key, value, plan, bias, cu_seqlens) -> None:
    check_qkv(query, key, value)
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    blocks = plan.index.shape[-2]
    if blocks != -(-queries // plan.query_block):
        raise ValueError(f"the plan has {blocks} blocks of {plan.query_block} queries but query has {queries} tokens")
    wanted = (batch, heads)[4 - plan.index.ndim :]
    if any(have not in (1, want) for have, want in zip(plan.index.shape[:-2], wanted)) and plan.index.ndim == 4:
        raise ValueError(f"the plan is for (batch, heads) {tuple(plan.index.shape[:2])}, query has {(batch, heads)}")
    if plan.index.ndim == 3 and plan.index.shape[0] != heads:
        raise ValueError(f"the plan is for {plan.index.shape[0]} heads but query has {heads}")
    if plan.index.device != query.device:
        raise ValueError(f"the plan is on {plan.index.device} but query on {query.device}")
    if isinstance(bias, Tensor):
        full = (batch, heads, queries, keys)
        if bias.ndim > 4 or any(have not in (1, want) for have, want in zip(bias.shape[::-1], full[::-1])):
            raise ValueError(f"bias must broadcast to {full}, got shape {tuple(bias.shape)}")
    elif isinstance(bias, TableBias):
        if bias.table.ndim != 2 or bias.table.shape[0] not in (1, heads):
            raise ValueError(f"bias.table must be ({heads}, entries), got shape {tuple(bias.table.shape)}")
        if isinstance(bias.index, Tensor) and (plan.mask is None or bias.index.shape != plan.mask.shape):
            raise ValueError("a TableBias with an index tensor needs a plan with a mask of the same shape")
    elif bias is not None:
        raise TypeError(f"bias must be a tensor or a TableBias, got {type(bias).__name__}")
    if cu_seqlens is not None and (batch != 1 or queries != keys):
        raise ValueError(f"cu_seqlens needs a batch of 1 and as many queries as keys, got {batch}, {queries}, {keys}")
