"""Ring self-attention in its paper's own form: every rank computes its rows of the complete score matrix.

Rank r, with n of the N tokens (contiguous), S of shape n x N for each head::

    S[:, columns of u] = Q_r K_u^T          K of every rank u passing by on the ring
    A = softmax(scale S + mask)
    O_r = sum_u A[:, columns of u] V_u      V of every rank passing by

Backward: V passes again for dA = dO V^T, K passes again for dQ = scale dS K; dK = scale dS^T Q and dV = A^T dO are
sums over the ranks. Elements that a rank sends: 2 (W - 1) B H n d forward; backward 6 (W - 1) B H n d with the paper's
all-reduce of whole gradients (both together as much as Megatron's tensor parallelism), 4 (W - 1) B H n d with
reduce-scatter. The scores take B H n N numbers; :func:`manyheads.parallel.ring_self_attention` gives the same output
without them.

Source: "Sequence Parallelism: Long Sequence Training from System Perspective", arXiv 2105.13120, sections 3.2 and 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.parallel.plan import pack, unpack
from manyheads.parallel.wire import TIMEOUT, Wire, connect, reconnect

REDUCTIONS = ("reduce_scatter", "all_reduce")


def ring_scores(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    *,
    group: Any = None,
    reduction: str = "reduce_scatter",
    timeout: int | float = TIMEOUT,
) -> Float[Tensor, "batch heads tokens all_keys"]:
    """Raw scores of this rank's queries with the keys of all ranks (the paper's first ring); call it on every rank.

    Args:
        query: this rank's queries, (batch, heads, tokens, head_dim).
        key: this rank's keys, (batch, kv_heads, keys, head_dim).
        group: process group or one-dimensional device mesh; None for all ranks.
        reduction: how the gradient of key is summed: "reduce_scatter", or "all_reduce" as in the paper.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        (batch, heads, tokens, keys of all ranks) in the order of the ranks, without scale or mask, in float32 (float64
        for float64 inputs); differentiable (once).

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit, or that differ between ranks; the wrong group or none.
        RankError: a rank died, stalls or failed; the message names it.

    Source: arXiv 2105.13120, section 3.2, "Ring QK".

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> ring_scores(torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)).shape
    torch.Size([1, 4, 6, 6])
    >>> dist.destroy_process_group()
    """
    wire = _connect("ring_scores", group, timeout, query, key, key, reduction)
    return _Scores.apply(query, key, wire, reduction)


def ring_weighted_sum(
    weights: Float[Tensor, "batch heads tokens all_keys"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    group: Any = None,
    reduction: str = "reduce_scatter",
    timeout: int | float = TIMEOUT,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Sum of the values of all ranks with this rank's rows of weights (the paper's second ring).

    Args:
        weights: (batch, heads, tokens, keys of all ranks), columns in the order of the ranks.
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        group: process group or one-dimensional device mesh; None for all ranks.
        reduction: how the gradient of value is summed: "reduce_scatter", or "all_reduce" as in the paper.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        (batch, heads, tokens, value_dim) in the dtype of value; differentiable (once).

    Raises:
        TypeError, ValueError, RankError: as :func:`ring_scores`.

    Source: arXiv 2105.13120, section 3.2, "Ring AV".

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> ring_weighted_sum(torch.ones(1, 4, 6, 6), torch.ones(1, 2, 6, 8))[0, 0, 0, 0].item()
    6.0
    >>> dist.destroy_process_group()
    """
    wire = _connect("ring_weighted_sum", group, timeout, weights, None, value, reduction)
    return _WeightedSum.apply(weights, value, wire, reduction)


