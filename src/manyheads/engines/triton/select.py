"""Triton kernels of ``select_attention``: rows are gathered by pointer inside the kernel, never copied to a buffer.

One program computes one query of one list: all heads that share the list (a key/value head's group) are the rows of its
products, so each selected key and value is read once. A long list of a short query (decoding) is cut into parts, each
with its own program, and the parts are merged by their log-sum-exp. The backward recomputes the weights from the saved
lse; keys and values receive their gradients by atomic additions in float32, so their last bits vary between runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manyheads.engines.merge import merge

PROGRAMS = 256  # about two for each multiprocessor of an H100: below that, long lists are cut
SHORTEST_PART = 256


@triton.jit
def _forward_kernel(
    query, key, value, index, bias, out, lse,
    scale, queries, keys, selected, part,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, i_b, i_h, i_n, b_b, b_h, b_n, b_k,
    LISTS: tl.constexpr, SHARED: tl.constexpr, LISTS_PER_KV: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VALUE_COLS: tl.constexpr,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """out (parts, batch, heads, queries, value_dim) and lse (parts, batch, heads, queries), both contiguous."""
    n = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // LISTS).to(tl.int64)
    this_list = (tl.program_id(1) % LISTS).to(tl.int64)
    cut = tl.program_id(2).to(tl.int64)
    heads = LISTS * SHARED
    row = tl.arange(0, ROWS)
    head = this_list * SHARED + row
    col, value_col = tl.arange(0, COLS), tl.arange(0, VALUE_COLS)
    real = row < SHARED

    q_at = query + batch * q_b + head[:, None] * q_h + n * q_n + col[None, :]
    q = tl.load(q_at, mask=real[:, None] & (col < WIDTH)[None, :], other=0.0)
    k_base = key + batch * k_b + (this_list // LISTS_PER_KV) * k_h
    v_base = value + batch * v_b + (this_list // LISTS_PER_KV) * v_h
    i_base = index + batch * i_b + this_list * i_h + n * i_n

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_COLS], tl.float32)
    end = tl.minimum((cut + 1) * part, selected)
    for start in range(cut * part, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        at = tl.load(i_base + entry, mask=entry < end, other=-1)
        seen = (at >= 0) & (at < keys)
        at = tl.where(seen, at, 0)
        k = tl.load(k_base + at[:, None] * k_n + col[None, :], mask=seen[:, None] & (col < WIDTH)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if BIASED:
            b_at = bias + batch * b_b + head[:, None] * b_h + n * b_n + entry[None, :] * b_k
            scores += tl.load(b_at, mask=real[:, None] & seen[None, :], other=0.0).to(tl.float32)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(peak - shift)
        v_mask = seen[:, None] & (value_col < VALUE_WIDTH)[None, :]
        v = tl.load(v_base + at[:, None] * v_n + value_col[None, :], mask=v_mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    o_row = ((cut * tl.num_programs(1) // LISTS + batch) * heads + head) * queries + n
    o_at = out + o_row[:, None] * VALUE_WIDTH + value_col[None, :]
    o_mask = real[:, None] & (value_col < VALUE_WIDTH)[None, :]
    tl.store(o_at, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=o_mask)
    tl.store(lse + o_row, tl.where(empty, float("-inf"), peak + tl.log(divisor)), mask=real)


@triton.jit
def _backward_kernel(
    query, key, value, index, bias, grad, lse, delta, d_query, d_key, d_value, d_scores,
    scale, queries, keys, selected,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, i_b, i_h, i_n, b_b, b_h, b_n, b_k,
    LISTS: tl.constexpr, SHARED: tl.constexpr, LISTS_PER_KV: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, VALUE_COLS: tl.constexpr,
    BLOCK: tl.constexpr, BIASED: tl.constexpr, BIAS_GRAD: tl.constexpr,
):  # fmt: skip
    """grad, lse, delta, d_query, d_key, d_value, d_scores contiguous in (batch, heads, tokens, width) order."""
    n = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(1) // LISTS).to(tl.int64)
    this_list = (tl.program_id(1) % LISTS).to(tl.int64)
    kv_head = this_list // LISTS_PER_KV
    row = tl.arange(0, ROWS)
    head = this_list * SHARED + row
    col, value_col = tl.arange(0, COLS), tl.arange(0, VALUE_COLS)
    real = row < SHARED
    line = (batch * (LISTS * SHARED) + head) * queries + n

    q_mask = real[:, None] & (col < WIDTH)[None, :]
    q = tl.load(query + batch * q_b + head[:, None] * q_h + n * q_n + col[None, :], mask=q_mask, other=0.0)
    g_mask = real[:, None] & (value_col < VALUE_WIDTH)[None, :]
    g = tl.load(grad + line[:, None] * VALUE_WIDTH + value_col[None, :], mask=g_mask, other=0.0)
    log = tl.load(lse + line, mask=real, other=float("-inf"))
    log = tl.where(log == float("-inf"), float("inf"), log)
    shift = tl.load(delta + line, mask=real, other=0.0)
    i_base = index + batch * i_b + this_list * i_h + n * i_n
    kv_line = (batch * (LISTS // LISTS_PER_KV) + kv_head) * keys

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, selected, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        at = tl.load(i_base + entry, mask=entry < selected, other=-1)
        seen = (at >= 0) & (at < keys)
        at = tl.where(seen, at, 0)
        k_mask = seen[:, None] & (col < WIDTH)[None, :]
        v_mask = seen[:, None] & (value_col < VALUE_WIDTH)[None, :]
        k = tl.load(key + batch * k_b + kv_head * k_h + at[:, None] * k_n + col[None, :], mask=k_mask, other=0.0)
        v_at = value + batch * v_b + kv_head * v_h + at[:, None] * v_n + value_col[None, :]
        v = tl.load(v_at, mask=v_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        pair = real[:, None] & seen[None, :]
        if BIASED:
            b_at = bias + batch * b_b + head[:, None] * b_h + n * b_n + entry[None, :] * b_k
            scores += tl.load(b_at, mask=pair, other=0.0).to(tl.float32)
        weights = tl.where(pair, tl.exp(scores - log[:, None]), 0.0)
        d_pairs = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - shift[:, None])
        if BIAS_GRAD:
            tl.store(d_scores + line[:, None] * selected + entry[None, :], d_pairs, mask=pair)
        acc += tl.dot(d_pairs.to(k.dtype), k, input_precision="ieee")
        part_k = tl.dot(tl.trans(d_pairs).to(q.dtype), q, input_precision="ieee") * scale
        tl.atomic_add(d_key + (kv_line + at)[:, None] * WIDTH + col[None, :], part_k, mask=k_mask, sem="relaxed")
        part_v = tl.dot(tl.trans(weights).to(g.dtype), g, input_precision="ieee")
        v_to = d_value + (kv_line + at)[:, None] * VALUE_WIDTH + value_col[None, :]
        tl.atomic_add(v_to, part_v, mask=v_mask, sem="relaxed")
    tl.store(d_query + line[:, None] * WIDTH + col[None, :], (acc * scale).to(d_query.dtype.element_ty), mask=q_mask)


def _tile_options(query: Tensor, value: Tensor, lists: int, *, backward: bool) -> dict:
    """Sizes of a program's tile: powers of two, at least the 16 rows of a tensor core's product."""
    shared = query.shape[1] // lists
    cols, value_cols = (max(16, triton.next_power_of_2(t.shape[-1])) for t in (query, value))
    wide, single = max(cols, value_cols) > 64, query.dtype == torch.float32
    block = 32 if backward or max(cols, value_cols) > 128 or single else 64
    block = 16 if backward and single and wide else block  # 32 would spill registers
    return {
        "LISTS": lists, "SHARED": shared, "WIDTH": query.shape[-1], "VALUE_WIDTH": value.shape[-1],
        "ROWS": max(16, triton.next_power_of_2(shared)), "COLS": cols, "VALUE_COLS": value_cols,
        "BLOCK": block, "num_warps": 4, "num_stages": 1 if backward else 2,
    }  # fmt: skip


def _launchable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; on CPU bfloat16 becomes float32, whose bits Triton's interpreter does not multiply as integers."""
    return tuple(t.float() if t.dtype == torch.bfloat16 and not t.is_cuda else t for t in tensors)


