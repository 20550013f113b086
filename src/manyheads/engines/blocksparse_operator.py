"""The tiles of block-sparse attention as one differentiable operator, eager and inside torch.compile.

Eager, a ``Problem`` travels through autograd as it is. A compiled graph holds tensors only: there the predicate and the
bias are evaluated over the pairs that the plan lists, which is memory of (queries x keys read) for each distinct head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from manyheads.engines import blocksparse_tiles as tiles
from manyheads.engines.blocksparse_plan import BlockPlan, TableBias
from manyheads.engines.blocksparse_scores import Problem
from manyheads.engines.common import accumulation_dtype
from manyheads.engines.counting import count_inside


def tiled(query, key, value, plan, predicate, bias, scale) -> tuple[Tensor, Tensor]:
    """(out, lse) of arguments that the caller has checked; gradients for query, key, value, bias and its table."""
    table = bias if isinstance(bias, TableBias) else None
    dense = bias if isinstance(bias, Tensor) else None
    if dense is not None:
        dense = dense[(None,) * (4 - dense.ndim)]
    if torch.compiler.is_compiling():
        return _traced(query, key, value, plan, predicate, dense, table, scale)
    (batch, heads, queries, _), (key_heads, keys) = query.shape, key.shape[1:3]
    wide = accumulation_dtype(query.dtype)
    problem = Problem(plan, batch, heads, key_heads, queries, keys, scale, wide, predicate, dense, table)
    return _Tiles.apply(query, key, value, dense, None if table is None else table.table, problem)


def run(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Forward of a problem without autograd: (out, lse)."""
    out, lse = tiles.forward(
        problem.to_lanes(query),
        problem.key_lanes(key),
        problem.key_lanes(value),
        problem.geometry(),
        problem.scale,
        problem.additive,
        by_scores=problem.elementwise,
        drop=problem.drop,
    )
    return problem.from_lanes(out), problem.from_lanes(lse)


