"""TokenRing: keys and values stay, queries travel one way round the ranks, partial outputs come back the other way.

W ranks hold n tokens each. Without a causal mask, at step t = 0 .. W - 1, rank j holds the queries of rank
(j - t) mod W::

    post    queries to rank j + 1         and, computed one step before, (O_b, l_b) straight to the queries' owner
    compute O_b = softmax(scale Q K_j^T) V_j,   l_b = ln sum exp(scale Q K_j^T)
    wait    merge what arrived for the own queries

Under a causal mask queries travel to rank j - 1, and only the rows that a later rank still needs: in the zigzag layout
all n before the journey wraps round, the second half after it. The backward pass makes the same journey with
(Q, dO, l, dl - D), D = rowsum(dO * O); every rank adds to its own dK, dV and sends partial dQ home (float32). Elements
that a rank sends without a mask, with B the batch and H query heads::

    forward    queries (W - 1) B H n d one way        outputs (W - 1) B H n (d + 1) the other way
    backward   (W - 1) B H n (2 d + 2) one way        (W - 1) B H n d the other way

With grouped key/value heads ring attention sends less: prefer it when H_kv < H / 2.

Source: "TokenRing: An Efficient Parallelism Framework for Infinite-Context LLMs via Bidirectional Communication",
arXiv 2412.20501. The paper has no backward pass; this one follows from the same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.engines.merge import merge
from manyheads.parallel import blocks, recorder
from manyheads.parallel.blocks import Tile
from manyheads.parallel.plan import Plan, make_plan, shared
from manyheads.parallel.wire import TIMEOUT, Wire, connect, eager, reconnect


def token_ring(
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
    float32_outputs: bool = False,
    return_lse: bool = False,
    timeout: int | float = TIMEOUT,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over a sharded sequence, both directions of the links busy; call it on every rank.

    Args:
        query: this rank's queries, (batch, heads, queries, head_dim); all heads travel.
        key: this rank's keys, (batch, kv_heads, keys, head_dim); they stay.
        value: this rank's values, (batch, kv_heads, keys, value_dim); they stay.
        group: process group, or one-dimensional device mesh, over which the sequence is sharded; None for all ranks.
        causal: a query sees the keys up to its own token. Needs the layout "zigzag" (queries shrink to half on the way)
            or "striped".
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        layout: which tokens a rank holds: "contiguous" (without ``causal``), "zigzag" or "striped" (with it).
        cu_seqlens: as in :func:`manyheads.parallel.ring_self_attention`, as are the next three.
        cu_seqlens_key: cumulative lengths of the keys' sequences, in cross attention.
        per_sequence: every packed sequence was laid out by itself.
        key_mask: boolean (batch, keys of all ranks); False hides a key.
        window: with ``causal``, a query sees its own key and the ``window - 1`` before it, in tokens of the sequence.
        softcap: c, the softmax is over ``c tanh(score / c)`` as in Gemma 2; None for the scores themselves.
        float32_outputs: send partial outputs in float32 instead of the dtype of the query: twice the bytes for
            bfloat16, one rounding less.
        return_lse: also return the natural log of the softmax denominator.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, queries, value_dim), or (output, lse) with lse float32, -inf for queries that
        see no key. Both are differentiable (once).

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: on every rank and before data moves: as :func:`manyheads.parallel.ring_self_attention`, and causal
            attention over contiguous tokens.
        RankError: a rank died, stalls or failed; the message names it.

    Source: arXiv 2412.20501, section 3.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 1, 4, 6, 8).unbind()
    >>> token_ring(q, k, v).shape
    torch.Size([1, 4, 6, 8])
    >>> dist.destroy_process_group()
    """
    out, lse = eager(_call)(
        query, key, value, group, timeout, float32_outputs, causal=causal, scale=scale, layout=layout,
        cu_seqlens=cu_seqlens, cu_seqlens_key=cu_seqlens_key, per_sequence=per_sequence, key_mask=key_mask,
        window=window, softcap=softcap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _call(query: Tensor, key: Tensor, value: Tensor, group: Any, timeout: int | float, wide: bool, **options: Any):
    plans: list[Plan] = []

    def describe(wire: Wire) -> tuple[dict[str, Any], None]:
        if options["causal"] and options["layout"] == "contiguous" and wire.world > 1:
            raise ValueError(
                "causal=True with layout='contiguous' leaves most ranks waiting for the last one: take 'zigzag' or "
                "'striped'"
            )
        plans.append(make_plan(query, key, value, wire=wire, **options))
        return shared(plans[0], query, key, value) | {"float32_outputs": wide}, None

    wire, _ = connect("token_ring", group, timeout, describe)
    return _TokenRing.apply(query, key, value, wire, plans[0], wide)


class _TokenRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, wire: Wire, plan: Plan, wide: bool):
        with wire.guard():
            out, lse = _forward(query, key, value, wire, plan, wide)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.wire, ctx.plan = wire, plan
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_lse: Tensor):
        query, key, value, out, lse = ctx.saved_tensors
        wire = reconnect(ctx.wire, "token_ring backward")
        with wire.guard():
            shift = grad_lse.to(lse.dtype) - (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            grads = _backward(query, key, value, grad, lse, shift, wire, ctx.plan)
        return *(g.to(t.dtype) for g, t in zip(grads, (query, key, value))), None, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, wire: Wire, plan: Plan, wide: bool) -> tuple[Tensor, Tensor]:
    out, lse = blocks.empty(query, value.shape[-1])
    sent_as = out.dtype if wide else query.dtype

    def compute(step: int, held: list[Tensor], some: list[Tile], rows: slice) -> list[Tensor]:
        part, part_lse = blocks.empty(held[0], value.shape[-1])
        blocks.forward(held[0], (key, value), some, plan.scale, plan.mask(wire.rank), part, part_lse,
                       plan.softcap)  # fmt: skip
        recorder.count_pairs(wire.call, step, some)
        if recorder.keeping():
            whole = blocks.empty(query, value.shape[-1])
            whole[0][:, :, rows], whole[1][:, :, rows] = part, part_lse
            recorder.keep("partial_out", step, whole[0])
            recorder.keep("partial_lse", step, whole[1])
        # Nothing rounds the own block: it does not travel.
        return [part_lse, part if step == 0 else part.to(sent_as)]

    def absorb(rows: slice, arrived: list[Tensor]) -> None:
        part_lse, part = arrived
        out[:, :, rows], lse[:, :, rows] = merge([out[:, :, rows], part.to(out.dtype)], [lse[:, :, rows], part_lse])

    results = [(lse.dtype, ()), (sent_as, (value.shape[-1],))]
    _circulate(wire, plan, [query], results, compute, absorb, ("query", "output"))
    return out, lse


