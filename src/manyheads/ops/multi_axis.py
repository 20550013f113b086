"""Multi-axis attention: softmax attention inside blocks of neighbours, or inside sets spread over the whole map.

A map of X x Y positions is divided into sets of P = p_x p_y tokens, with s_x = X / p_x and s_y = Y / p_y::

    block set (i, j):  positions (i p_x + a, j p_y + b)        p_x x p_y neighbours
    grid set  (i, j):  positions (i + a s_x, j + b s_y)        a p_x x p_y grid laid over the whole map
    0 <= a < p_x, 0 <= b < p_y,  tokens ordered with b running fastest
    out_q = sum_k softmax_k( scale * q_q . k_k + table[a_k - a_q + p_x - 1, b_k - b_q + p_y - 1] ) v_k

Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.engines.common import check_choice, check_qkv, resolve_scale
from manyheads.engines.dense import attention
from manyheads.ops.window import window_merge, window_partition


def block_attention(
    query: Float[Tensor, "batch heads X Y head_dim"],
    key: Float[Tensor, "batch key_heads X Y head_dim"],
    value: Float[Tensor, "batch key_heads X Y value_dim"],
    *,
    partition: int | tuple[int, int],
    bias_table: Float[Tensor, "heads rows columns"] | None = None,
    mask: Bool[Tensor, "batch X Y"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads X Y value_dim"]:
    """Attention inside non-overlapping blocks of neighbouring positions ("block attention").

    Args:
        query: (batch, heads, X, Y, head_dim); the partition divides X and Y (``manyheads.layers.maxvit`` pads).
        key: (batch, key_heads, X, Y, head_dim); key_heads divides heads.
        value: (batch, key_heads, X, Y, value_dim).
        partition: P as (p_x, p_y) tokens, or one integer for both.
        bias_table: learned bias of every offset, (heads, 2 p_x - 1, 2 p_y - 1), entry [p_x - 1, p_y - 1] for a token
            and itself; rows count key minus query (the authors' orientation; ``table.flip(1, 2)`` is the other one).
        mask: boolean (batch, X, Y), True for tokens that serve as keys; a set without keys gives zeros.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        backend: "reference" or "auto", as in ``manyheads.engines.dense.attention``.

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, a partition that does not divide the map, a table of another partition.

    Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697.

    >>> import torch
    >>> x = torch.randn(2, 3, 14, 21, 32)
    >>> block_attention(x, x, x, partition=7, bias_table=torch.zeros(3, 13, 13)).shape
    torch.Size([2, 3, 14, 21, 32])
    """
    return _attend(query, key, value, "block", partition, bias_table, mask, scale, backend)


def grid_attention(
    query: Float[Tensor, "batch heads X Y head_dim"],
    key: Float[Tensor, "batch key_heads X Y head_dim"],
    value: Float[Tensor, "batch key_heads X Y value_dim"],
    *,
    partition: int | tuple[int, int],
    bias_table: Float[Tensor, "heads rows columns"] | None = None,
    mask: Bool[Tensor, "batch X Y"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads X Y value_dim"]:
    """Attention inside sets whose tokens lie X / p_x rows and Y / p_y columns apart ("grid attention").

    Arguments, errors and source as for :func:`block_attention`; offsets of the bias count steps of the grid.

    >>> import torch
    >>> x = torch.randn(2, 3, 14, 21, 32)
    >>> grid_attention(x, x, x, partition=7, bias_table=torch.zeros(3, 13, 13)).shape
    torch.Size([2, 3, 14, 21, 32])
    """
    return _attend(query, key, value, "grid", partition, bias_table, mask, scale, backend)


def grid_partition(tensor: Tensor, partition: int | tuple[int, int]) -> Tensor:
    """(batch, heads, X, Y, dim) as (batch * sets, heads, tokens of a set, dim), sets and tokens in row-major order.

    Raises:
        ValueError: a partition that does not divide the map.
    """
    tall, wide = partition_sizes(partition, tensor.shape[2:4])
    return rearrange(tensor, "b h (px sx) (py sy) d -> (b sx sy) h (px py) d", px=tall, py=wide)


def grid_merge(sets: Tensor, partition: int | tuple[int, int], grid: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`grid_partition` for a map of X x Y positions."""
    tall, wide = partition_sizes(partition, grid)
    down, across = grid[0] // tall, grid[1] // wide
    return rearrange(sets, "(b sx sy) h (px py) d -> b h (px sx) (py sy) d", sx=down, sy=across, px=tall, py=wide)


def partition_sizes(partition: int | tuple[int, int], grid: tuple[int, ...]) -> tuple[int, int]:
    """The partition as (p_x, p_y).

    Raises:
        ValueError: it is not positive or does not divide a map of the sizes ``grid``; names the nearest sizes that do.
    """
    tall, wide = (partition, partition) if isinstance(partition, int) else partition
    if tall < 1 or wide < 1:
        raise ValueError(f"partition must be positive, got {partition}")
    if grid[0] % tall or grid[1] % wide:
        near = " and ".join(_multiples(size, side) for size, side in zip(grid, (tall, wide)))
        raise ValueError(
            f"a partition of {tall} x {wide} does not divide a map of {grid[0]} x {grid[1]}; nearest sizes: {near}"
        )
    return tall, wide


def relative_bias(
    table: Float[Tensor, "heads rows columns"], partition: int | tuple[int, int]
) -> Float[Tensor, "heads tokens tokens"]:
    """The bias of every (query, key) pair of a set, read from the table of offsets.

    Raises:
        ValueError: a table that is not (heads, 2 p_x - 1, 2 p_y - 1).

    >>> import torch
    >>> relative_bias(torch.arange(3.0).view(1, 1, 3), (1, 2))
    tensor([[[1., 2.],
             [0., 1.]]])
    """
    tall, wide = (partition, partition) if isinstance(partition, int) else partition
    if table.ndim != 3 or table.shape[1:] != (2 * tall - 1, 2 * wide - 1):
        raise ValueError(
            f"bias_table of shape {tuple(table.shape)} does not fit a partition of {tall} x {wide}, which needs "
            f"(heads, {2 * tall - 1}, {2 * wide - 1}); resize_relative_table makes it fit"
        )
    return table.flatten(1)[:, relative_index(tall, wide, table.device)]


def relative_index(tall: int, wide: int, device: torch.device | None = None) -> Tensor:
    """Where the offset key - query of every pair of tokens stands in a flattened (2 p_x - 1) x (2 p_y - 1) table."""
    rows, columns = torch.arange(tall, device=device), torch.arange(wide, device=device)
    row_part = (rows - rows[:, None] + tall - 1) * (2 * wide - 1)
    column_part = columns - columns[:, None] + wide - 1
    return (row_part[:, None, :, None] + column_part[None, :, None, :]).reshape(tall * wide, tall * wide)


def resize_relative_table(
    table: Float[Tensor, "heads rows columns"], partition: int | tuple[int, int]
) -> Float[Tensor, "heads new_rows new_columns"]:
    """A table for another partition, bilinearly between the centres of its entries (as the authors' code does).

    >>> import torch
    >>> resize_relative_table(torch.zeros(3, 13, 13), (12, 16)).shape
    torch.Size([3, 23, 31])
    """
    tall, wide = (partition, partition) if isinstance(partition, int) else partition
    size = (2 * tall - 1, 2 * wide - 1)
    if tuple(table.shape[1:]) == size:
        return table
    resized = F.interpolate(table[None].float(), size=size, mode="bilinear", align_corners=False)
    return resized[0].to(table.dtype)


def _attend(query, key, value, kind, partition, bias_table, mask, scale, backend) -> Tensor:
    check_choice("backend", backend, ("auto", "reference"))
    check_qkv(query, key, value, ndim=5)
    grid = query.shape[2:4]
    if grid != key.shape[2:4]:
        raise ValueError(f"query has a map of {tuple(grid)} but key of {tuple(key.shape[2:4])}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (query.shape[0], *grid)):
        wanted = (query.shape[0], *grid)
        raise ValueError(f"mask must be boolean of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    sizes = partition_sizes(partition, grid)
    bias = None
    if bias_table is not None:
        bias = relative_bias(bias_table, sizes)
        if bias.shape[0] != query.shape[1]:
            raise ValueError(f"bias_table has {bias.shape[0]} heads, the query {query.shape[1]}")
    if not query.numel():
        return query.new_zeros(*query.shape[:4], value.shape[-1])
    divide: Callable = window_partition if kind == "block" else grid_partition
    merge: Callable = window_merge if kind == "block" else grid_merge
    keys = None if mask is None else divide(mask[:, None, ..., None], sizes)[:, :, None, :, 0]
    q, k, v = (divide(tensor, sizes) for tensor in (query, key, value))
    out = attention(q, k, v, mask=keys, bias=bias, scale=resolve_scale(scale, query.shape[-1]), backend=backend)
    assert isinstance(out, Tensor)
    return merge(out, sizes, grid)


def _multiples(size: int, side: int) -> str:
    below = size // side * side
    return f"{below} or {below + side}" if below else str(side)
