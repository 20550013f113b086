"""Functions that the ranks of the tests run: a scheme on this rank's shard against one process on the whole."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from manyheads import parallel
from manyheads.engines.common import accumulation_dtype
from manyheads.engines.dense import attention
from manyheads.engines.linear import linear_attention
from manyheads.parallel import record, shard
from manyheads.parallel.local import group_of


@functools.cache
def meshes() -> tuple[Any, Any]:
    """This rank's Ulysses group and its ring group of 2 x 2 ranks."""
    rank = dist.get_rank()
    groups = [dist.new_group(members) for members in ([0, 1], [2, 3], [0, 2], [1, 3])]
    return groups[rank // 2], groups[2 + rank % 2]


def make_meshes() -> None:
    meshes()


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the largest entry."""
    if got.numel() == 0:
        return 0.0
    assert got.isfinite().logical_or(want == -torch.inf).all()
    gap = torch.where(got == want, 0, (got.double() - want.double()).abs())
    return float(gap.max() / want.double().abs().nan_to_num(0, 0, 0).max().clamp(min=1e-3))


def _written_out(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float | None) -> tuple[Tensor, ...]:
    """Output and lse of the equation, for the options that the dense engine's reference lacks."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ value, lse


def _seen(tokens: int, window: int | None, cu_seqlens: list[int] | None, key_mask: Tensor | None) -> Tensor:
    at = torch.arange(tokens)
    behind = at[:, None] - at
    seen = (behind >= 0) & (behind < (window or tokens))
    if cu_seqlens is not None:
        sequence = torch.searchsorted(torch.tensor(cu_seqlens), at, right=True)
        seen &= sequence[:, None] == sequence
    return seen if key_mask is None else seen & key_mask[:, None, None]


def softmax_case(
    name: str,
    *,
    world: int = 4,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    tokens: int = 24,
    keys: int | None = None,
    width: int = 8,
    value_width: int | None = None,
    dtype: str = "float32",
    peak: float = 1.0,
    masked: int | None = None,
    causal: bool = False,
    layout: str = "contiguous",
    cu_seqlens: list[int] | None = None,
    cu_seqlens_key: list[int] | None = None,
    per_sequence: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict | None:
    """Errors of output, lse and gradients, and the recording, of a softmax scheme."""
    group = group_of(world)
    if group is None:
        return None
    rank, dtype_ = dist.get_rank(group), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype_)

    def cut(tensor: Tensor, cu: list[int] | None = cu_seqlens) -> Tensor:
        return shard(tensor, rank, world, dim=2, layout=layout, cu_seqlens=cu, per_sequence=per_sequence)

    keys, value_width = tokens if keys is None else keys, value_width or width
    query, key = peak * normal(batch, heads, tokens, width), peak * normal(batch, kv_heads, keys, width)
    value, grad = normal(batch, kv_heads, keys, value_width), normal(batch, heads, tokens, value_width)
    grad_lse = normal(batch, heads, tokens).float()
    key_mask = None if masked is None else torch.arange(keys).expand(batch, -1) < keys - masked
    cu_key = cu_seqlens if cu_seqlens_key is None else cu_seqlens_key
    given = dict(causal=causal, cu_seqlens=cu_seqlens, cu_seqlens_key=cu_seqlens_key)

    wholes = [t.double().clone().requires_grad_() for t in (query, key, value)]
    mask = None if key_mask is None else key_mask[:, None, None]
    lengths = {n: None if given[n] is None else torch.tensor(given[n]) for n in ("cu_seqlens", "cu_seqlens_key")}
    scale = options.get("scale")
    if options.keys() & {"window", "softcap"}:
        seen = _seen(tokens, options.get("window"), cu_seqlens, key_mask)
        want, want_lse = _written_out(*wholes, seen, options.get("softcap"))
    else:
        want, want_lse = attention(
            *wholes, mask=mask, causal=causal, scale=scale, return_lse=True, backend="reference", **lengths
        )
    ((want * grad).sum() + torch.where(want_lse == -torch.inf, 0, want_lse * grad_lse).sum()).backward()

    locals_ = [cut(query), cut(key, cu_key), cut(value, cu_key)]
    # Expanded or transposed storage must not matter.
    locals_ = [t.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for t in locals_]
    with record() as log:
        out, lse = getattr(parallel, name)(
            *locals_, group=group, layout=layout, per_sequence=per_sequence, key_mask=key_mask, return_lse=True,
            timeout=20, **given, **options,
        )  # fmt: skip
        loss = (out * cut(grad)).sum() + torch.where(lse == -torch.inf, 0, lse * cut(grad_lse)).sum()
        loss.backward()
    errors = {"out": error(out, cut(want)), "lse": error(lse, cut(want_lse))}
    for label, local, whole, cu in zip(("query", "key", "value"), locals_, wholes, (cu_seqlens, cu_key, cu_key)):
        assert local.grad is not None
        assert whole.grad is not None
        assert local.grad.dtype == dtype_
        errors[label] = error(local.grad, cut(whole.grad, cu))
    return {"errors": errors, "log": log}


def linear_case(
    name: str,
    *,
    world: int = 4,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int = 2,
    tokens: int = 24,
    width: int = 5,
    value_width: int = 6,
    dtype: str = "float32",
    gates: str = "none",
    causal: bool = True,
    normalize: bool = False,
    state: bool = False,
    cu_seqlens: list[int] | None = None,
    ragged: list[int] | None = None,
    feature_map: str | None = None,
    seed: int = 0,
) -> dict | None:
    """Errors of output, states and gradients, and the recording, of a linear scheme."""
    group = group_of(world)
    if group is None:
        return None
    rank, dtype_ = dist.get_rank(group), getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    counts = ragged or [tokens // world] * world

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype_)

    def cut(tensor: Tensor) -> Tensor:
        return tensor.split(counts, dim=2)[rank]

    query, key = normal(batch, heads, tokens, width), normal(batch, kv_heads, tokens, width)
    if normalize:
        query, key = query.abs(), key.abs()
    value, grad = normal(batch, kv_heads, tokens, value_width), normal(batch, heads, tokens, value_width)
    shapes = {"constant": (heads,), "learned": (heads,), "token": (batch, heads, tokens)}
    shapes["channel"] = (batch, heads, tokens, width)
    wide = accumulation_dtype(dtype_)
    decay = -0.3 * torch.rand(shapes[gates], generator=generator).to(wide) if gates != "none" else None
    first = torch.randn(batch, heads, width, value_width + normalize, generator=generator).to(wide) if state else None
    grads_state = torch.randn(world, batch, heads, width, value_width + normalize, generator=generator)
    options = dict(feature_map=feature_map, normalize=normalize)

    wholes = [t.double().clone().requires_grad_() for t in (query, key, value)]
    whole_decay = None if decay is None else decay.double().clone().requires_grad_(gates != "constant")
    whole_first = None if first is None else first.double().clone().requires_grad_()
    want, want_state = linear_attention(
        *wholes, log_decay=whole_decay, causal=causal, initial_state=whole_first, return_state=True,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens), backend="reference", **options,
    )  # fmt: skip
    loss = (want * grad).sum()
    (loss + (want_state * grads_state.sum(0)).sum() if state else loss).backward()

    locals_ = [cut(t).clone().requires_grad_() for t in (query, key, value)]
    local_decay = None if decay is None else (decay if decay.ndim == 1 else cut(decay)).clone()
    if local_decay is not None and gates != "constant":
        local_decay.requires_grad_()
    local_first = first.clone().requires_grad_() if first is not None and rank == 0 else None
    with record() as log:
        if name == "lasp2":
            extra = dict(causal=causal, initial_state=local_first, cu_seqlens=cu_seqlens, return_state=state)
        else:
            extra = {}
        result = getattr(parallel, name)(*locals_, group=group, log_decay=local_decay, timeout=20, **options, **extra)
        out, final = result if state else (result, None)
        loss = (out * cut(grad)).sum()
        (loss + (final * grads_state[rank]).sum() if state else loss).backward()
    errors = {"out": error(out, cut(want))}
    for label, local, whole in zip(("query", "key", "value"), locals_, wholes):
        errors[label] = error(local.grad, cut(whole.grad))
    if state:
        errors["state"] = error(final, want_state)
    if local_first is not None:
        errors["initial_state"] = error(local_first.grad, whole_first.grad)
    if gates in ("token", "channel"):
        errors["gates"] = error(local_decay.grad, cut(whole_decay.grad))
    elif gates == "learned":
        summed = local_decay.grad.clone()
        dist.all_reduce(summed, group=group)
        errors["gates"] = error(summed, whole_decay.grad)
    return {"errors": errors, "log": log}
