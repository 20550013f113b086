"""Two dimensions: Ulysses inside small groups, ring attention between them.

W = U R ranks, those of an Ulysses group adjacent. An all-to-all inside the group turns (n tokens, all heads) into
(U n tokens, heads / U); ring attention runs over the R groups, every rank with its own heads; a second all-to-all turns
the outputs back. Elements that a rank sends: (1 - 1/U) of its queries, keys, values and outputs, and ring attention's
volume for heads / U of U n tokens over R ranks.

Source: "DeepSpeed Ulysses", arXiv 2309.14509; with the ring of "Sequence Parallelism", arXiv 2105.13120, as in "USP",
arXiv 2405.07719.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from manyheads.engines.common import check_qkv
from manyheads.parallel.ring_self_attention import ring_self_attention
from manyheads.parallel.wire import TIMEOUT, Wire, connect, eager, reconnect


def ulysses_ring_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    ulysses_group: Any,
    ring_group: Any,
    causal: bool = False,
    scale: float | None = None,
    layout: str = "contiguous",
    key_mask: Tensor | None = None,
    timeout: int | float = TIMEOUT,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Exact softmax attention over a sequence sharded over two dimensions of ranks; call it on every rank.

    Args:
        query: this rank's queries, (batch, heads, queries, head_dim), as ``shard(..., ulysses=U)`` of
            :mod:`manyheads.parallel.layouts` gives them.
        key: this rank's keys, (batch, kv_heads, keys, head_dim).
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        ulysses_group: the U ranks that share out heads: process group or one-dimensional device mesh.
        ring_group: the R ranks with the same place in their Ulysses groups.
        causal: a query sees the keys up to its own token.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        layout: which tokens an Ulysses group holds: "contiguous", "zigzag" or "striped".
        key_mask: boolean (batch, keys of all ranks); False hides a key.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, queries, value_dim); differentiable (once).

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: heads or kv_heads that U does not divide, and as :func:`manyheads.parallel.ring_self_attention`.
        RankError: a rank died, stalls or failed; the message names it.

    Source: arXiv 2309.14509, section 3; arXiv 2405.07719, section 3.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    >>> one = dist.group.WORLD
    >>> ulysses_ring_attention(q, k, k, ulysses_group=one, ring_group=one).shape
    torch.Size([1, 4, 6, 8])
    >>> dist.destroy_process_group()
    """
    wire, (q, k, v) = eager(_scatter)(query, key, value, ulysses_group, timeout)
    out = ring_self_attention(
        q, k, v, group=ring_group, causal=causal, scale=scale, layout=layout, key_mask=key_mask, timeout=timeout
    )
    return eager(_Swap.apply)(wire, False, out)[0]


def _scatter(query: Tensor, key: Tensor, value: Tensor, group: Any, timeout: int | float):
    def describe(wire: Wire) -> tuple[dict[str, Any], None]:
        check_qkv(query, key, value)
        for name, heads in (("heads", query.shape[1]), ("kv_heads", key.shape[1])):
            if heads % wire.world:
                raise ValueError(f"{heads} {name} do not divide over the {wire.world} ranks of ulysses_group")
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return {
            "shapes": [list(t.shape) for t in (query, key, value)],
            "dtype": str(query.dtype),
            "whether gradients are wanted": learns,
        }, None

    wire, _ = connect("ulysses_ring_attention", group, timeout, describe)
    return wire, _Swap.apply(wire, True, query, key, value)


class _Swap(torch.autograd.Function):
    """(batch, heads, n, width) of this rank's tokens to (batch, heads / U, U n, width) of the group's, or back."""

    @staticmethod
    def forward(ctx, wire: Wire, gather_tokens: bool, *tensors: Tensor):
        ctx.wire, ctx.gather_tokens = wire, gather_tokens
        with wire.guard():
            return tuple(_swap(wire, gather_tokens, tensors, "heads"))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        wire = reconnect(ctx.wire, "ulysses_ring_attention backward")
        with wire.guard():
            return None, None, *_swap(wire, not ctx.gather_tokens, grads, "gradients of heads")


def _swap(wire: Wire, gather_tokens: bool, tensors: tuple[Tensor, ...], what: str) -> list[Tensor]:
    world = wire.world
    # The axis that is cut into one part for each rank, and the one along which the parts that come in are joined.
    cut, joined = (1, 2) if gather_tokens else (2, 1)
    parts = [tensor.chunk(world, dim=cut) for tensor in tensors]
    rows = torch.stack([torch.cat([part[rank].reshape(-1) for part in parts]) for rank in range(world)])
    arrived, pending = wire.all_to_all(rows, what)
    pending.wait()
    columns = arrived.split([math.prod(part[0].shape) for part in parts], dim=1)
    return [
        torch.cat([column[rank].view(part[0].shape) for rank in range(world)], dim=joined)
        for column, part in zip(columns, parts)
    ]
