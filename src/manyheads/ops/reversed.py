"""Reversed attention: every token *sends* its content to parents, in shares that add up to one.

For child j and parent i of one head::

    A[j, i] = softmax_i( scale * query[j] . key[i] )             what j sends to i
    out[i]  = sum_j  A[j, i] * weight[j] * value[j]              what i receives, from as many children as send to it

so rows of the transposed matrix do not add up to one: a parent may receive much or nothing. Summed over heads it is the
soft dependency mask, from which trees are read (``manyheads.interpret.dependency_trees``)::

    D[i, j] = sum_h A_h[j, i] * weight_h[j]

As the softmax runs along a child's row, the children can be visited a few rows at a time in a single pass; the matrix
of all pairs is never held. With v' = weight * value and an incoming gradient dO the backward computes, tile by tile::

    dv' = A dO      dA = v' dO^T      dS = A * (dA - v' . dv')      dquery = scale dS key      dkey = scale dS^T query

which is attention's backward with the roles of value and output gradient exchanged.

Source: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282. Its authors
published no code; order and place of the factors follow an independent reimplementation (timm pull request 2062).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale

BACKENDS = ("auto", "reference", "dense", "tiles")
TILE = 1 << 20  # pairs in a tile: 4 MiB in float32, which stays in a core's share of the cache


def reversed_attention(
    query: Float[Tensor, "batch heads children head_dim"],
    key: Float[Tensor, "batch kv_heads parents head_dim"],
    value: Float[Tensor, "batch kv_heads children value_dim"],
    *,
    weight: Float[Tensor, "batch heads children"] | None = None,
    child_mask: Tensor | None = None,
    parent_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: int | float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch heads parents value_dim"]:
    """What every parent receives from children that divide their content among the parents.

    Args:
        query: (batch, heads, children, head_dim): what a child asks a parent to be.
        key: (batch, kv_heads, parents, head_dim); kv_heads divides heads. The parents are the children themselves, or
            other tokens (cross form).
        value: (batch, kv_heads, children, value_dim): the content that is sent.
        weight: (batch, heads, children), how much of a child's content each head sends: head selector times message in
            the paper. None sends all of it through every head.
        child_mask: boolean (batch, children), True for real tokens; padded children send nothing.
        parent_mask: boolean (batch, parents), True for real tokens; padded parents are sent nothing and give zeros. A
            child without any parent sends nothing.
        causal: a child may send to itself and earlier parents only; with different lengths the last child sees the last
            parent. A parent's output then depends on *later* children: this is no mask for language models.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        dropout: probability with which a share A[j, i] is dropped.
        backend: "reference" (the equations as einsums), "dense" (two products of whole matrices), "tiles" (a few
            children at a time, working memory independent of the number of tokens; gradients of first order only),
            or "auto": "tiles" where there are more pairs than one tile holds, but "dense" under torch.compile and
            with dropout.

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, dropout outside [0, 1), dropout with "tiles".

    Source: "Visual Dependency Transformers", arXiv 2304.03282, section 3.

    >>> import torch
    >>> x = torch.randn(2, 3, 49, 32)
    >>> received = reversed_attention(x, x, torch.ones(2, 3, 49, 1))
    >>> received.shape, bool((received.sum(2) - 49).abs().max() < 1e-3)
    (torch.Size([2, 3, 49, 1]), True)
    """
    check_choice("backend", backend, BACKENDS)
    _check(query, key, weight, child_mask, parent_mask)
    _check_value(query, key, value)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and less than 1")
    if dropout and backend == "tiles":
        raise ValueError("backend='tiles' has no dropout; take 'dense' or 'auto'")
    heads, children, parents = query.shape[1], query.shape[2], key.shape[2]
    wide, scale = accumulation_dtype(query.dtype), resolve_scale(scale, query.shape[-1])
    if backend == "auto":
        small = query.shape[0] * heads * children * parents <= TILE
        backend = "dense" if torch.compiler.is_compiling() or dropout or small else "tiles"
    share = _share(query, weight, child_mask)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    if backend == "tiles":
        sent = value if share is None else (value.to(wide) * share[..., None]).to(value.dtype)
        return _Tiles.apply(query, key, sent, parent_mask, causal, scale)  # pyright: ignore[reportReturnType]
    shares = F.dropout(_shares(query, key, parent_mask, causal, scale), dropout)
    if backend == "reference":
        share = shares.new_ones(shares.shape[:3]) if share is None else share
        return torch.einsum("bhji,bhj,bhjd->bhid", shares, share, value.to(wide)).to(query.dtype)
    sent = value.to(wide) if share is None else value.to(wide) * share[..., None]
    return (shares.mT @ sent).to(query.dtype)


def dependency_mask(
    query: Float[Tensor, "batch heads children head_dim"],
    key: Float[Tensor, "batch kv_heads parents head_dim"],
    *,
    weight: Float[Tensor, "batch heads children"] | None = None,
    child_mask: Tensor | None = None,
    parent_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch parents children"]:
    """The soft dependency mask D: how much every parent receives from every child, over all heads.

    Arguments and errors are those of ``reversed_attention``. The column of a child adds up to its total weight. In
    float32, or float64 for float64 inputs; all pairs are held at once.

    >>> import torch
    >>> x = torch.randn(2, 3, 49, 32)
    >>> dependency_mask(x, x, weight=torch.full((2, 3, 49), 1 / 3)).sum(1).allclose(torch.ones(2, 49))
    True
    """
    _check(query, key, weight, child_mask, parent_mask)
    key = repeat_heads(key, query.shape[1])
    shares = _shares(query, key, parent_mask, causal, resolve_scale(scale, query.shape[-1]))
    share = _share(query, weight, child_mask)
    if share is None:
        return shares.sum(1).mT
    return torch.einsum("bhji,bhj->bij", shares, share)


def _share(query: Tensor, weight: Tensor | None, child_mask: Tensor | None) -> Tensor | None:
    """Weights of the children with padded ones at zero, or None where all are one."""
    if weight is None and child_mask is None:
        return None
    wide = accumulation_dtype(query.dtype)
    share = query.new_ones(query.shape[:3], dtype=wide) if weight is None else weight.to(wide)
    return share if child_mask is None else share.masked_fill(~child_mask[:, None], 0)


def _shares(query: Tensor, key: Tensor, parent_mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """A, (batch, heads, children, parents)."""
    wide = accumulation_dtype(query.dtype)
    scores = (query.to(wide) * scale) @ key.to(wide).mT
    children, parents = query.shape[2], key.shape[2]
    hidden = _hidden(parent_mask, causal, slice(0, children), children, parents, query.device)
    if hidden is None:
        return scores.softmax(-1)
    # A child that sees no parent has a row of NaN, which is hidden throughout.
    return scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)


def _hidden(
    parent_mask: Tensor | None, causal: bool, rows: slice, children: int, parents: int, device: torch.device
) -> Tensor | None:
    """Which parents some children cannot send to, broadcast to (batch, heads, rows, parents)."""
    hidden = None if parent_mask is None else ~parent_mask[:, None, None]
    if causal:
        child = torch.arange(rows.start, rows.stop, device=device)[:, None]
        later = torch.arange(parents, device=device) > child + (parents - children)
        hidden = later[None, None] if hidden is None else hidden | later
    return hidden


class _Tiles(torch.autograd.Function):
    """Children a few rows at a time; the backward computes each tile again."""

    @staticmethod
    def forward(ctx: Any, query, key, sent, parent_mask, causal, scale):
        ctx.save_for_backward(query, key, sent, parent_mask)
        ctx.causal, ctx.scale = causal, scale
        wide = accumulation_dtype(query.dtype)
        out = query.new_zeros(*query.shape[:2], key.shape[2], sent.shape[3], dtype=wide)
        for images, rows in _tiles(query, key):
            shares = _tile(query, key, parent_mask, causal, scale, images, rows)
            out[images] += shares.mT @ sent[images, :, rows].to(wide)
        return out.to(query.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        query, key, sent, parent_mask = ctx.saved_tensors
        wide = accumulation_dtype(query.dtype)
        d_query, d_sent = torch.empty_like(query), torch.empty_like(sent)
        d_key = torch.zeros_like(key, dtype=wide)
        for images, rows in _tiles(query, key):
            shares = _tile(query, key, parent_mask, ctx.causal, ctx.scale, images, rows)
            content, received = sent[images, :, rows].to(wide), grad[images].to(wide)
            d_content = shares @ received
            d_scores = content @ received.mT
            d_scores -= (content * d_content).sum(-1, keepdim=True)
            d_scores *= shares
            d_sent[images, :, rows] = d_content.to(sent.dtype)
            d_query[images, :, rows] = (d_scores @ key[images].to(wide) * ctx.scale).to(query.dtype)
            d_key[images] += d_scores.mT @ (query[images, :, rows].to(wide) * ctx.scale)
        return d_query, d_key.to(key.dtype), d_sent, None, None, None


def _tiles(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of images and of children that make about TILE pairs."""
    batch, heads, children, _ = query.shape
    row = max(1, heads * key.shape[2])
    images, rows = max(1, TILE // (row * max(1, children))), max(16, TILE // row)
    for image in range(0, batch, images):
        for child in range(0, children, rows):
            yield slice(image, image + images), slice(child, min(children, child + rows))


def _tile(query, key, parent_mask, causal, scale, images: slice, rows: slice) -> Tensor:
    """A of some images and children, in one buffer."""
    wide = accumulation_dtype(query.dtype)
    scores = (query[images, :, rows].to(wide) * scale) @ key[images].to(wide).mT
    some_mask = None if parent_mask is None else parent_mask[images]
    hidden = _hidden(some_mask, causal, rows, query.shape[2], key.shape[2], query.device)
    if hidden is None:
        return torch.softmax(scores, -1, out=scores)
    shares = torch.softmax(scores.masked_fill_(hidden, -math.inf), -1, out=scores)
    return shares.masked_fill_(hidden, 0)


def _check(
    query: Tensor, key: Tensor, weight: Tensor | None, child_mask: Tensor | None, parent_mask: Tensor | None
) -> None:
    check_qkv(query, key, key)
    wanted = tuple(query.shape[:3])
    if weight is not None and (not weight.is_floating_point() or tuple(weight.shape) != wanted):
        raise ValueError(
            f"weight must be floating-point (batch, heads, children) = {wanted}, got {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    for name, mask, tokens in (
        ("child_mask", child_mask, query.shape[2]),
        ("parent_mask", parent_mask, key.shape[2]),
    ):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (query.shape[0], tokens)):
            wanted = (query.shape[0], tokens)
            raise ValueError(f"{name} must be boolean of shape {wanted}, got {mask.dtype} {tuple(mask.shape)}")


def _check_value(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_qkv(query, value, value, same_width=False)
    if value.shape[2] != query.shape[2] or value.shape[1] != key.shape[1]:
        raise ValueError(
            f"value is what children send, by key's heads: needs {key.shape[1]} heads and {query.shape[2]} tokens, "
            f"got {value.shape[1]} and {value.shape[2]}"
        )
