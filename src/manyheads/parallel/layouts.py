"""Layouts: which tokens of a sequence of N live on which of W ranks.

::

    contiguous   rank r holds tokens r n .. (r+1) n - 1                          n = N / W
    zigzag       chunks r and 2W - 1 - r of 2W equal chunks, one after the other (balances causal work)
    striped      tokens r, r + W, r + 2W, ...                                    (balances causal work)

Everything token-wise (labels, positions, loss masks) must follow the same order as the tokens, and labels must be
shifted before they are sharded.

Source: contiguous from "Sequence Parallelism", arXiv 2105.13120; striped from "Striped Attention", arXiv 2311.09431;
zigzag as in later codes for ring attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.engines.common import check_choice

LAYOUTS = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class Run:
    """Tokens ``start, start + stride, ...`` of one sequence, which lie at ``offset, offset + 1, ...`` on their rank."""

    sequence: int
    start: int
    stride: int
    count: int
    offset: int


def token_index(
    tokens: int,
    world: int,
    *,
    layout: str = "contiguous",
    cu_seqlens: Tensor | Sequence[int] | None = None,
    per_sequence: bool = False,
    ulysses: int = 1,
) -> Tensor:
    """The tokens that every rank holds, in the rank's order.

    Args:
        tokens: N, all tokens together.
        world: W, number of ranks.
        layout: "contiguous", "zigzag" or "striped".
        cu_seqlens: cumulative lengths 0, n1, n1 + n2, ... of packed sequences; read with ``per_sequence`` only.
        per_sequence: lay out every packed sequence by itself, so that each rank holds its share of each sequence (all
            lengths must then divide); False lays out the pack as one long sequence, of any lengths inside.
        ulysses: ranks of an Ulysses group in the two-dimensional scheme: the layout is over W / ulysses groups of
            adjacent ranks, and a group's tokens are cut evenly among its ranks.

    Returns:
        int64 (world, tokens / world).

    Raises:
        ValueError: an unknown layout, or a number of tokens that does not divide; the message names the multiple.

    Source: arXiv 2105.13120, section 3.1; arXiv 2311.09431, section 3.

    >>> token_index(8, 2, layout="zigzag")
    tensor([[0, 1, 6, 7],
            [2, 3, 4, 5]])
    """
    check_choice("layout", layout, LAYOUTS)
    if ulysses < 1 or world % ulysses:
        raise ValueError(f"ulysses={ulysses} must divide the {world} ranks")
    groups = world // ulysses
    if ulysses > 1 and tokens // max(groups, 1) % ulysses:
        raise ValueError(f"{tokens} tokens do not divide over {world} ranks: pad to a multiple of {world}")
    index = [
        _index(runs(tokens, groups, r, layout, cumulative_lengths(cu_seqlens), per_sequence)) for r in range(groups)
    ]
    return torch.stack(index).reshape(world, -1)


def position_ids(
    tokens: int,
    rank: int,
    world: int,
    *,
    layout: str = "contiguous",
    cu_seqlens: Tensor | Sequence[int] | None = None,
    per_sequence: bool = False,
) -> Tensor:
    """Positions of a rank's tokens, for rotary or learned position embeddings.

    Args:
        tokens: N, all tokens together.
        rank: the rank within its group.
        world: W, number of ranks.
        layout: as in :func:`token_index`.
        cu_seqlens: cumulative lengths of packed sequences: positions then count from each sequence's beginning.
        per_sequence: as in :func:`token_index`.

    Returns:
        int64 (tokens / world,).

    Raises:
        ValueError: as :func:`token_index`, or a rank outside 0 .. world - 1.

    Source: arXiv 2105.13120, section 3.1.

    >>> position_ids(8, 1, 2, layout="striped", cu_seqlens=[0, 3, 8])
    tensor([1, 0, 2, 4])
    """
    _check_rank(rank, world)
    cu = cumulative_lengths(cu_seqlens)
    index = _index(runs(tokens, world, rank, layout, cu, per_sequence))
    if cu is None:
        return index
    borders = torch.tensor(cu)
    return index - borders[torch.searchsorted(borders, index, right=True) - 1]


def shard(
    tensor: Tensor,
    rank: int,
    world: int,
    *,
    dim: int,
    layout: str = "contiguous",
    cu_seqlens: Tensor | Sequence[int] | None = None,
    per_sequence: bool = False,
    ulysses: int = 1,
) -> Tensor:
    """A rank's part of a tensor that every rank holds whole.

    Args:
        tensor: anything with tokens along ``dim``: ids, labels, hidden states, queries.
        rank: the rank within its group.
        world: W, number of ranks.
        dim: the axis of the tokens.
        layout: as in :func:`token_index`, as are the other options.
        cu_seqlens: as in :func:`token_index`.
        per_sequence: as in :func:`token_index`.
        ulysses: as in :func:`token_index`.

    Returns:
        The tensor with tokens / world entries along ``dim``; differentiable.

    Raises:
        ValueError: as :func:`token_index`, or a rank outside 0 .. world - 1.

    Source: arXiv 2105.13120, section 3.1.

    >>> shard(torch.arange(8), 0, 2, dim=0, layout="zigzag")
    tensor([0, 1, 6, 7])
    """
    _check_rank(rank, world)
    tokens, borders = tensor.shape[dim], cumulative_lengths(cu_seqlens)
    if ulysses == 1:
        index = rank_index(tokens, world, rank, layout, borders, per_sequence)
    else:
        options: dict[str, Any] = dict(layout=layout, cu_seqlens=borders, per_sequence=per_sequence, ulysses=ulysses)
        index = token_index(tokens, world, **options)[rank]
    return tensor.index_select(dim, index.to(tensor.device))


def unshard(
    shards: Sequence[Tensor],
    *,
    dim: int,
    layout: str = "contiguous",
    cu_seqlens: Tensor | Sequence[int] | None = None,
    per_sequence: bool = False,
    ulysses: int = 1,
) -> Tensor:
    """The whole tensor from the parts of all ranks: the inverse of :func:`shard`.

    Args:
        shards: the parts in the order of the ranks, all of one shape.
        dim: the axis of the tokens.
        layout: as in :func:`token_index`, as are the other options.
        cu_seqlens: as in :func:`token_index`.
        per_sequence: as in :func:`token_index`.
        ulysses: as in :func:`token_index`.

    Returns:
        The tensor in the order of the sequence; differentiable.

    Raises:
        ValueError: as :func:`token_index`, or no parts, or parts of different shapes.

    Source: arXiv 2105.13120, section 3.1.

    >>> whole = torch.randn(2, 12, 5)
    >>> parts = [shard(whole, r, 3, dim=1, layout="zigzag") for r in range(3)]
    >>> torch.equal(unshard(parts, dim=1, layout="zigzag"), whole)
    True
    """
    if len({tuple(part.shape) for part in shards}) != 1:
        raise ValueError(f"shards must have one shape, got {[tuple(part.shape) for part in shards]}")
    joined = torch.cat(list(shards), dim=dim)
    options: dict[str, Any] = dict(layout=layout, cu_seqlens=cu_seqlens, per_sequence=per_sequence, ulysses=ulysses)
    index = token_index(joined.shape[dim], len(shards), **options)
    return joined.index_select(dim, index.flatten().argsort().to(joined.device))


def rank_index(
    tokens: int, world: int, rank: int, layout: str, cu_seqlens: Sequence[int] | None = None, per_sequence: bool = False
) -> Tensor:
    """A rank's row of :func:`token_index`, without those of the others."""
    return _index(runs(tokens, world, rank, layout, cu_seqlens, per_sequence))


