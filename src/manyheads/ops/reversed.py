"""Reversed attention: every token *sends* its content to parents, in shares that add up to one.

For child j and parent i of one head::

    A[j, i] = softmax_i( scale * query[j] . key[i] )             what j sends to i
    out[i]  = sum_j  A[j, i] * weight[j] * value[j]              what i receives, from as many children as send to it

so rows of the transposed matrix do not add up to one: a parent may receive much or nothing. Summed over heads it is the
soft dependency mask, from which trees are read (``manyheads.interpret.dependency_trees``)::

    D[i, j] = sum_h A_h[j, i] * weight_h[j]

The fast paths, in ``manyheads.engines.dense_reversed``, scale the values by their weights first, which leaves attention
with a transposed matrix of weights; that matrix is never held whole, forward or backward.

Source: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282. Its authors
published no code; order and place of the factors follow an independent reimplementation (timm pull request 2062).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.dense_reversed import TILE, hidden_pairs, reversed_sdpa, reversed_tiles

BACKENDS = ("auto", "reference", "dense", "tiles", "sdpa")


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
            children at a time), "sdpa" (torch's fused attention there and back, without parent_mask; the last two need
            working memory independent of the number of pairs and give gradients of first order only), or "auto":
            where there are more pairs than one tile holds "sdpa" on a GPU, if it can, and "tiles" on a CPU, else
            "dense", which is also taken by torch.export and with dropout.

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, dropout outside [0, 1), or a backend that cannot do what is asked.

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
    if dropout and backend in ("tiles", "sdpa"):
        raise ValueError(f"backend={backend!r} has no dropout; take 'dense' or 'auto'")
    if backend == "sdpa" and not _fits_sdpa(query, key, parent_mask, causal):
        raise ValueError("backend='sdpa' has no parent_mask, and causal for as many children as parents only")
    heads, wide, scale = query.shape[1], accumulation_dtype(query.dtype), resolve_scale(scale, query.shape[-1])
    if backend == "auto":
        backend = "dense" if dropout else _choose(query, key, parent_mask, causal)
    share = _share(query, weight, child_mask)
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    if backend in ("tiles", "sdpa"):
        sent = value if share is None else (value.to(wide) * share[..., None]).to(value.dtype)
        if backend == "sdpa":
            return reversed_sdpa(query, key, sent, causal, scale)
        return reversed_tiles(query, key, sent, parent_mask, causal, scale)
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


def _choose(query: Tensor, key: Tensor, parent_mask: Tensor | None, causal: bool) -> str:
    # An exported program should run where this library is not installed.
    if torch.compiler.is_exporting() or query.shape[:3].numel() * key.shape[2] <= TILE:
        return "dense"
    if query.device.type == "cpu":
        return "tiles"
    fused = query.dtype != torch.float64 and not torch.compiler.is_compiling()
    return "sdpa" if fused and _fits_sdpa(query, key, parent_mask, causal) else "dense"


def _fits_sdpa(query: Tensor, key: Tensor, parent_mask: Tensor | None, causal: bool) -> bool:
    return parent_mask is None and (not causal or query.shape[2] == key.shape[2])


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
    hidden = hidden_pairs(parent_mask, causal, slice(0, children), children, parents, query.device)
    if hidden is None:
        return scores.softmax(-1)
    # A child that sees no parent has a row of NaN, which is hidden throughout.
    return scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0)


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