def _backward(query, key, value, grad, lse, shift, wire: Wire, plan: Plan) -> tuple[Tensor, ...]:
    d_query, d_key, d_value = (torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (query, key, value))

    def compute(step: int, held: list[Tensor], some: list[Tile], rows: slice) -> list[Tensor]:
        some_lse, some_shift, some_query, some_grad = held
        part = torch.zeros(some_query.shape, dtype=lse.dtype, device=query.device)
        blocks.backward(some_query, (key, value), some_grad, some_lse, some_shift, some, plan.scale,
                        plan.mask(wire.rank), part, (d_key, d_value), plan.softcap)  # fmt: skip
        return [part]

    def absorb(rows: slice, arrived: list[Tensor]) -> None:
        d_query[:, :, rows] += arrived[0]

    travelling, results = [lse, shift, query, grad.to(query.dtype)], [(lse.dtype, (query.shape[-1],))]
    _circulate(wire, plan, travelling, results, compute, absorb, ("query, gradient", "gradient of query"))
    return d_query, d_key, d_value


def _circulate(
    wire: Wire, plan: Plan, travelling: list[Tensor], results: list[tuple[torch.dtype, tuple[int, ...]]],
    compute: Callable[[int, list[Tensor], list[Tile], slice], list[Tensor]],
    absorb: Callable[[slice, list[Tensor]], None], names: tuple[str, str],
) -> None:  # fmt: skip
    """Send ``travelling`` round the ranks, ``compute`` on each, send what that gives home, ``absorb`` it there."""
    rank, world, way = wire.rank, wire.world, -1 if plan.causal else 1
    lead, device = travelling[0].shape[:2], travelling[0].device

    def rows_of(owner: int, hop: int) -> slice:
        """The rows that the rank at this hop of their journey, or one after it, still needs."""
        return slice(0, plan.queries) if hop == 0 else plan.needed(owner, hop, way)

    held, whole, result = travelling, None, []
    for step in range(world + 1):
        wire.step = step
        owner = (rank - way * step) % world  # whose queries are here at this step
        sends, receives, moving, coming = [], [], None, None
        if step < world - 1:
            here, next_here = rows_of(owner, step), rows_of((owner - way) % world, step + 1)
            going = _offset(rows_of(owner, step + 1), here.start)
            if whole is None or going != slice(0, held[0].shape[2]):  # a buffer that goes on whole is not packed again
                whole = _bytes([t[:, :, going] for t in held])
            sends.append((whole, (rank + way) % world, names[0]))
            size = next_here.stop - next_here.start
            moving = _room([(t.dtype, (*lead, size, *t.shape[3:])) for t in held], device)
            receives.append((moving[0], (rank - way) % world, names[0]))
        home, helper = (rank - way * (step - 1)) % world, (rank + way * (step - 1)) % world
        own_rows = blocks.span(plan.tiles(rank, helper))
        if step >= 2:
            size = own_rows.stop - own_rows.start
            coming = _room([(dtype, (*lead, size, *rest)) for dtype, rest in results], device)
            sends.append((_bytes(result), home, names[1]))
            receives.append((coming[0], helper, names[1]))
        pending = wire.exchange(sends, receives)
        if step < world:
            some, rows = plan.tiles(owner, rank), rows_of(owner, step)
            computed = compute(step, held, [replace(t, rows=_offset(t.rows, rows.start)) for t in some], rows)
            result = [t[:, :, _offset(blocks.span(some), rows.start)] for t in computed]
            if step == 0:
                absorb(blocks.span(some), result)
        pending.wait()
        whole, held = moving or (None, held)
        if coming:
            absorb(own_rows, coming[1])


def _offset(rows: slice, by: int) -> slice:
    """Rows counted from row ``by``; nothing stays nothing."""
    return slice(rows.start - by, rows.stop - by) if rows.stop > rows.start else slice(0, 0)


def _bytes(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def _room(specs: list[tuple[torch.dtype, tuple[int, ...]]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """A buffer for tensors of these dtypes (widest first) and shapes, and the tensors as views of it."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in specs]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    return buffer, [part.view(d).view(shape) for part, (d, shape) in zip(buffer.split(sizes), specs)]