def runs(
    tokens: int, world: int, rank: int, layout: str, cu_seqlens: Sequence[int] | None = None, per_sequence: bool = False
) -> list[Run]:
    """A rank's tokens as arithmetic runs, cut where packed sequences meet."""
    check_choice("layout", layout, LAYOUTS)
    cu = [0, tokens] if cu_seqlens is None else list(cu_seqlens)
    if len(cu) < 2 or cu[0] != 0 or cu[-1] != tokens or any(b < a for a, b in itertools.pairwise(cu)):
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of all ranks together, got {cu}")
    found: list[Run] = []
    for first, last in itertools.pairwise(cu if per_sequence else [0, tokens]):
        for start, stride, count in _progressions(first, last - first, world, rank, layout, per_sequence):
            offset = found[-1].offset + found[-1].count if found else 0
            found += _cut(start, stride, count, offset, cu)
    return found


def _progressions(first: int, length: int, world: int, rank: int, layout: str, per_sequence: bool):
    parts = 2 * world if layout == "zigzag" else world
    if length % parts:
        what = f"a sequence of {length} tokens" if per_sequence else f"{length} tokens"
        raise ValueError(
            f"{what} cannot be laid out {layout} over {world} ranks: pad to a multiple of {parts} "
            f"(the next is {-(-length // parts) * parts})"
        )
    size = length // parts
    if layout == "striped":
        return [(first + rank, world, size)]
    chunks = (rank, 2 * world - 1 - rank) if layout == "zigzag" else (rank,)
    return [(first + chunk * size, 1, size) for chunk in chunks]


def _cut(start: int, stride: int, count: int, offset: int, cu: Sequence[int]) -> list[Run]:
    pieces = []
    for sequence, (first, last) in enumerate(itertools.pairwise(cu)):
        low = max(0, -((start - first) // stride))  # the first i with start + i * stride >= first
        high = min(count, -((start - last) // stride))
        if low < high:
            pieces.append(Run(sequence, start + low * stride, stride, high - low, offset + low))
    return pieces


def _index(pieces: list[Run]) -> Tensor:
    parts = [torch.arange(p.start, p.start + p.count * p.stride, p.stride) for p in pieces]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def cumulative_lengths(cu_seqlens: Tensor | Sequence[int] | None) -> list[int] | None:
    """``cu_seqlens`` as a list of ints."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.is_floating_point() or cu_seqlens.ndim != 1:
            raise TypeError(f"cu_seqlens must be a 1-D integer tensor, got {cu_seqlens.dtype} {cu_seqlens.ndim}-D")
        return cu_seqlens.tolist()
    return [int(n) for n in cu_seqlens]


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank must be within 0 .. {world - 1}, got {rank}")
