"""Triton kernels of causal linear attention with decay per head or per token: forward and backward in three phases.

For chunks c of up to CHUNK tokens, with G the running log decay inside a chunk (see
:mod:`manyheads.engines.linear_chunked` for the equations)::

    1. all chunks at once    U_c = (diag(exp(G_last - G)) K)^T V
    2. scan over the chunks  S_c = state before c:  S_{c+1} = exp(G_last) S_c + U_c
    3. all chunks at once    out = ((Q K^T) * D) V + diag(exp(G)) Q S_c

The backward runs phases 1 and 2 for the gradient of the state, in reverse, and one kernel for all gradients of a chunk.
Only the scan is sequential, and it moves head_dim x value_dim floats a chunk; the official kernel walks all tokens in
one program per 32 value channels. Chunk states are float32. bfloat16 inputs multiply in bfloat16; float32 and float16
in TF32 products (three for float32), because unnormalised scores leave float16's range.

Decays per token come as running sums in float64: their differences stay exact over any length.
Source: "Lightning Attention-2", arXiv 2401.04658; three phases: "Various Lengths, Constant Speed", arXiv 2405.17381.
"""

from __future__ import annotations

import os
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.engines.linear_chunked import CLOSED, chunk_slots

# no_type_check: run-time shape checks would wrap a kernel and hide the helpers that it calls from the interpreter.
NO_DECAY, PER_HEAD, PER_TOKEN = 0, 1, 2


@triton.jit
@no_type_check
def _decay(decay_ptr, row, start, tokens, index, length, DECAY: tl.constexpr):
    """Running log decay from the start of the chunk through each of its tokens, and through its last."""
    if DECAY == 2:
        sums = decay_ptr + row * tokens
        before = tl.load(sums + start - 1, mask=start > 0, other=0.0)
        within = tl.load(sums + start + index, mask=index < length, other=0.0) - before
        across = tl.load(sums + start + length - 1, mask=length > 0, other=0.0) - before
    elif DECAY == 1:
        rate = tl.load(decay_ptr + row)
        within = rate * (index + 1)
        across = rate * length
    else:
        within = index * 0.0
        across = 0.0
    return within, across


@triton.jit
@no_type_check
def _inside(within, index, length, DECAY: tl.constexpr):
    """D[a, b]: weight of token b in what token a reads of its own chunk."""
    earlier = (index[:, None] >= index[None, :]) & (index[:, None] < length)
    if DECAY == 0:
        return tl.where(earlier, 1.0, 0.0)
    gap = tl.where(earlier, within[:, None] - within[None, :], 0.0).to(tl.float32)
    return tl.where(earlier, tl.exp(gap), 0.0)