def rsa_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    group: Any = None,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    reduction: str = "reduce_scatter",
    timeout: int | float = TIMEOUT,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention over a contiguously sharded sequence in two rings with the complete rows of scores in between.

    Args:
        query: this rank's queries, (batch, heads, tokens, head_dim).
        key: this rank's keys, (batch, kv_heads, keys, head_dim).
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        group: process group or one-dimensional device mesh; None for all ranks.
        causal: a query sees the keys up to its own token; as many keys as queries.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        key_mask: boolean (batch, keys of all ranks), the same on all ranks; False hides a key.
        reduction: how gradients of key and value are summed: "reduce_scatter", or "all_reduce" as in the paper.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, tokens, value_dim); 0 for queries that see no key; differentiable (once).

    Raises:
        TypeError, ValueError, RankError: as :func:`ring_scores`.

    Source: arXiv 2105.13120, section 3.2.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 1, 4, 6, 8).unbind()
    >>> rsa_attention(q, k, v, causal=True).shape
    torch.Size([1, 4, 6, 8])
    >>> dist.destroy_process_group()
    """
    options = (causal, resolve_scale(scale, query.shape[-1]), key_mask)
    wire = _connect("rsa_attention", group, timeout, query, key, value, reduction, *options)
    scores = _Scores.apply(query, key, wire, reduction) * options[1]
    queries, keys = scores.shape[-2:]
    seen = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=query.device)
    if key_mask is not None:
        seen = key_mask.to(query.device)[:, None, None, :]
    if causal:
        own = torch.arange(queries, device=query.device) + wire.rank * queries
        seen = seen & (torch.arange(keys, device=query.device) <= own[:, None])
    # A row that sees nothing: softmax of a constant, then all of it hidden.
    weights = torch.where(seen, scores, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0).softmax(-1)
    return _WeightedSum.apply(weights.masked_fill(~seen, 0), value, wire, reduction).to(query.dtype)


def rsa_linformer(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    key_projection: Float[Tensor, "projected columns"],
    value_projection: Float[Tensor, "projected columns"],
    *,
    group: Any = None,
    scale: float | None = None,
    timeout: int | float = TIMEOUT,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Sequence parallelism with Linformer's attention: memory and messages do not depend on the length.

    Args:
        query: this rank's queries, (batch, heads, tokens, head_dim).
        key: this rank's keys, (batch, kv_heads, keys, head_dim).
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        key_projection: this rank's columns of E, (projected, keys): keys of all ranks become ``projected`` keys.
        value_projection: this rank's columns of F, (projected, keys).
        group: process group or one-dimensional device mesh; None for all ranks.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, tokens, value_dim); differentiable (once).

    Raises:
        TypeError, ValueError, RankError: as :func:`ring_scores`.

    Source: arXiv 2105.13120, section 3.3; "Linformer", arXiv 2006.04768.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 1, 4, 6, 8).unbind()
    >>> rsa_linformer(q, k, v, torch.randn(3, 6), torch.randn(3, 6)).shape
    torch.Size([1, 4, 6, 8])
    >>> dist.destroy_process_group()
    """
    projections = (key_projection, value_projection)
    factor = resolve_scale(scale, query.shape[-1])
    wire = _connect("rsa_linformer", group, timeout, query, key, value, "all_reduce", factor, projections=projections)
    wide = accumulation_dtype(query.dtype)
    short = [projection.to(wide) @ part.to(wide) for projection, part in zip(projections, (key, value))]
    all_keys, all_values = _Summed.apply(*short, wire)
    heads = query.shape[1]
    weights = factor * query.to(wide) @ repeat_heads(all_keys, heads).transpose(-2, -1)
    return (weights.softmax(-1) @ repeat_heads(all_values, heads)).to(query.dtype)


def _connect(call, group, timeout, query, key, value, reduction, *options, projections=()) -> Wire:
    def describe(wire: Wire) -> tuple[dict[str, Any], None]:
        check_choice("reduction", reduction, REDUCTIONS)
        if key is None:
            _check_weights(query, value, wire.world)
        else:
            check_qkv(query, key, value)
            for name, projection in zip(("key_projection", "value_projection"), projections):
                if projection.ndim != 2 or projection.shape[1] != key.shape[2]:
                    raise ValueError(f"{name} must be (projected, {key.shape[2]} keys), got {tuple(projection.shape)}")
            if call == "rsa_attention":
                _check_masks(query, key, wire.world, *options)
        tensors = [t for t in (query, key, value, *projections) if t is not None]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        plain = [o for o in options if not isinstance(o, Tensor)]
        return {"shapes": [list(t.shape) for t in tensors], "dtype": str(value.dtype), "reduction": reduction,
                "options": plain, "whether gradients are wanted": learns}, None  # fmt: skip

    return connect(call, group, timeout, describe)[0]


def _check_weights(weights: Tensor, value: Tensor, world: int) -> None:
    if weights.ndim != 4 or value.ndim != 4 or weights.shape[0] != value.shape[0] or weights.shape[1] % value.shape[1]:
        raise ValueError(f"weights {tuple(weights.shape)} and value {tuple(value.shape)} do not fit")
    if weights.shape[-1] != value.shape[2] * world:
        raise ValueError(f"weights have {weights.shape[-1]} columns, the ranks {value.shape[2] * world} values")


