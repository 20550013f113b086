"""Causal linear attention with decay over chunks of tokens, forward and backward: the CPU path of the linear engine.

With G the running sum of the log decay inside a chunk of m tokens (own token included) and S the state before it::

    D[a, b] = exp(G[a] - G[b])  for b <= a, else 0
    out     = ((Q K^T) * D) V  +  diag(exp(G)) Q S                         (inside the chunk + everything before it)
    S       <- exp(G[m-1]) S  +  (diag(exp(G[m-1] - G)) K)^T V

All exponents are sums of log decays <= 0, never quotients of cumulative products, so nothing overflows. The backward
walks the chunks in reverse with dS, the gradient of the state after the chunk, and the chunks' entry states, which the
forward pass keeps: (tokens / chunk) states of head_dim x value_dim, so memory is linear in the number of tokens.

One registered operator each for forward and backward keeps the loop out of traced graphs.
Source: "Various Lengths, Constant Speed", arXiv 2405.17381, and "Lightning Attention-2", arXiv 2401.04658.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.engines.common import accumulation_dtype
from manyheads.engines.counting import count_inside

# Heads whose chunks of q, k, v, scores and state are worked on together per thread: about 1 MiB, one core's L2.
HEADS_PER_THREAD = 8
# A decay per key channel makes the weights of a chunk (m, m, head_dim): short chunks keep that small.
CHANNEL_CHUNK = 16
# exp(-1e4) is 0 in every dtype; finite, so that differences of two closed gates are not nan.
CLOSED = -1e4

_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? log_decay, Tensor? state, Tensor? cu_seqlens,"
    " float scale, int chunk, bool causal, bool keep) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? log_decay, Tensor states, Tensor? cu_seqlens,"
    " Tensor grad_out, Tensor? grad_state, float scale, int chunk, bool causal)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def sequence_bounds(cu_seqlens: Tensor | None, tokens: int) -> list[tuple[int, int]]:
    """(start, end) of every packed sequence; raises ValueError unless they tile 0..tokens in order."""
    if cu_seqlens is None:
        return [(0, tokens)]
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != tokens or any(b < a for a, b in pairwise(borders)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens ({tokens}), got {borders}")
    return list(pairwise(borders))


def chunk_slots(tokens: int, chunk: int, cu_seqlens: Tensor | None) -> int:
    """How many chunk states are kept: an upper bound that does not depend on where packed sequences end."""
    return -(-tokens // chunk) if cu_seqlens is None else tokens // chunk + cu_seqlens.shape[0] - 1


class _Factors(NamedTuple):
    """Decay factors of one chunk; None means 1."""

    inside: Tensor  # (heads or 1, m, m), with decay per channel (heads, m, m, head_dim)
    query: Tensor | None  # (heads, m, 1 or head_dim): from the state before the chunk to token a
    key: Tensor | None  # (heads, m, 1 or head_dim): from token b to the state after the chunk
    state: Tensor | None  # (heads, 1 or head_dim, 1): across the chunk


class _Decay:
    """Decay factors of any chunk of a group of heads, computed once where they do not depend on the tokens."""

    def __init__(self, log_decay: Tensor | None, chunk: int, like: Tensor):
        self.log_decay = None if log_decay is None else log_decay.to(torch.float64).clamp(min=CLOSED)
        self.dtype = like.dtype
        self.fixed: _Factors | None = None
        if log_decay is None:
            self.fixed = _Factors(torch.ones(1, chunk, chunk, dtype=like.dtype).tril(), None, None, None)
        elif log_decay.ndim == 1:
            self.fixed = self._factors(log_decay.to(torch.float64).clamp(min=CLOSED)[:, None].expand(-1, chunk))

    def _factors(self, log_decay: Tensor) -> _Factors:
        total = log_decay.cumsum(dim=1)
        m = total.shape[1]
        gap = total.unsqueeze(2) - total.unsqueeze(1)
        later = torch.ones(m, m, dtype=torch.bool).triu(1)
        gap = gap.masked_fill(later.view(1, m, m, *[1] * (gap.ndim - 3)), -torch.inf)
        wide = total if total.ndim == 3 else total.unsqueeze(-1)
        factors = gap, wide, wide[:, -1:] - wide, wide[:, -1].unsqueeze(-1)
        return _Factors(*(factor.to(self.dtype).exp() for factor in factors))

    def of(self, start: int, end: int) -> _Factors:
        if self.fixed is None:
            assert self.log_decay is not None
            return self._factors(self.log_decay[:, start:end])
        m = end - start
        inside, query, key, _ = self.fixed
        if m == inside.shape[1]:
            return self.fixed
        # A shorter last chunk: the last m key factors are those of m tokens, the m-th query factor spans it.
        if query is None or key is None:
            return _Factors(inside[:, :m, :m], None, None, None)
        return _Factors(inside[:, :m, :m], query[:, :m], key[:, -m:], query[:, m - 1 :][:, :1])


def _scores(query: Tensor, key: Tensor, inside: Tensor) -> Tensor:
    if inside.ndim == 4:
        return torch.einsum("had,hbd,habd->hab", query, key, inside)
    return torch.bmm(query, key.transpose(1, 2)).mul_(inside)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _merge(x: Tensor, merged: bool) -> Tensor:
    """(batch, heads, ...) to (1, batch * heads, ...) where few heads would leave the batched products too small."""
    return x if not merged else x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:])


def _groups(batch: int, heads: int) -> Iterator[tuple[int, slice]]:
    size = HEADS_PER_THREAD * torch.get_num_threads()
    for b in range(batch):
        for h in range(0, heads, size):
            yield b, slice(h, h + size)


def _few(query: Tensor) -> bool:
    return query.shape[0] > 1 and query.shape[1] < HEADS_PER_THREAD * torch.get_num_threads()


def _state_shape(state: Tensor, batch: int, merged: bool) -> tuple[int, ...]:
    return (1, batch * state.shape[1], *state.shape[2:]) if merged else (batch, *state.shape[1:])


def _rows(log_decay: Tensor | None, batch: int, merged: bool) -> Tensor | None:
    """Log decay with a batch axis, laid out like the merged heads."""
    if log_decay is None:
        return None
    return _merge(log_decay[None].expand(batch, -1) if log_decay.ndim == 1 else log_decay, merged)


@count_inside
@torch.library.custom_op("manyheads::linear_chunked", mutates_args=(), schema=_SCHEMA)
def chunked(query, key, value, log_decay, state, cu_seqlens, scale, chunk, causal, keep):
    """(out, final state, kept states) of linear attention; the arguments are checked by the caller."""
    batch, heads, tokens, head_dim = query.shape
    width, wide = value.shape[-1], accumulation_dtype(query.dtype)
    bounds = sequence_bounds(cu_seqlens, tokens)
    out = torch.empty(batch, heads, tokens, width, dtype=query.dtype, device=query.device)
    final = torch.zeros(batch * len(bounds), heads, head_dim, width, dtype=wide, device=query.device)
    if state is not None:
        final.copy_(state)
    slots = (chunk_slots(tokens, chunk, cu_seqlens) if causal else len(bounds)) if keep else 0
    # Packed sequences may leave slots over: they are zeros, so that equal calls give equal states.
    allocate = torch.empty if cu_seqlens is None else torch.zeros
    states = allocate(slots, batch, heads, head_dim, width, dtype=wide, device=query.device)

    merged = _few(query)
    q, k, v, o = (_merge(x, merged) for x in (query, key, value, out))
    g = _rows(log_decay, batch, merged)
    running = final.view(len(bounds), *_state_shape(final, batch, merged))
    kept = states.view(slots, *running.shape[1:])
    for b, h in _groups(*q.shape[:2]):
        decay = _Decay(None if g is None else g[b, h], chunk, final) if causal else None
        slot = 0
        for n, (start, end) in enumerate(bounds):
            s = running[n, b, h]
            if decay is None:
                s += k[b, h, start:end].to(wide).transpose(1, 2) @ v[b, h, start:end].to(wide)
                o[b, h, start:end] = q[b, h, start:end].to(wide).mul(scale) @ s
                if keep:
                    kept[n, b, h] = s
                continue
            for i in range(start, end, chunk):
                j = min(i + chunk, end)
                f = decay.of(i, j)
                qc, kc, vc = (x[b, h, i:j].to(wide) for x in (q, k, v))
                qc = qc if scale == 1 else qc * scale
                if keep:
                    kept[slot, b, h] = s
                    slot += 1
                part = torch.bmm(_times(qc, f.query), s)
                o[b, h, i:j] = part.baddbmm_(_scores(qc, kc, f.inside), vc)
                if f.state is not None:
                    s *= f.state
                s.baddbmm_(_times(kc, f.key).transpose(1, 2), vc)
    return out, final, states


@chunked.register_fake
def _(query, key, value, log_decay, state, cu_seqlens, scale, chunk, causal, keep):
    batch, heads, tokens, head_dim = query.shape
    wide = accumulation_dtype(query.dtype)
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = (chunk_slots(tokens, chunk, cu_seqlens) if causal else sequences) if keep else 0
    shape = heads, head_dim, value.shape[-1]
    return (
        query.new_empty(batch, heads, tokens, value.shape[-1]),
        query.new_empty(batch * sequences, *shape, dtype=wide),
        query.new_empty(slots, batch, *shape, dtype=wide),
    )


@count_inside
@torch.library.custom_op("manyheads::linear_chunked_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def chunked_backward(
    query, key, value, log_decay, states, cu_seqlens, grad_out, grad_state, scale, chunk, causal
):  # fmt: skip
    """Gradients of query, key, value, log decay (empty unless it depends on tokens) and the initial state."""
    batch, heads, tokens, head_dim = query.shape
    width, wide = value.shape[-1], accumulation_dtype(query.dtype)
    bounds = sequence_bounds(cu_seqlens, tokens)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    per_token = log_decay is not None and log_decay.ndim > 1
    dg = torch.empty(log_decay.shape if log_decay is not None and per_token else (0,), dtype=wide, device=query.device)
    initial = torch.zeros(batch * len(bounds), heads, head_dim, width, dtype=wide, device=query.device)
    if grad_state is not None:
        initial.copy_(grad_state)

    merged = _few(query)
    q, k, v, do, dqm, dkm, dvm = (_merge(x, merged) for x in (query, key, value, grad_out, dq, dk, dv))
    g, dgm = _rows(log_decay, batch, merged), _merge(dg, merged and per_token)
    running = initial.view(len(bounds), *_state_shape(initial, batch, merged))
    kept = states.view(states.shape[0], *running.shape[1:])
    for b, h in _groups(*q.shape[:2]):
        decay = _Decay(None if g is None else g[b, h], chunk, initial) if causal else None
        slot = sum(-(-(end - start) // chunk) for start, end in bounds)
        for n, (start, end) in reversed(list(enumerate(bounds))):
            ds = running[n, b, h]
            if decay is None:
                qs, ks, vs, dos = (x[b, h, start:end].to(wide) for x in (q, k, v, do))
                dqm[b, h, start:end] = (dos @ kept[n, b, h].transpose(1, 2)).mul_(scale)
                ds += (qs * scale).transpose(1, 2) @ dos
                dkm[b, h, start:end] = vs @ ds.transpose(1, 2)
                dvm[b, h, start:end] = ks @ ds
                continue
            for i in reversed(range(start, end, chunk)):
                j = min(i + chunk, end)
                slot -= 1
                f, s = decay.of(i, j), kept[slot, b, h]
                qc, kc, vc, doc = (x[b, h, i:j].to(wide) for x in (q, k, v, do))
                qc = qc if scale == 1 else qc * scale
                past, future = torch.bmm(doc, s.transpose(1, 2)), torch.bmm(vc, ds.transpose(1, 2))
                past, future = _times(past, f.query), _times(future, f.key)
                if per_token:
                    over = (f.state * s * ds).sum(-1) + (kc * future).sum(1)
                gradient_v = torch.bmm(_times(kc, f.key), ds)
                dvm[b, h, i:j] = gradient_v.baddbmm_(_scores(qc, kc, f.inside).transpose(1, 2), doc)
                if f.inside.ndim == 4:
                    pairs = torch.bmm(doc, vc.transpose(1, 2)).unsqueeze(-1) * f.inside
                    past += torch.einsum("habd,hbd->had", pairs, kc)
                    future += torch.einsum("habd,had->hbd", pairs, qc)
                else:
                    pairs = torch.bmm(doc, vc.transpose(1, 2)).mul_(f.inside)
                    past.baddbmm_(pairs, kc)
                    future.baddbmm_(pairs.transpose(1, 2), qc)
                if per_token:
                    # d/dG of token a: what its query reads grows, what its key leaves behind shrinks.
                    slope = qc * past - kc * future
                    slope[:, -1] += over
                    slope = slope if f.inside.ndim == 4 else slope.sum(-1)
                    dgm[b, h, i:j] = slope.flip(1).cumsum(1).flip(1)
                dqm[b, h, i:j] = past if scale == 1 else past.mul_(scale)
                dkm[b, h, i:j] = future
                if f.state is not None:
                    ds *= f.state
                ds.baddbmm_(_times(qc, f.query).transpose(1, 2), doc)
    return dq, dk, dv, dg, initial


@chunked_backward.register_fake
def _(query, key, value, log_decay, states, cu_seqlens, grad_out, grad_state, scale, chunk, causal):
    wide = accumulation_dtype(query.dtype)
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gates = log_decay.shape if log_decay is not None and log_decay.ndim > 1 else (0,)
    return (
        *(x.new_empty(x.shape) for x in (query, key, value)),
        query.new_empty(gates, dtype=wide),
        query.new_empty(query.shape[0] * sequences, *states.shape[2:], dtype=wide),
    )


def _setup(ctx, inputs, output) -> None:
    query, key, value, log_decay, state, cu_seqlens, ctx.scale, ctx.chunk, ctx.causal, _ = inputs
    ctx.save_for_backward(query, key, value, log_decay, output[2], cu_seqlens)
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_state, _grad_states):
    query, key, value, log_decay, states, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    dq, dk, dv, dg, initial = chunked_backward(
        query, key, value, log_decay, states, cu_seqlens, grad_out, grad_state, ctx.scale, ctx.chunk, ctx.causal
    )
    dg = dg.to(log_decay.dtype) if log_decay is not None and log_decay.ndim > 1 else None
    return dq, dk, dv, dg, initial if ctx.has_state else None, None, None, None, None, None


chunked.register_autograd(_backward, setup_context=_setup)
