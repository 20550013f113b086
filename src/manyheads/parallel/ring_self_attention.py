"""Ring attention: queries stay, keys and values travel round the ranks, no rank holds the whole sequence.

W ranks hold n tokens each. At step t = 0 .. W - 1 rank r holds the keys and values of rank u = (r - t) mod W::

    O_b = softmax(scale Q K_u^T) V_u,   l_b = ln sum exp(scale Q K_u^T)        while K_u, V_u go on to rank r + 1
    l' = ln(e^l + e^l_b)                O' = O e^(l - l') + O_b e^(l_b - l')   (float32)

In the backward pass keys and values make the same journey, and the gradients that every rank adds for them follow one
hop behind, so that after W hops they are home. Elements that a rank sends, with B the batch and H_kv key/value heads::

    forward   2 (W - 1) B H_kv n d            backward   2 (W - 1) B H_kv n d,   and 2 W B H_kv n d in float32

Source: "Sequence Parallelism: Long Sequence Training from System Perspective", arXiv 2105.13120 (the ring; its own
form, which keeps the scores, is in :mod:`manyheads.parallel.rsa`); "Ring Attention with Blockwise Transformers",
arXiv 2310.01889 (the streaming form).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.parallel import blocks, recorder
from manyheads.parallel.plan import Plan, make_plan, pack, shared, unpack
from manyheads.parallel.wire import TIMEOUT, Wire, connect, eager, reconnect


def ring_self_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    group: Any = None,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "contiguous",
    cu_seqlens: Any = None,
    cu_seqlens_key: Any = None,
    per_sequence: bool = False,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    timeout: int | float = TIMEOUT,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over a sequence that is sharded over the ranks of a group; call it on every rank.

    Args:
        query: this rank's queries, (batch, heads, queries, head_dim), as :func:`manyheads.parallel.layouts.shard`
            gives them.
        key: this rank's keys, (batch, kv_heads, keys, head_dim); kv_heads divides heads, and only kv_heads travel. Keys
            of another sequence (cross attention) may be of another number than the queries.
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        group: process group, or one-dimensional device mesh, over which the sequence is sharded; None for all ranks.
        causal: a query sees the keys up to its own token.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        layout: which tokens a rank holds: "contiguous" (under ``causal`` the last rank does all the work),
            "zigzag" or "striped" (balanced; ``causal`` only).
        cu_seqlens: cumulative lengths 0, n1, n1 + n2, ... of the sequences that are packed into the tokens of all ranks
            together (batch must be 1); they do not see each other.
        cu_seqlens_key: the same for the keys, in cross attention.
        per_sequence: every packed sequence was laid out by itself, see :func:`manyheads.parallel.layouts.token_index`.
        key_mask: boolean (batch, keys of all ranks) in the order of the sequence, the same on all ranks; False hides a
            key, of a padded token for example.
        window: with ``causal``, a query sees its own key and the ``window - 1`` before it, in tokens of the sequence.
        softcap: c, the softmax is over ``c tanh(score / c)`` as in Gemma 2; None for the scores themselves.
        return_lse: also return the natural log of the softmax denominator.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, queries, value_dim), or the pair (output, lse) with lse float32 (batch, heads,
        queries), -inf for queries that see no key, whose output is 0. Both are differentiable (once).

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: on every rank and before data moves: shapes that do not fit, tokens that do not divide, a layout
            that needs ``causal``, arguments that differ between ranks, the wrong group or none.
        RankError: a rank died, stalls or failed; the message names it.

    Whatever the dtype, outputs and gradients are accumulated in float32. On CPU the blocks are float32 as well.

    Source: arXiv 2105.13120, section 3.2; arXiv 2310.01889, section 3.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    >>> ring_self_attention(q, k, k, causal=True, layout="zigzag").shape
    torch.Size([1, 4, 6, 8])
    >>> dist.destroy_process_group()
    """
    out, lse = eager(_call)(
        query, key, value, group, timeout, causal=causal, scale=scale, layout=layout, cu_seqlens=cu_seqlens,
        cu_seqlens_key=cu_seqlens_key, per_sequence=per_sequence, key_mask=key_mask,
        window=window, softcap=softcap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _call(query: Tensor, key: Tensor, value: Tensor, group: Any, timeout: int | float, **options: Any):
    plans: list[Plan] = []

    def describe(wire: Wire) -> tuple[dict[str, Any], None]:
        plans.append(make_plan(query, key, value, wire=wire, **options))
        return shared(plans[0], query, key, value), None

    wire, _ = connect("ring_self_attention", group, timeout, describe)
    return _Ring.apply(query, key, value, wire, plans[0])


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, wire: Wire, plan: Plan):
        with wire.guard():
            out, lse = _forward(query, key, value, wire, plan)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.wire, ctx.plan = wire, plan
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        wire = reconnect(ctx.wire, "ring_self_attention backward")
        with wire.guard():
            shift = grad_lse.to(lse.dtype) - (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            grads = _backward(query, key, value, grad, lse, shift, wire, ctx.plan)
        return *(g.to(t.dtype) for g, t in zip(grads, (query, key, value))), None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, wire: Wire, plan: Plan) -> tuple[Tensor, Tensor]:
    out, lse = blocks.empty(query, value.shape[-1])
    for owner, held in wire.travel(pack(key, value), "key, value"):
        some = plan.tiles(wire.rank, owner)
        block = (query, unpack(held, key, value), some, plan.scale, plan.mask(owner))
        blocks.forward(*block, out, lse, plan.softcap)
        recorder.count_pairs(wire.call, wire.step, some)
        if recorder.keeping():
            part = blocks.empty(query, value.shape[-1])
            blocks.forward(*block, *part, plan.softcap)
            recorder.keep("partial_out", wire.step, part[0])
            recorder.keep("partial_lse", wire.step, part[1])
    return out, lse


def _backward(query, key, value, grad, lse, shift, wire: Wire, plan: Plan) -> tuple[Tensor, ...]:
    d_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
    buffer = pack(key, value)
    share, sending, receiving = (torch.empty_like(buffer, dtype=lse.dtype) for _ in range(3))
    following = None
    for owner, held in wire.travel(buffer, "key, value"):
        share.zero_()
        blocks.backward(
            query, unpack(held, key, value), grad, lse, shift, plan.tiles(wire.rank, owner), plan.scale,
            plan.mask(owner), d_query, unpack(share, key, value), plan.softcap,
        )  # fmt: skip
        if following is not None:
            following.wait()
            share += receiving  # what the ranks before this one added for the same keys
        if wire.world > 1:
            following = wire.pass_on(share, receiving, "gradient of key, value")
            share, sending = sending, share
    if following is not None:
        following.wait()
        share = receiving
    return d_query, *unpack(share, key, value)
