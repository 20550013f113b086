"""LASP-2H: the softmax layers of hybrid models, by one all-gather of keys and values.

Rank r holds n queries; K and V of all ranks are gathered (only key/value heads), while the block with the own keys is
computed::

    O_r = softmax(scale Q_r K^T + mask) V           backward: dK, dV of all keys, reduce-scattered (sum) to their ranks

A rank receives 2 (W - 1) B H_kv n d elements forward and sends as many backward (float32).

Source: "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", arXiv 2502.07563, section 3.5.
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


def lasp2h(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    group: Any = None,
    causal: bool = True,
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
    """Exact softmax attention over a sharded sequence with gathered keys and values; call it on every rank.

    Args:
        query: this rank's queries, (batch, heads, queries, head_dim).
        key: this rank's keys, (batch, kv_heads, keys, head_dim); kv_heads divides heads.
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        group: process group, or one-dimensional device mesh, over which the sequence is sharded; None for all ranks.
        causal: a query sees the keys up to its own token.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        layout: which tokens a rank holds. :func:`manyheads.parallel.lasp2` layers in the same model need
            "contiguous", under which rank r does about (2r + 1) / W^2 of the causal work; "zigzag" and "striped"
            balance it.
        cu_seqlens: as in :func:`manyheads.parallel.ring_self_attention`, as are the next three.
        cu_seqlens_key: cumulative lengths of the keys' sequences, in cross attention.
        per_sequence: every packed sequence was laid out by itself.
        key_mask: boolean (batch, keys of all ranks); False hides a key.
        window: with ``causal``, a query sees its own key and the ``window - 1`` before it, in tokens of the sequence.
        softcap: c, the softmax is over ``c tanh(score / c)`` as in Gemma 2; None for the scores themselves.
        return_lse: also return the natural log of the softmax denominator.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, queries, value_dim), or (output, lse); differentiable (once). The gathered
        keys and values are kept for the backward pass.

    Raises:
        TypeError, ValueError, RankError: as :func:`manyheads.parallel.ring_self_attention`.

    Source: arXiv 2502.07563, section 3.5.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    >>> lasp2h(q, k, k).shape
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

    wire, _ = connect("lasp2h", group, timeout, describe)
    return _Gathered.apply(query, key, value, wire, plans[0])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, wire: Wire, plan: Plan):
        out, lse = blocks.empty(query, value.shape[-1])
        with wire.guard():
            gathered, pending = wire.all_gather(pack(key, value), "key, value")
            for distance in range(wire.world):
                owner = (wire.rank - distance) % wire.world  # the own block needs nothing from the others
                held = [key, value] if distance == 0 else unpack(gathered[owner], key, value)
                some = plan.tiles(wire.rank, owner)
                blocks.forward(query, held, some, plan.scale, plan.mask(owner), out, lse, plan.softcap)
                recorder.count_pairs(wire.call, distance, some)
                if distance == 0:
                    pending.wait()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, gathered, out, lse)
        ctx.wire, ctx.plan = wire, plan
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor):
        query, key, value, gathered, out, lse = ctx.saved_tensors
        plan, wide, wire = ctx.plan, lse.dtype, reconnect(ctx.wire, "lasp2h backward")
        with wire.guard():
            shift = grad_lse.to(wide) - (grad.to(wide) * out.to(wide)).sum(-1)
            d_query, shares = torch.zeros_like(query, dtype=wide), torch.zeros_like(gathered, dtype=wide)
            for owner in range(wire.world):
                blocks.backward(
                    query, unpack(gathered[owner], key, value), grad, lse, shift, plan.tiles(wire.rank, owner),
                    plan.scale, plan.mask(owner), d_query, unpack(shares[owner], key, value), plan.softcap,
                )  # fmt: skip
                if recorder.keeping():
                    for name, part in zip(("key", "value"), unpack(shares[owner], key, value)):
                        recorder.keep(f"partial_grad_{name}", owner, part)
            own, pending = wire.reduce_scatter(shares, "gradient of key, value")
            pending.wait()
        d_key, d_value = unpack(own, key, value)
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None