@triton.jit
@no_type_check
def _tile(ptr, rows, columns, row_count, column_count):
    """A (rows, columns) tile of a contiguous matrix, zeros outside of it."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(ptr + rows[:, None] * column_count + columns[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _put(ptr, rows, columns, row_count, column_count, values):
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    tl.store(ptr + rows[:, None] * column_count + columns[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def chunk_state_kernel(
    x_ptr, y_ptr, decay_ptr, starts_ptr, lengths_ptr, states_ptr, scale, rows, tokens, head_dim, width,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Phase 1: what a chunk adds to the state (keys, values) or, REVERSE, to its gradient (queries, grad_out)."""
    slot, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = (tl.program_id(2) % tl.cdiv(head_dim, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)
    e = (tl.program_id(2) // tl.cdiv(head_dim, BLOCK_D)) * BLOCK_E + tl.arange(0, BLOCK_E)
    start, length = tl.load(starts_ptr + slot), tl.load(lengths_ptr + slot)
    index = tl.arange(0, CHUNK)
    within, across = _decay(decay_ptr, row, start, tokens, index, length, DECAY)
    x = _tile(x_ptr + (row * tokens + start) * head_dim, index, d, length, head_dim).to(tl.float32)
    y = _tile(y_ptr + (row * tokens + start) * width, index, e, length, width)
    if DECAY != 0:
        reach = within if REVERSE else across - within
        x = x * tl.exp(tl.where(index < length, reach, 0.0).to(tl.float32))[:, None]
    added = tl.dot(tl.trans((x * scale).to(DOT)), y.to(DOT), input_precision=PRECISION)
    _put(states_ptr + (slot * rows + row) * head_dim * width, d, e, head_dim, width, added)


@triton.jit
@no_type_check
def scan_kernel(
    states_ptr, final_ptr, decay_ptr, starts_ptr, lengths_ptr, borders_ptr, rows, tokens, size,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 2: replace what each chunk adds by the state before it (REVERSE: by the gradient of the state after it).

    ``final_ptr`` holds the initial state and receives the final one (REVERSE: the gradients of both, other way round).
    """
    row, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cell = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(borders_ptr + sequence), tl.load(borders_ptr + sequence + 1)
    end_ptr = final_ptr + (sequence * rows + row) * size + cell
    state = tl.load(end_ptr, mask=cell < size, other=0.0)
    for step in range(0, last - first):
        slot = first + step
        if REVERSE:
            slot = last - 1 - step
        start, length = tl.load(starts_ptr + slot), tl.load(lengths_ptr + slot)
        here = states_ptr + (slot * rows + row) * size + cell
        added = tl.load(here, mask=cell < size, other=0.0)
        tl.store(here, state, mask=cell < size)
        if DECAY == 2:
            before = tl.load(decay_ptr + row * tokens + start - 1, mask=start > 0, other=0.0)
            across = tl.load(decay_ptr + row * tokens + start + length - 1, mask=length > 0, other=0.0) - before
            state = state * tl.exp(across.to(tl.float32)) + added
        elif DECAY == 1:
            state = state * tl.exp(tl.load(decay_ptr + row) * length) + added
        else:
            state = state + added
    tl.store(end_ptr, state, mask=cell < size)


@triton.jit
@no_type_check
def output_kernel(
    q_ptr, k_ptr, v_ptr, decay_ptr, starts_ptr, lengths_ptr, states_ptr, out_ptr, scale, rows, tokens, head_dim, width,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Phase 3: the outputs of one chunk, BLOCK_E value channels of them."""
    slot, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    start, length = tl.load(starts_ptr + slot), tl.load(lengths_ptr + slot)
    index = tl.arange(0, CHUNK)
    within, _ = _decay(decay_ptr, row, start, tokens, index, length, DECAY)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    past = tl.zeros((CHUNK, BLOCK_E), tl.float32)
    at = row * tokens + start
    for low in range(0, head_dim, BLOCK_D):
        d = low + tl.arange(0, BLOCK_D)
        q = _tile(q_ptr + at * head_dim, index, d, length, head_dim).to(DOT)
        k = _tile(k_ptr + at * head_dim, index, d, length, head_dim).to(DOT)
        s = _tile(states_ptr + (slot * rows + row) * head_dim * width, d, e, head_dim, width)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        past = tl.dot(q, s.to(DOT), past, input_precision=PRECISION)
    if DECAY != 0:
        past = past * tl.exp(tl.where(index < length, within, 0.0).to(tl.float32))[:, None]
    scores = scores * _inside(within, index, length, DECAY)
    v = _tile(v_ptr + at * width, index, e, length, width)
    out = tl.dot(scores.to(DOT), v.to(DOT), past, input_precision=PRECISION) * scale
    _put(out_ptr + at * width, index, e, length, width, out)


@triton.jit
@no_type_check
def gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, starts_ptr, lengths_ptr, states_ptr, dstates_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, scale, rows, tokens, head_dim, width,
    DECAY: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk; BLOCK_D covers head_dim, value channels are walked BLOCK_E at a time."""
    slot, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = tl.load(starts_ptr + slot), tl.load(lengths_ptr + slot)
    index, d = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    within, across = _decay(decay_ptr, row, start, tokens, index, length, DECAY)
    inside = _inside(within, index, length, DECAY)
    to_query = tl.where(index < length, 1.0, 0.0)
    to_key = to_query
    if DECAY != 0:
        to_query = to_query * tl.exp(tl.where(index < length, within, 0.0).to(tl.float32))
        to_key = to_key * tl.exp(tl.where(index < length, across - within, 0.0).to(tl.float32))
    at, corner = row * tokens + start, (slot * rows + row) * head_dim * width
    q = _tile(q_ptr + at * head_dim, index, d, length, head_dim)
    k = _tile(k_ptr + at * head_dim, index, d, length, head_dim)
    scores = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision=PRECISION) * inside * scale
    pairs = tl.zeros((CHUNK, CHUNK), tl.float32)
    dq = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    dk = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    carried = tl.zeros((BLOCK_D,), tl.float32)
    for low in range(0, width, BLOCK_E):
        e = low + tl.arange(0, BLOCK_E)
        v = _tile(v_ptr + at * width, index, e, length, width).to(DOT)
        do = _tile(do_ptr + at * width, index, e, length, width).to(DOT)
        s = _tile(states_ptr + corner, d, e, head_dim, width)
        ds = _tile(dstates_ptr + corner, d, e, head_dim, width)
        if DECAY == 2:
            carried += tl.sum(s * ds, axis=1)
        pairs = tl.dot(do, tl.trans(v), pairs, input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(s.to(DOT)), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(ds.to(DOT)), dk, input_precision=PRECISION)
        dv = tl.dot(k.to(DOT), ds.to(DOT), input_precision=PRECISION) * to_key[:, None]
        dv = tl.dot(tl.trans(scores.to(DOT)), do, dv, input_precision=PRECISION)
        _put(dv_ptr + at * width, index, e, length, width, dv)
    dq = dq * to_query[:, None] * scale
    dk = dk * to_key[:, None]
    if DECAY == 2:
        over = tl.sum(carried) * tl.exp(across.to(tl.float32)) + tl.sum(dk * k.to(tl.float32))
    pairs = (pairs * inside * scale).to(DOT)
    dq = tl.dot(pairs, k.to(DOT), dq, input_precision=PRECISION)
    dk = tl.dot(tl.trans(pairs), q.to(DOT), dk, input_precision=PRECISION)
    _put(dq_ptr + at * head_dim, index, d, length, head_dim, dq)
    _put(dk_ptr + at * head_dim, index, d, length, head_dim, dk)
    if DECAY == 2:
        slope = tl.sum(dq * q.to(tl.float32), axis=1) - tl.sum(dk * k.to(tl.float32), axis=1)
        slope = tl.where(index == length - 1, slope + over, slope)
        tl.store(dg_ptr + at + index, tl.cumsum(slope, axis=0, reverse=True), mask=index < length)


_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? log_decay, Tensor? state, Tensor? cu_seqlens,"
    " float scale, int chunk, bool keep) -> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? log_decay, Tensor states, Tensor? cu_seqlens,"
    " Tensor grad_out, Tensor? grad_state, float scale, int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _table(tokens: int, chunk: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(start, length) of every chunk and the first chunk of every sequence, without reading a value back."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, tokens], device=device)
    cu_seqlens = cu_seqlens.to(device=device, dtype=torch.int64)
    counts = (cu_seqlens.diff() + chunk - 1) // chunk
    borders = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    slots = torch.arange(chunk_slots(tokens, chunk, cu_seqlens), device=device)
    sequence = torch.searchsorted(borders, slots, right=True).sub(1).clamp(max=len(counts) - 1)
    starts = cu_seqlens[sequence] + (slots - borders[sequence]) * chunk
    # Slots beyond the last chunk get length 0: their programs load and store nothing outside their own slot.
    lengths = (cu_seqlens[sequence + 1] - starts).clamp(0, chunk)
    return tuple(x.to(torch.int32) for x in (starts, lengths, borders))  # pyright: ignore[reportReturnType]


def _decay_input(log_decay: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    if log_decay is None:
        return like, NO_DECAY
    clamped = log_decay.clamp(min=CLOSED)
    if log_decay.ndim == 1:
        return clamped.to(torch.float32).repeat(like.shape[0]), PER_HEAD
    return clamped.to(torch.float64).cumsum(dim=-1).contiguous(), PER_TOKEN


def _dots(dtype: torch.dtype, hip: bool) -> dict:
    # Triton's interpreter multiplies the bit patterns of bfloat16: there, products are float32.
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1":
        return dict(DOT=tl.bfloat16, PRECISION="tf32")
    exact = dtype == torch.float16
    return dict(DOT=tl.float32, PRECISION="ieee" if hip else "tf32" if exact else "tf32x3")


def _blocks(head_dim: int, width: int) -> tuple[int, int]:
    return max(16, triton.next_power_of_2(head_dim)), 16 if width <= 16 else 32 if width <= 32 else 64


def _output_tile(dtype: torch.dtype, block_e: int) -> dict:
    # float32 products are three tf32 products each: narrower tiles over more warps keep them in registers.
    return dict(BLOCK_E=min(block_e, 16), num_warps=8) if dtype == torch.float32 else dict(BLOCK_E=block_e, num_warps=4)


def _states(x, y, decay, mode, table, final, scale, chunk, reverse) -> Tensor:
    """Phases 1 and 2; ``final`` is changed in place."""
    starts, lengths, borders = table
    batch, heads, tokens, head_dim = x.shape
    width, rows = y.shape[-1], batch * heads
    block_d, block_e = _blocks(head_dim, width)
    block_d = min(block_d, 64)
    states = torch.empty(len(starts), batch, heads, head_dim, width, dtype=torch.float32, device=x.device)
    if states.numel() == 0:
        return states
    tiles = triton.cdiv(head_dim, block_d) * triton.cdiv(width, block_e)
    options = dict(DECAY=mode, REVERSE=reverse)
    chunk_state_kernel[(len(starts), rows, tiles)](
        x, y, decay, starts, lengths, states, scale, rows, tokens, head_dim, width,
        **options, CHUNK=chunk, BLOCK_D=block_d, BLOCK_E=block_e, **_dots(x.dtype, torch.version.hip is not None),
    )  # fmt: skip
    size = head_dim * width
    scan_kernel[(rows, len(borders) - 1, triton.cdiv(size, 1024))](
        states, final, decay, starts, lengths, borders, rows, tokens, size, **options, BLOCK=1024
    )
    return states


@torch.library.custom_op("manyheads::linear_triton", mutates_args=(), schema=_SCHEMA)
def chunked_triton(query, key, value, log_decay, state, cu_seqlens, scale, chunk, keep):
    """(out, final state, kept states) like :func:`manyheads.engines.linear_chunked.chunked`, on the GPU."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, heads, tokens, head_dim = query.shape
    width = value.shape[-1]
    decay, mode = _decay_input(log_decay, query)
    table = _table(tokens, chunk, cu_seqlens, query.device)
    sequences = batch * (len(table[2]) - 1)
    final = torch.zeros(sequences, heads, head_dim, width, dtype=torch.float32, device=query.device)
    if state is not None:
        final.copy_(state)
    states = _states(key, value, decay, mode, table, final, 1.0, chunk, False)
    out = torch.empty(batch, heads, tokens, width, dtype=query.dtype, device=query.device)
    if out.numel() > 0 and states.numel() > 0:
        block_d, block_e = _blocks(head_dim, width)
        tile = _output_tile(query.dtype, block_e)
        output_kernel[(len(table[0]), batch * heads, triton.cdiv(width, tile["BLOCK_E"]))](
            query, key, value, decay, *table[:2], states, out, scale, batch * heads, tokens, head_dim, width,
            DECAY=mode, CHUNK=chunk, BLOCK_D=min(block_d, 64), **tile,
            **_dots(query.dtype, torch.version.hip is not None),
        )  # fmt: skip
    return out, final, states if keep else states.new_empty(0, *states.shape[1:])


@chunked_triton.register_fake
def _(query, key, value, log_decay, state, cu_seqlens, scale, chunk, keep):
    batch, heads, tokens, head_dim = query.shape
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = heads, head_dim, value.shape[-1]
    return (
        query.new_empty(batch, heads, tokens, value.shape[-1]),
        query.new_empty(batch * sequences, *shape, dtype=torch.float32),
        query.new_empty(chunk_slots(tokens, chunk, cu_seqlens) if keep else 0, batch, *shape, dtype=torch.float32),
    )


@torch.library.custom_op("manyheads::linear_triton_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def chunked_triton_backward(
    query, key, value, log_decay, states, cu_seqlens, grad_out, grad_state, scale, chunk
):  # fmt: skip
    """Gradients of query, key, value, log decay (empty unless per token) and the initial state."""
    query, key, value, grad_out = (x.contiguous() for x in (query, key, value, grad_out))
    batch, heads, tokens, head_dim = query.shape
    width, rows = value.shape[-1], batch * heads
    decay, mode = _decay_input(log_decay, query)
    table = _table(tokens, chunk, cu_seqlens, query.device)
    sequences = batch * (len(table[2]) - 1)
    initial = torch.zeros(sequences, heads, head_dim, width, dtype=torch.float32, device=query.device)
    if grad_state is not None:
        initial.copy_(grad_state)
    gradients = _states(query, grad_out, decay, mode, table, initial, scale, chunk, True)
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
    gates = log_decay.shape if log_decay is not None and mode == PER_TOKEN else (0,)
    dg = torch.empty(gates, dtype=torch.float32, device=query.device)
    if gradients.numel() > 0:
        block_d, block_e = _blocks(head_dim, width)
        launch: Any = gradient_kernel[(len(table[0]), rows)]
        launch(
            query, key, value, grad_out, decay, *table[:2], states, gradients, dq, dk, dv, dg,
            scale, rows, tokens, head_dim, width,
            DECAY=mode, CHUNK=chunk, BLOCK_D=block_d, BLOCK_E=min(block_e, 32),
            **_dots(query.dtype, torch.version.hip is not None), num_warps=8,
        )  # fmt: skip
    return dq, dk, dv, dg, initial


@chunked_triton_backward.register_fake
def _(query, key, value, log_decay, states, cu_seqlens, grad_out, grad_state, scale, chunk):
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    gates = log_decay.shape if log_decay is not None and log_decay.ndim > 1 else (0,)
    return (
        *(x.new_empty(x.shape) for x in (query, key, value)),
        query.new_empty(gates, dtype=torch.float32),
        query.new_empty(query.shape[0] * sequences, *states.shape[2:], dtype=torch.float32),
    )


def _setup(ctx, inputs, output) -> None:
    query, key, value, log_decay, state, cu_seqlens, ctx.scale, ctx.chunk, _ = inputs
    ctx.save_for_backward(query, key, value, log_decay, output[2], cu_seqlens)
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_state, _grad_states):
    query, key, value, log_decay, states, cu_seqlens = ctx.saved_tensors
    if grad_out is None:
        grad_out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    dq, dk, dv, dg, initial = chunked_triton_backward(
        query, key, value, log_decay, states, cu_seqlens, grad_out, grad_state, ctx.scale, ctx.chunk
    )
    dg = dg.to(log_decay.dtype) if log_decay is not None and log_decay.ndim > 1 else None
    return dq, dk, dv, dg, initial if ctx.has_state else None, None, None, None, None


chunked_triton.register_autograd(_backward, setup_context=_setup)


def _cases() -> list[dict]:
    table = dict(starts_ptr="*i32", lengths_ptr="*i32")
    states = dict(states_ptr="*fp32", scale="fp32")
    sizes = dict(rows="i32", tokens="i32", head_dim="i32", width="i32")
    divisible = tuple(sizes)
    cases = []
    for element, dots in (("bf16", _dots(torch.bfloat16, False)), ("fp32", _dots(torch.float32, False))):
        for mode, decay in ((NO_DECAY, f"*{element}"), (PER_HEAD, "*fp32"), (PER_TOKEN, "*fp64")):
            x = f"*{element}"
            tile = _output_tile(torch.float32 if element == "fp32" else torch.bfloat16, 64)
            common = dict(DECAY=mode, CHUNK=64, BLOCK_D=64, BLOCK_E=64, **dots)
            cases += [
                dict(
                    fn=chunk_state_kernel,
                    signature=dict(x_ptr=x, y_ptr=x, decay_ptr=decay, **table, **states, **sizes),
                    constexprs=dict(common, REVERSE=False),
                ),
                dict(
                    fn=output_kernel,
                    signature=dict(
                        q_ptr=x, k_ptr=x, v_ptr=x, decay_ptr=decay, **table, states_ptr="*fp32", out_ptr=x,
                        scale="fp32", **sizes,
                    ),
                    constexprs=dict(common, BLOCK_E=tile["BLOCK_E"]),
                    num_warps=tile["num_warps"],
                ),
                dict(
                    fn=gradient_kernel,
                    signature=dict(
                        q_ptr=x, k_ptr=x, v_ptr=x, do_ptr=x, decay_ptr=decay, **table, states_ptr="*fp32",
                        dstates_ptr="*fp32", dq_ptr=x, dk_ptr=x, dv_ptr=x, dg_ptr="*fp32", scale="fp32", **sizes,
                    ),
                    constexprs=dict(common, BLOCK_D=64, BLOCK_E=32),
                    num_warps=8,
                ),
            ]  # fmt: skip
            if element == "bf16":
                signature = dict(states_ptr="*fp32", final_ptr="*fp32", decay_ptr=decay, **table, borders_ptr="*i32")
                signature |= dict(rows="i32", tokens="i32", size="i32")
                cases.append(
                    dict(fn=scan_kernel, signature=signature, constexprs=dict(DECAY=mode, REVERSE=True, BLOCK=1024))
                )
    return [dict(dict(num_warps=4), **case, num_stages=2, divisible=divisible) for case in cases]


# What a test compiles ahead of time: every kernel with the tiles of head_dim 64.
AOT_CASES = _cases()
