"""Neighborhood attention in one, two or three dimensions: every token attends to a box of nearest tokens.

    out_i = sum_j softmax_j( scale * q_i . k_j + bias_ij ) v_j        over the tokens j of i's window

Windows, strides, dilations and causality are chosen per axis; the exact rule is in ``neighborhood_plan``.

Sources: "Faster Neighborhood Attention", arXiv 2403.04690; "Generalized Neighborhood Attention", arXiv 2504.16922;
"Neighborhood Attention Transformer", arXiv 2204.07143 (relative position bias); arXiv 2209.15001 (dilation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.engines.blocksparse_operator import run, run_backward
from manyheads.engines.blocksparse_plan import TableBias
from manyheads.engines.blocksparse_scores import Problem
from manyheads.engines.blocksparse_tiles import Dropout
from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.counting import count_inside
from manyheads.engines.dense import attention
from manyheads.engines.merge import merge
from manyheads.ops.neighborhood_plan import Axis, Layout, check_axis, layout, neighborhood_mask

__all__ = ["neighborhood_attention", "neighborhood_decode", "neighborhood_mask"]

DENSE = {"auto": -1, "tiles": 0, "dense": 1}


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    rel_pos_bias: Tensor | None = None,
    additional_key: Tensor | None = None,
    additional_value: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every token to the box of ``window`` tokens around it, at a cost linear in the tokens.

    At a border the box is shifted inside, not cut, so every query has as many neighbours as any other (except along a
    causal axis, where boxes are cut at the start). ``stride == window`` gives blocked windows, ``window`` equal to the
    grid full attention. Memory beyond inputs and outputs: some MiB of tiles, whatever the window.

    Args:
        query: (batch, heads, *grid, head_dim) with a grid of one, two or three axes.
        key: (batch, key_heads, *grid, head_dim); key_heads divides heads.
        value: (batch, key_heads, *grid, value_dim).
        window: tokens of the box along each axis, at least 2; even windows reach one token further to the left.
        stride: queries along each axis that share the box of their leader, at most the window.
        dilation: distance between neighbours along each axis; window times dilation must fit the axis.
        causal: per axis, whether later tokens are hidden.
        rel_pos_bias: (heads, 2 window - 1, ...) one axis per grid axis, added to the scaled scores at the distance of
            key and query in steps of the dilation; odd windows, stride 1, no causal axis.
        additional_key: (batch, key_heads, extra, head_dim) keys that every query sees besides, in the same softmax.
        additional_value: (batch, key_heads, extra, value_dim) their values.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        dropout: probability with which a weight is dropped after the softmax; not with additional keys.
        return_lse: also return the log-sum-exp (batch, heads, *grid), natural log, float32, differentiable.
        backend: "reference" (the equation with a dense mask), "tiles" (query tiles against key boxes), "dense" (one
            tile for all), or "auto": the cheaper of the last two.

    Raises:
        TypeError: nested tensors, mixed or integer dtypes.
        ValueError: shapes that do not fit, windows that do not fit the grid, a bias where none is defined.

    Source: "Faster Neighborhood Attention", arXiv 2403.04690; "Generalized Neighborhood Attention", arXiv 2504.16922.

    >>> import torch
    >>> x = torch.randn(1, 2, 14, 14, 32)
    >>> neighborhood_attention(x, x, x, window=7, dilation=2).shape
    torch.Size([1, 2, 14, 14, 32])
    """
    check_choice("backend", backend, ("auto", "reference", "tiles", "dense"))
    axes = _check(query, key, value, window, stride, dilation, causal)
    _check_extras(query, key, value, axes, rel_pos_bias, additional_key, additional_value, dropout)
    grid, scale = query.shape[2:-1], resolve_scale(scale, query.shape[-1])
    query, key, value = (tensor.flatten(2, -2) for tensor in (query, key, value))
    table = None if rel_pos_bias is None else rel_pos_bias.flatten(1)
    if backend == "reference":
        out, lse = _reference(query, key, value, axes, table, scale, dropout)
    else:
        seed = torch.randint(1 << 62, ()) if dropout else None
        options = zip(*((axis.length, axis.window, axis.stride, axis.dilation, int(axis.causal)) for axis in axes))
        out, lse = _operator(query, key, value, table, seed, *map(list, options), scale, dropout, DENSE[backend])
    if additional_key is not None and additional_value is not None and additional_key.shape[2]:
        more = attention(query, additional_key, additional_value, scale=scale, return_lse=True)
        out, lse = merge(*zip((out, lse), more))
    out, lse = out.unflatten(2, grid), lse.unflatten(2, grid)
    return (out, lse) if return_lse else out