def _inputs(query: Tensor, key: Tensor, value: Tensor, index: Tensor, bias: Tensor | None):
    """Tensors whose last axis is dense, the index and bias expanded by strides alone, and all strides."""
    heads, kv_heads = query.shape[1], key.shape[1]
    lists = heads if index.shape[1] == heads else kv_heads
    query, key, value, index = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, index))
    index = index.expand(-1, lists, -1, -1)
    wide_bias = bias if bias is None else bias.expand(query.shape[0], heads, query.shape[2], index.shape[3])
    strides = [step for t in (query, key, value, index) for step in t.stride()[:3]]
    strides += [0] * 4 if wide_bias is None else wide_bias.stride()
    return lists, (query, key, value, index, query if wide_bias is None else wide_bias), strides


_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor index, Tensor? bias, float scale) -> (Tensor, Tensor)"


@torch.library.custom_op("manyheads::select_triton_forward", mutates_args=(), schema=_SCHEMA)
def select_triton(query, key, value, index, bias, scale):
    """Output (batch, heads, queries, value_dim) and lse (batch, heads, queries) of ``select_attention``."""
    batch, heads, queries, _ = query.shape
    selected = index.shape[3]
    if query.numel() == 0 or selected == 0 or key.shape[2] == 0:
        lse = query.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)
        return query.new_zeros(batch, heads, queries, value.shape[-1]), lse
    dtype = query.dtype
    query, key, value = _launchable(query, key, value)
    lists, tensors, strides = _inputs(query, key, value, index, bias)
    parts = max(1, min(PROGRAMS // (batch * lists * queries), selected // SHORTEST_PART))
    part = -(-selected // parts)
    part_dtype = query.dtype if parts == 1 else torch.float32
    out = query.new_empty(parts, batch, heads, queries, value.shape[-1], dtype=part_dtype)
    lse = query.new_empty(parts, batch, heads, queries, dtype=torch.float32)
    launch: Any = _forward_kernel[(queries, batch * lists, parts)]
    launch(
        *tensors, out, lse, scale, queries, key.shape[2], selected, part, *strides,
        LISTS_PER_KV=lists // key.shape[1], BIASED=bias is not None,
        **_tile_options(query, value, lists, backward=False),
    )  # fmt: skip
    if parts == 1:
        return out[0].to(dtype), lse[0]
    merged, lse = merge(out.unbind(0), lse.unbind(0))
    return merged.to(dtype), lse


@select_triton.register_fake
def _(query, key, value, index, bias, scale):
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


_SCHEMA = (
    "(Tensor grad, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor index, Tensor? bias, Tensor out,"
    " Tensor lse, float scale, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("manyheads::select_triton_backward", mutates_args=(), schema=_SCHEMA)
def select_triton_backward(grad, grad_lse, query, key, value, index, bias, out, lse, scale, bias_grad):
    """Gradients of query, key, value and bias (empty where it is not asked for)."""
    batch, heads, queries, _ = query.shape
    selected, dtype = index.shape[3], query.dtype
    query, key, value, grad, out = _launchable(query, key, value, grad, out)
    d_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    d_bias = query.new_zeros(bias.shape if bias_grad else (0,), dtype=torch.float32 if bias is None else bias.dtype)
    if query.numel() and selected and key.shape[2]:
        lists, tensors, strides = _inputs(query, key, value, index, bias)
        delta = (grad.float() * out.float()).sum(-1) - grad_lse.masked_fill(lse == -torch.inf, 0)
        d_scores = query.new_zeros((batch, heads, queries, selected) if bias_grad else (1,), dtype=torch.float32)
        launch: Any = _backward_kernel[(queries, batch * lists)]
        launch(
            *tensors, grad.contiguous(), lse.contiguous(), delta.contiguous(), d_query, d_key, d_value, d_scores,
            scale, queries, key.shape[2], selected, *strides, LISTS_PER_KV=lists // key.shape[1],
            BIASED=bias is not None, BIAS_GRAD=bias_grad, **_tile_options(query, value, lists, backward=True),
        )  # fmt: skip
        if bias_grad:
            d_bias = d_scores.sum_to_size(d_bias.shape).to(d_bias.dtype)
    return d_query.to(dtype), d_key.to(dtype), d_value.to(dtype), d_bias


@select_triton_backward.register_fake
def _(grad, grad_lse, query, key, value, index, bias, out, lse, scale, bias_grad):
    d_bias = query.new_empty((0,), dtype=torch.float32 if bias is None else bias.dtype)
    d_bias = d_bias.new_empty(bias.shape) if bias is not None and bias_grad else d_bias
    return *(t.new_empty(t.shape) for t in (query, key, value)), d_bias


def _save(ctx, inputs, output) -> None:
    query, key, value, index, bias, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, index, bias, *output)


def _backward(ctx, grad, grad_lse):
    bias_grad = ctx.saved_tensors[4] is not None and ctx.needs_input_grad[4]
    grads = select_triton_backward(grad, grad_lse, *ctx.saved_tensors, ctx.scale, bias_grad)
    return *grads[:3], None, grads[3] if bias_grad else None, None


select_triton.register_autograd(_backward, setup_context=_save)


def _aot_case(backward: bool, dtype: str, width: int, shared: int, biased: bool) -> dict:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    tensor = torch.empty(1, shared, 1, width, dtype=torch_dtype, device="meta")
    constexprs = {"LISTS": 1, "LISTS_PER_KV": 1, "BIASED": biased} | _tile_options(tensor, tensor, 1, backward=backward)
    warps, stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
    names = ["query", "key", "value", "index", "bias"]
    names += ["grad", "lse", "delta", "d_query", "d_key", "d_value", "d_scores"] if backward else ["out", "lse"]
    single = ("lse", "delta", "d_key", "d_value", "d_scores")
    types = {name: "*i64" if name == "index" else "*fp32" if name in single else f"*{dtype}" for name in names}
    scalars = ["queries", "keys", "selected"] + ([] if backward else ["part"])
    steps = [f"{t}_{axis}" for t in "qkvi" for axis in "bhn"] + [f"b_{axis}" for axis in "bhnk"]
    if backward:
        constexprs["BIAS_GRAD"] = biased
    return {
        "fn": _backward_kernel if backward else _forward_kernel,
        "signature": types | {"scale": "fp32"} | dict.fromkeys(scalars + steps, "i32"),
        "constexprs": constexprs,
        "divisible": [step for step in steps if step[0] in "qkv"],
        "num_warps": warps,
        "num_stages": stages,
    }


AOT_CASES = [
    _aot_case(backward, dtype, width, shared, biased)
    for backward in (False, True)
    for dtype, width, shared, biased in (
        ("bf16", 64, 1, False), ("bf16", 64, 3, True), ("bf16", 128, 4, False), ("fp16", 128, 8, True),
        ("bf16", 256, 4, False), ("fp32", 64, 4, True), ("fp32", 128, 4, False),
    )
]  # fmt: skip
