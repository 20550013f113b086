"""Dense attention transposed: the softmax runs along a child's row, the sum along a parent's column.

For children j with contents v_j and parents i::

    A[j, i] = softmax_i( scale * query[j] . key[i] )          out[i] = sum_j A[j, i] v_j

With an incoming gradient dO the backward is attention's, with the roles of value and output gradient exchanged::

    dv = A dO      dA = v dO^T      dS = A * (dA - v . dv)      dquery = scale dS key      dkey = scale dS^T query

Two ways that never hold the matrix of all pairs:

- ``reversed_tiles``: as the softmax runs along rows, a few children at a time are enough; the backward computes each
  tile again. Forward and backward are torch custom operators, so that torch.compile sees two nodes, not the loop.
- ``reversed_sdpa``: ``out`` is the gradient that reaches the values of ordinary attention when v arrives at its
  output, and A dO is ordinary attention whose values are dO. So both directions are a forward and a backward of
  torch's SDPA, on whose flash kernels they run.

Source: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282;
recomputation in the backward as in "FlashAttention", arXiv 2205.14135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.engines.common import accumulation_dtype
from manyheads.engines.counting import count_inside

TILE = 1 << 20  # pairs in a tile: 4 MiB in float32, which stays in a core's share of the cache


def hidden_pairs(
    parent_mask: Tensor | None, causal: bool, rows: slice, children: int, parents: int, device: torch.device
) -> Tensor | None:
    """Which parents some children cannot send to, broadcast to (batch, heads, rows, parents); None hides nothing.

    >>> import torch
    >>> hidden_pairs(None, True, slice(0, 2), 3, 3, torch.device("cpu"))[0, 0].tolist()
    [[False, True, True], [False, False, True]]
    """
    hidden = None if parent_mask is None else ~parent_mask[:, None, None]
    if causal:
        child = torch.arange(rows.start, rows.stop, device=device)[:, None]
        later = torch.arange(parents, device=device) > child + (parents - children)
        hidden = later[None, None] if hidden is None else hidden | later
    return hidden


_SCHEMA = "(Tensor query, Tensor key, Tensor sent, Tensor? parent_mask, bool causal, float scale) -> Tensor"


@count_inside
@torch.library.custom_op("manyheads::reversed_tiles", mutates_args=(), schema=_SCHEMA)
def reversed_tiles(query, key, sent, parent_mask, causal, scale):
    """What the parents receive, (batch, heads, parents, value_dim); all arguments with the same number of heads."""
    wide = accumulation_dtype(query.dtype)
    out = query.new_zeros(*query.shape[:2], key.shape[2], sent.shape[3], dtype=wide)
    for images, rows in _tiles(query, key):
        shares = _tile(query, key, parent_mask, causal, scale, images, rows)
        out[images] += shares.mT @ sent[images, :, rows].to(wide)
    return out.to(query.dtype)


@reversed_tiles.register_fake
def _(query, key, sent, parent_mask, causal, scale):
    return query.new_empty(*query.shape[:2], key.shape[2], sent.shape[3])


_SCHEMA = (
    "(Tensor grad, Tensor query, Tensor key, Tensor sent, Tensor? parent_mask, bool causal, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)


@count_inside
@torch.library.custom_op("manyheads::reversed_tiles_backward", mutates_args=(), schema=_SCHEMA)
def reversed_tiles_backward(grad, query, key, sent, parent_mask, causal, scale):
    """Gradients of query, key and the contents sent."""
    wide = accumulation_dtype(query.dtype)
    d_query, d_sent = query.new_empty(query.shape), sent.new_empty(sent.shape)
    d_key = key.new_zeros(key.shape, dtype=wide)
    for images, rows in _tiles(query, key):
        shares = _tile(query, key, parent_mask, causal, scale, images, rows)
        content, received = sent[images, :, rows].to(wide), grad[images].to(wide)
        d_content = shares @ received
        d_scores = content @ received.mT
        d_scores -= (content * d_content).sum(-1, keepdim=True)
        d_scores *= shares
        d_sent[images, :, rows] = d_content.to(sent.dtype)
        d_query[images, :, rows] = (d_scores @ key[images].to(wide) * scale).to(query.dtype)
        d_key[images] += d_scores.mT @ (query[images, :, rows].to(wide) * scale)
    return d_query, d_key.to(key.dtype), d_sent


@reversed_tiles_backward.register_fake
def _(grad, query, key, sent, parent_mask, causal, scale):
    return tuple(t.new_empty(t.shape) for t in (query, key, sent))


def _save(ctx, inputs, output) -> None:
    query, key, sent, parent_mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, sent, parent_mask)


def _backward(ctx, grad):
    return *reversed_tiles_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None, None


reversed_tiles.register_autograd(_backward, setup_context=_save)


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
    hidden = hidden_pairs(some_mask, causal, rows, query.shape[2], key.shape[2], query.device)
    if hidden is None:
        return torch.softmax(scores, -1, out=scores)
    shares = torch.softmax(scores.masked_fill_(hidden, -math.inf), -1, out=scores)
    return shares.masked_fill_(hidden, 0)


def reversed_sdpa(query: Tensor, key: Tensor, sent: Tensor, causal: bool, scale: float) -> Tensor:
    """What the parents receive by torch's fused attention; ``causal`` for as many children as parents only."""
    return _Sdpa.apply(query, key, sent, causal, scale)  # pyright: ignore[reportReturnType]


class _Sdpa(torch.autograd.Function):
    """Gradients of first order; each direction is one pass of SDPA there and back."""

    @staticmethod
    def forward(ctx: Any, query, key, sent, causal, scale):
        ctx.save_for_backward(query, key, sent)
        ctx.options = {"is_causal": causal, "scale": scale}
        # Autograd records no tensor that was made under inference mode, only a copy made outside of it.
        inference = torch.is_inference_mode_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            query, key, sent = (t.clone() if inference else t.detach() for t in (query, key, sent))
            values = sent.new_zeros(*key.shape[:3], sent.shape[3]).requires_grad_()
            out = F.scaled_dot_product_attention(query, key, values, **ctx.options)
            return torch.autograd.grad(out, values, sent)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad):
        query, key, sent = ctx.saved_tensors
        with torch.enable_grad():
            query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
            d_sent = F.scaled_dot_product_attention(query, key, grad, **ctx.options)
            d_query, d_key = torch.autograd.grad(d_sent, (query, key), sent)
        return d_query, d_key, d_sent.detach(), None, None