def neighborhood_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    position: int,
    window: int,
    stride: int = 1,
    dilation: int = 1,
    scale: float | None = None,
) -> Tensor:
    """One step of causal one-dimensional neighborhood attention against a ring buffer of the latest tokens.

    The token at ``position`` is stored, like every token, in slot ``position % slots`` of the buffers; they need
    ``slots >= (window - 1) * dilation + 1``. Equals the last row of :func:`neighborhood_attention` on the sequence so
    far where its stride group is complete or ``stride`` is 1; for the other members of a group the left edge of the
    window depends on the leader that is still to come, and so does the result here: the group counts as complete.

    Args:
        query: (batch, heads, 1, head_dim).
        key: (batch, key_heads, slots, head_dim) ring buffer, the token at ``position`` included.
        value: (batch, key_heads, slots, value_dim) ring buffer.
        position: number of the token, from 0.
        window, stride, dilation, scale: as :func:`neighborhood_attention`.

    Raises:
        ValueError: shapes that do not fit, or a buffer too short for the window.

    >>> import torch
    >>> x = torch.randn(1, 2, 9, 8)
    >>> full = neighborhood_attention(x, x, x, window=4, causal=True)
    >>> ring = x[:, :, [8, 5, 6, 7]]  # tokens 5 to 8 in the slots that their numbers name
    >>> step = neighborhood_decode(x[:, :, 8:], ring, ring, position=8, window=4)
    >>> torch.allclose(step[:, :, 0], full[:, :, 8], atol=1e-6)
    True
    """
    check_qkv(query, key, value)
    slots, need = key.shape[2], (window - 1) * dilation + 1
    if query.shape[2] != 1 or slots < need:
        raise ValueError(f"needs one query and a buffer of {need} tokens, got {query.shape[2]} and {slots}")
    group, place = position % dilation, position // dilation
    complete = Axis(need + position + dilation * stride, window, stride, dilation, True)
    first, stop = complete.window_of(place, complete.group_length(group))
    seen = (torch.arange(first, stop, device=key.device) * dilation + group) % slots
    out = attention(query, key.index_select(2, seen), value.index_select(2, seen), scale=scale)
    assert isinstance(out, Tensor)
    return out


def _reference(query, key, value, axes, table, scale, dropout) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(query.dtype)
    whole = layout(axes, query.device, True)
    assert whole.plan.mask is not None
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scores = scale * torch.einsum("bhid,bhjd->bhij", query.to(wide), key.to(wide))
    if table is not None:
        scores = scores + table.to(wide)[:, whole.entries[0]]
    scores = scores.masked_fill(~whole.plan.mask[0], -torch.inf)
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout)
    return torch.einsum("bhij,bhjd->bhid", weights, value.to(wide)).to(query.dtype), scores.logsumexp(-1)


def _problem(query, key, table, seed, numbers, scale, dropout, dense) -> tuple[Problem, Layout]:
    axes = tuple(Axis(x, w, s, d, bool(c)) for x, w, s, d, c in zip(*numbers))
    found = layout(axes, query.device, None if dense < 0 else bool(dense))
    (batch, heads, tokens, _), key_heads = query.shape, key.shape[1]
    rows = tokens if found.order is None else len(found.order)
    problem = Problem(
        plan=found.plan,
        batch=batch,
        heads=heads,
        key_heads=key_heads,
        queries=rows,
        keys=tokens,
        scale=scale,
        wide=accumulation_dtype(query.dtype),
        table=None if table is None else TableBias(table, found.entries),
        drop=None if seed is None else Dropout(dropout, int(seed)),
    )
    return problem, found


_OPERATOR_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? table, Tensor? seed, SymInt[] grid, int[] window, "
    "int[] stride, int[] dilation, int[] causal, float scale, float dropout, int dense) -> (Tensor, "
    "Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::neighborhood", mutates_args=(), schema=_OPERATOR_SCHEMA)
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[int],
    scale: float,
    dropout: float,
    dense: int,
) -> tuple[Tensor, Tensor]:
    # An operator of its own, so that torch.compile and torch.export see one node and no geometry.
    numbers = (grid, window, stride, dilation, causal)
    problem, found = _problem(query, key, table, seed, numbers, scale, dropout, dense)
    tiled = query if found.order is None else query.index_select(2, found.order)
    out, lse = run(tiled, key, value, problem)
    if found.back is not None:
        out, lse = out.index_select(2, found.back), lse.index_select(2, found.back)
    return out.contiguous(), lse.contiguous()


@_operator.register_fake
def _(query, key, value, table, seed, grid, window, stride, dilation, causal, scale, dropout, dense):
    lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(*query.shape[:-1], value.shape[-1]), lse