def run_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    wanted: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of query, key, value and of the tensors in ``wanted`` ("bias", "table", "elements")."""
    sums = {name: torch.zeros(like.shape, dtype=problem.wide, device=like.device) for name, like in wanted.items()}
    dq, dk, dv = tiles.backward(
        None if grad_out is None else problem.to_lanes(grad_out),
        None if grad_lse is None else problem.to_lanes(grad_lse),
        problem.to_lanes(query),
        problem.key_lanes(key),
        problem.key_lanes(value),
        problem.to_lanes(out),
        problem.to_lanes(lse),
        problem.geometry(),
        problem.scale,
        problem.additive,
        (lambda chunk, scores: problem.collect(sums, chunk, scores)) if sums else None,
        drop=problem.drop,
    )
    dq = problem.from_lanes(dq).to(query.dtype)
    dk, dv = dk.reshape(key.shape).to(key.dtype), dv.reshape(value.shape).to(value.dtype)
    return dq, dk, dv, {name: total.to(wanted[name].dtype) for name, total in sums.items()}


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, table, problem: Problem):
        out, lse = run(query, key, value, problem)
        ctx.save_for_backward(query, key, value, bias, table, out, lse)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        query, key, value, bias, table, out, lse = ctx.saved_tensors
        wanted = {"bias": bias} if ctx.needs_input_grad[3] else {}
        if ctx.needs_input_grad[4]:
            wanted["table"] = table
        dq, dk, dv, more = run_backward(grad_out, grad_lse, query, key, value, out, lse, ctx.problem, wanted)
        return dq, dk, dv, more.get("bias"), more.get("table"), None


def _traced(query, key, value, plan, predicate, bias, table, scale) -> tuple[Tensor, Tensor]:
    """For torch.compile: callables are evaluated in the graph, the tiles run as one opaque operator."""
    queries, keys, device, wide = query.shape[2], key.shape[2], query.device, accumulation_dtype(query.dtype)
    block, size = plan.query_block, plan.key_block
    index = plan.index if plan.index.ndim == 4 else plan.index[None] if plan.index.ndim == 3 else plan.index[None, None]
    rows = torch.arange(index.shape[-2] * block, device=device).view(1, 1, -1, block, 1).clamp(max=queries - 1)
    columns = index[..., None] * size + torch.arange(size, device=device)
    valid = ((index[..., None] >= 0) & (columns < keys)).flatten(-2)[..., None, :]
    columns = columns.clamp(min=0, max=keys - 1).flatten(-2)[..., None, :]
    batch = torch.arange(query.shape[0], device=device).view(-1, 1, 1, 1, 1)
    head = torch.arange(query.shape[1], device=device).view(1, -1, 1, 1, 1)
    attends = valid if plan.padded or keys % size else None
    if plan.mask is not None and plan.mask_of is not None:
        attends = plan.mask[plan.mask_of] if attends is None else attends & plan.mask[plan.mask_of]
    if predicate is not None:
        allowed = predicate(batch, head, rows, columns)
        attends = allowed if attends is None else attends & allowed
    elements = None
    if bias is not None:
        where = zip(bias.shape, (batch, head, rows, columns))
        elements = bias[tuple(at if length > 1 else torch.zeros_like(at) for length, at in where)]
    if table is not None:
        heads = head.clamp(max=table.table.shape[0] - 1)
        entries = table.index[plan.mask_of] if isinstance(table.index, Tensor) else table.index(rows, columns)
        elements = table.table[heads, entries]
    if attends is not None:
        elements = torch.zeros((), dtype=wide, device=device) if elements is None else elements
        elements = torch.where(attends, elements.to(wide), -torch.inf)
    if elements is not None and elements.ndim < 5:
        elements = elements[(None,) * (5 - elements.ndim)]
    if ragged := -keys % size:
        key, value = pad(key, (0, 0, 0, ragged)), pad(value, (0, 0, 0, ragged))
    return _operator(query, key, value, plan.index.clamp(min=0), elements, block, size, scale)


def _opaque(query, key, index, elements, query_block, key_block, scale) -> Problem:
    plan = BlockPlan(query_block, key_block, index, padded=False)
    (batch, heads, queries, _), (key_heads, keys) = query.shape, key.shape[1:3]
    wide = accumulation_dtype(query.dtype)
    return Problem(plan, batch, heads, key_heads, queries, keys, scale, wide, elements=elements)


_OPERATOR_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor index, Tensor? elements, int query_block, int "
    "key_block, float scale) -> (Tensor, Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::blocksparse", mutates_args=(), schema=_OPERATOR_SCHEMA)
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    elements: Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = run(query, key, value, _opaque(query, key, index, elements, query_block, key_block, scale))
    return out.contiguous(), lse.contiguous()


@_operator.register_fake
def _(query, key, value, index, elements, query_block, key_block, scale):
    lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


_OPERATOR_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor index, Tensor? "
    "elements, Tensor out, Tensor lse, int query_block, int key_block, float scale, bool needs_elements) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::blocksparse_backward", mutates_args=(), schema=_OPERATOR_BACKWARD_SCHEMA)
def _operator_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    elements: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query_block: int,
    key_block: int,
    scale: float,
    needs_elements: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = _opaque(query, key, index, elements, query_block, key_block, scale)
    wanted = {"elements": elements} if needs_elements and elements is not None else {}
    dq, dk, dv, more = run_backward(grad_out, grad_lse, query, key, value, out, lse, problem, wanted)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), more.get("elements", query.new_empty(0))


@_operator_backward.register_fake
def _(grad_out, grad_lse, query, key, value, index, elements, out, lse, query_block, key_block, scale, needs_elements):
    last = elements if needs_elements and elements is not None else query.new_empty(0)
    return (
        *(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)),
        torch.empty_like(last),
    )


def _setup(ctx, inputs, output):
    query, key, value, index, elements, *numbers = inputs
    ctx.save_for_backward(query, key, value, index, elements, *output)
    ctx.numbers = numbers


def _derivative(ctx, grad_out, grad_lse):
    query, key, value, index, elements, out, lse = ctx.saved_tensors
    needs = elements is not None and ctx.needs_input_grad[4]
    dq, dk, dv, de = _operator_backward(
        grad_out, grad_lse, query, key, value, index, elements, out, lse, *ctx.numbers, needs
    )
    return dq, dk, dv, None, de if needs else None, None, None, None


_operator.register_autograd(_derivative, setup_context=_setup)