def _check_masks(query: Tensor, key: Tensor, world: int, causal: bool, scale: float, mask: Tensor | None) -> None:
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(f"causal attention needs as many keys ({key.shape[2]}) as queries ({query.shape[2]})")
    wanted = (key.shape[0], key.shape[2] * world)
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != wanted):
        raise ValueError(f"key_mask must be boolean {wanted}, got {mask.dtype} {tuple(mask.shape)}")


def _fold(tensor: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, n, m) summed over the query heads that share a key/value head."""
    return tensor.unflatten(1, (kv_heads, -1)).sum(2)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, wire: Wire, reduction: str) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.wire, ctx.reduction = wire, reduction
        wide, keys = accumulation_dtype(query.dtype), key.shape[2]
        scores = query.new_empty(*query.shape[:3], keys * wire.world, dtype=wide)
        with wire.guard():
            for owner, held in wire.travel(key.reshape(-1), "key"):
                some = repeat_heads(held.view(key.shape), query.shape[1]).to(wide)
                scores[..., owner * keys : (owner + 1) * keys] = query.to(wide) @ some.transpose(-2, -1)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (query, key), wire = ctx.saved_tensors, reconnect(ctx.wire, f"{ctx.wire.call} backward of scores")
        keys, d_query = key.shape[2], torch.zeros_like(query, dtype=grad.dtype)
        with wire.guard():
            for owner, held in wire.travel(key.reshape(-1), "key"):
                some = repeat_heads(held.view(key.shape), query.shape[1]).to(grad.dtype)
                d_query += grad[..., owner * keys : (owner + 1) * keys] @ some
            d_keys = _fold(grad.transpose(-2, -1) @ query.to(grad.dtype), key.shape[1])
            d_key = _reduce(d_keys, wire, ctx.reduction, "gradient of key")
        return d_query.to(query.dtype), d_key.to(key.dtype), None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, value: Tensor, wire: Wire, reduction: str) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.wire, ctx.reduction = wire, reduction
        keys, out = value.shape[2], weights.new_zeros(*weights.shape[:3], value.shape[-1])
        with wire.guard():
            for owner, held in wire.travel(value.reshape(-1), "value"):
                some = repeat_heads(held.view(value.shape), weights.shape[1]).to(weights.dtype)
                out += weights[..., owner * keys : (owner + 1) * keys] @ some
        return out.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (weights, value), wire = ctx.saved_tensors, reconnect(ctx.wire, f"{ctx.wire.call} backward of weighted sum")
        keys, d_weights, grad = value.shape[2], torch.empty_like(weights), grad.to(weights.dtype)
        with wire.guard():
            for owner, held in wire.travel(value.reshape(-1), "value"):
                some = repeat_heads(held.view(value.shape), weights.shape[1]).to(weights.dtype)
                d_weights[..., owner * keys : (owner + 1) * keys] = grad @ some.transpose(-2, -1)
            d_values = _fold(weights.transpose(-2, -1) @ grad, value.shape[1])
            d_value = _reduce(d_values, wire, ctx.reduction, "gradient of value")
        return d_weights, d_value.to(value.dtype), None, None


def _reduce(whole: Tensor, wire: Wire, reduction: str, what: str) -> Tensor:
    """This rank's tokens (axis 2) of the sum over the ranks."""
    if reduction == "all_reduce":
        whole = whole.contiguous()
        wire.all_reduce(whole, what).wait()
        return whole.chunk(wire.world, dim=2)[wire.rank]
    parts = whole.chunk(wire.world, dim=2)
    out, pending = wire.reduce_scatter(torch.stack([part.reshape(-1) for part in parts]), what)
    pending.wait()
    return out.view(parts[0].shape)


class _Summed(torch.autograd.Function):
    """Two tensors summed over the ranks in one all-reduce; their gradients too, as every rank uses the sums."""

    @staticmethod
    def forward(ctx, first: Tensor, second: Tensor, wire: Wire):
        ctx.wire = wire
        buffer = pack(first, second)
        with wire.guard():
            wire.all_reduce(buffer, "projected key, value").wait()
        return tuple(unpack(buffer.clone(), first, second))

    @staticmethod
    @once_differentiable
    def backward(ctx, first: Tensor, second: Tensor):
        wire, buffer = reconnect(ctx.wire, f"{ctx.wire.call} backward"), pack(first, second)
        with wire.guard():
            wire.all_reduce(buffer, "gradient of projected key, value").wait()
        return *unpack(buffer, first, second), None