_OPERATOR_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, Tensor value, Tensor? table, Tensor? "
    "seed, Tensor out, Tensor lse, SymInt[] grid, int[] window, int[] stride, int[] dilation, int[] "
    "causal, float scale, float dropout, int dense) -> (Tensor, Tensor, Tensor, Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::neighborhood_backward", mutates_args=(), schema=_OPERATOR_BACKWARD_SCHEMA)
def _operator_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: list[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[int],
    scale: float,
    dropout: float,
    dense: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = (grid, window, stride, dilation, causal)
    problem, found = _problem(query, key, table, seed, numbers, scale, dropout, dense)
    rows = [grad_out, grad_lse, query, out, lse]
    if found.order is not None and found.back is not None:
        rows = [tensor.index_select(2, found.order) for tensor in rows]
        # Rows that repeat a token to fill a tile were thrown away: no gradient comes back through them.
        spare = torch.ones(len(found.order), dtype=torch.bool, device=query.device)
        spare[found.back] = False
        if found.order.numel() > found.back.numel():
            rows[0], rows[1] = rows[0].masked_fill(spare[:, None], 0), rows[1].masked_fill(spare, 0)
    grad_out, grad_lse, tiled, out, lse = rows
    wanted = {} if table is None else {"table": table}
    dq, dk, dv, more = run_backward(grad_out, grad_lse, tiled, key, value, out, lse, problem, wanted)
    if found.back is not None:
        dq = dq.index_select(2, found.back)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), more.get("table", query.new_empty(0))


@_operator_backward.register_fake
def _(grad_out, grad_lse, query, key, value, table, seed, out, lse, *numbers):
    new = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value)]
    return *new, query.new_empty(0) if table is None else torch.empty_like(table)


def _setup(ctx, inputs, output) -> None:
    query, key, value, table, seed, *numbers = inputs
    ctx.save_for_backward(query, key, value, table, seed, *output)
    ctx.numbers = numbers


def _derivative(ctx, grad_out, grad_lse):
    query, key, value, table, seed, out, lse = ctx.saved_tensors
    *grads, dt = _operator_backward(grad_out, grad_lse, query, key, value, table, seed, out, lse, *ctx.numbers)
    return *grads, None if table is None else dt, None, *(None for _ in ctx.numbers)


_operator.register_autograd(_derivative, setup_context=_setup)


def _check(query, key, value, window, stride, dilation, causal) -> tuple[Axis, ...]:
    if not isinstance(query, Tensor):
        raise TypeError(f"query must be a tensor, got {type(query).__name__}")
    if not query.is_nested and not 4 <= query.ndim <= 6:
        raise ValueError(f"query must be (batch, heads, one to three axes, head_dim), got shape {tuple(query.shape)}")
    check_qkv(query, key, value, ndim=4 if query.is_nested else query.ndim)
    grid = query.shape[2:-1]
    if key.shape[2:-1] != grid:
        raise ValueError(f"query has a grid {tuple(grid)} but key {tuple(key.shape[2:-1])}")
    options = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    spread = {}
    for name, option in options.items():
        values = tuple(option) if isinstance(option, Sequence) else (option,) * len(grid)
        kind = bool if name == "causal" else int
        if len(values) != len(grid) or any(type(one) is not kind for one in values):
            raise ValueError(f"{name} must be one {kind.__name__} or one per axis of {tuple(grid)}, got {option!r}")
        spread[name] = values
    axes = tuple(Axis(*numbers) for numbers in zip(grid, *spread.values()))
    for axis in axes:
        check_axis(axis)
    return axes


def _check_extras(query, key, value, axes, bias, more_keys, more_values, dropout) -> None:
    if bias is not None:
        if any(axis.causal or axis.stride > 1 or axis.window % 2 == 0 for axis in axes):
            raise ValueError("rel_pos_bias is defined for odd windows with stride 1 and no causal axis")
        wanted = (query.shape[1], *(2 * axis.window - 1 for axis in axes))
        if tuple(bias.shape) != wanted:
            raise ValueError(f"rel_pos_bias must have shape {wanted}, got {tuple(bias.shape)}")
    if (more_keys is None) != (more_values is None):
        raise ValueError("additional_key and additional_value come together; only one of them was given")
    if more_keys is not None:
        check_qkv(query.flatten(2, -2), more_keys, more_values)
        if more_keys.shape[1] != key.shape[1] or more_values.shape[-1] != value.shape[-1]:
            raise ValueError(
                f"additional keys and values need {key.shape[1]} heads and width {value.shape[-1]}, got "
                f"{tuple(more_keys.shape)} and {tuple(more_values.shape)}"
            )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout}")
    if dropout and more_keys is not None:
        raise ValueError("dropout together with additional keys is not defined")
