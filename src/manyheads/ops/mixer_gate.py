"""Mixer gating: an inner MLP-Mixer computes from all tokens the factor by which every number of a token is multiplied.

With X of shape (N, C), LN the layer norm over channels and FF(x) = W2 GELU(W1 x + b1) + b2 on the last axis::

    V1 = X + FF_tokens(LN_t(X)^T)^T          over the N tokens, the same weights for every channel
    V2 = V1 + FF_channels(LN_c(V1))          the gate: no activation on it
    MGU(X) = (X P + p) * V2                  element by element; no residual, no scale

The weights that tokens give each other thus depend on the input, as in attention, but no N x N matrix of scores is
made: with T hidden units the token mixing costs 2 N T C multiply-adds. W1 and W2 of the tokens belong to one N.

Source: "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", arXiv 2403.02411.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import FLOATS, accumulation_dtype, check_choice

BACKENDS = ("auto", "reference", "fused")

Affine = tuple[Tensor, Tensor]


class GateWeights(NamedTuple):
    """The inner mixer's weights, each a pair (weight, bias), for N tokens of C channels.

    Attributes:
        token_norm: LN_t, both (C).
        token_in: W1 and b1 over tokens, (T, N) and (T).
        token_out: W2 and b2 over tokens, (N, T) and (N).
        channel_norm: LN_c, both (C).
        channel_in: W1 and b1 over channels, (F, C) and (F).
        channel_out: W2 and b2 over channels, (C, F) and (C).
    """

    token_norm: Affine
    token_in: Affine
    token_out: Affine
    channel_norm: Affine
    channel_in: Affine
    channel_out: Affine


def token_mixing_gate(
    x: Float[Tensor, "batch tokens channels"],
    weights: GateWeights,
    *,
    eps: int | float = 1e-5,
    dropout: int | float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch tokens channels"]:
    """The gate V2 alone, which is also what one block of an MLP-Mixer makes of its input.

    Args:
        x: (batch, N, C).
        weights: of the inner mixer.
        eps: of both norms.
        dropout: probability with which a number is dropped after each GELU and each W2; a layer in training gives it.
        backend: "reference" (as written above, in float32 at least), "fused" (token mixing as a batched product that
            reads the tokens where they lie, nothing transposed) or "auto", which is "fused".

    Raises:
        TypeError: an input that is not floating point, or weights of another dtype outside autocast.
        ValueError: weights for another number of tokens or channels, or ``dropout`` outside [0, 1).

    Source: "NiNformer", arXiv 2403.02411.

    >>> import torch
    >>> vector, pair = torch.ones(4), lambda rows, columns: (torch.randn(rows, columns), torch.zeros(rows))
    >>> norm, channels = (vector, vector), (pair(7, 4), pair(4, 7))
    >>> weights = GateWeights(norm, pair(5, 9), pair(9, 5), norm, *channels)
    >>> token_mixing_gate(torch.randn(2, 9, 4), weights).shape
    torch.Size([2, 9, 4])
    """
    _check(x, weights, None, dropout, backend)
    return (_reference_gate if backend == "reference" else _fused_gate)(x, weights, eps, dropout).to(x.dtype)


def mixer_gating(
    x: Float[Tensor, "batch tokens channels"],
    projection: Affine,
    weights: GateWeights,
    *,
    eps: int | float = 1e-5,
    dropout: int | float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch tokens channels"]:
    """The gating unit: a projection of every token, times the gate that the inner mixer makes of all tokens.

    Args:
        x: (batch, N, C).
        projection: P as (C, C), transposed as ``torch.nn.Linear`` keeps it, and p as (C).
        weights, eps, dropout, backend: as in ``token_mixing_gate``.

    Raises:
        TypeError, ValueError: as in ``token_mixing_gate``, and for a projection of another width.

    Source: "NiNformer", arXiv 2403.02411.

    >>> import torch
    >>> vector, pair = torch.ones(4), lambda rows, columns: (torch.randn(rows, columns), torch.zeros(rows))
    >>> norm, channels = (vector, vector), (pair(7, 4), pair(4, 7))
    >>> weights = GateWeights(norm, pair(5, 9), pair(9, 5), norm, *channels)
    >>> mixer_gating(torch.randn(2, 9, 4), pair(4, 4), weights).shape
    torch.Size([2, 9, 4])
    """
    _check(x, weights, projection, dropout, backend)
    if backend == "reference":
        wide = accumulation_dtype(x.dtype)
        projected = x.to(wide) @ projection[0].to(wide).mT + projection[1].to(wide)
        return (projected * _reference_gate(x, weights, eps, dropout)).to(x.dtype)
    return (F.linear(x, *projection) * _fused_gate(x, weights, eps, dropout)).to(x.dtype)


def resize_token_mixing(
    token_in: Affine, token_out: Affine, old: tuple[int, int], new: tuple[int, int]
) -> tuple[Affine, Affine]:
    """Weights of the token mixing for a map of another size, interpolated bicubically over positions.

    W1 is also scaled by the ratio of both numbers of tokens, so that a constant map gives the same hidden values as
    before (exactly where the interpolation keeps the sum of a row).

    Args:
        token_in: (T, N) and (T).
        token_out: (N, T) and (N).
        old: sides of the map that the weights are for, N positions row by row.
        new: sides of the other map.

    Returns:
        ``token_in`` and ``token_out`` for ``new``; this extension is not in the paper, whose N is fixed.

    >>> import torch
    >>> a, b = (torch.ones(5, 16), torch.ones(5)), (torch.ones(16, 5), torch.ones(16))
    >>> [tuple(x.shape) for pair in resize_token_mixing(a, b, (4, 4), (6, 3)) for x in pair]
    [(5, 18), (5,), (18, 5), (18,)]
    """
    for name, tensor, tokens in (("token_in", token_in[0], token_in[0].shape[1]), ("token_out", *_rows(token_out))):
        if tokens != old[0] * old[1]:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not for a map of {old[0]} x {old[1]}")
    if min(new) < 1:
        raise ValueError(f"new={new} must be positive")
    if old == new:
        return token_in, token_out

    def resize(rows: Tensor) -> Tensor:
        image = rows.unflatten(1, old)[None].to(accumulation_dtype(rows.dtype))
        return F.interpolate(image, size=new, mode="bicubic", align_corners=False)[0].flatten(1)

    first = resize(token_in[0]) * (old[0] * old[1] / (new[0] * new[1]))
    second, bias = resize(token_out[0].mT).mT, resize(token_out[1][None])[0]
    kind = token_in[0].dtype
    return (first.to(kind), token_in[1]), (second.contiguous().to(kind), bias.to(kind))


def _rows(pair: Affine) -> tuple[Tensor, int]:
    return pair[0], pair[0].shape[0]


def _fused_gate(x: Tensor, weights: GateWeights, eps: int | float, dropout: int | float) -> Tensor:
    channels, (into, into_bias), (out, out_bias) = x.shape[-1:], weights.token_in, weights.token_out
    # A stride of zero repeats the weights over the batch, so that tokens are mixed along their own axis.
    batch = x.shape[0]
    hidden = F.layer_norm(x, channels, *weights.token_norm, eps=eps)
    hidden = torch.baddbmm(into_bias[:, None], into.expand(batch, -1, -1), hidden)
    hidden = F.dropout(F.gelu(hidden), dropout)
    mixed = x + F.dropout(torch.baddbmm(out_bias[:, None], out.expand(batch, -1, -1), hidden), dropout)
    hidden = F.linear(F.layer_norm(mixed, channels, *weights.channel_norm, eps=eps), *weights.channel_in)
    return mixed + F.dropout(F.linear(F.dropout(F.gelu(hidden), dropout), *weights.channel_out), dropout)


def _reference_gate(x: Tensor, weights: GateWeights, eps: int | float, dropout: int | float) -> Tensor:
    wide = accumulation_dtype(x.dtype)
    x = x.to(wide)
    token_norm, token_in, token_out, channel_norm, channel_in, channel_out = (
        (weight.to(wide), bias.to(wide)) for weight, bias in weights
    )

    def norm(x: Tensor, affine: Affine) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * affine[0] + affine[1]

    def feed_forward(x: Tensor, first: Affine, second: Affine) -> Tensor:
        hidden = x @ first[0].mT + first[1]
        hidden = F.dropout(0.5 * hidden * (1 + torch.erf(hidden * 2**-0.5)), dropout)
        return F.dropout(hidden @ second[0].mT + second[1], dropout)

    mixed = x + feed_forward(norm(x, token_norm).mT, token_in, token_out).mT
    return mixed + feed_forward(norm(mixed, channel_norm), channel_in, channel_out)


def _check(x: Tensor, weights: GateWeights, projection: Affine | None, dropout: int | float, backend: str) -> None:
    check_choice("backend", backend, BACKENDS)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, tokens, channels), got shape {tuple(x.shape)}")
    _, tokens, channels = x.shape
    hidden, inner = weights.token_in[0].shape[0], weights.channel_in[0].shape[0]
    if weights.token_in[0].shape[-1] != tokens:
        raise ValueError(f"the weights mix {weights.token_in[0].shape[-1]} tokens, x has {tokens}")
    wanted: dict[str, tuple[int, ...]] = {
        "token_norm": (channels,),
        "token_in": (hidden, tokens),
        "token_out": (tokens, hidden),
        "channel_norm": (channels,),
        "channel_in": (inner, channels),
        "channel_out": (channels, inner),
    }
    given = weights._asdict()
    if projection is not None:
        wanted["projection"], given["projection"] = (channels, channels), projection
    for name, shape in wanted.items():
        weight, bias = given[name]
        if tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
            found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ValueError(
                f"{name} must be {shape} and {shape[:1]} for x of {tokens} tokens and {channels} channels, got {found}"
            )
        if (weight.dtype != x.dtype or bias.dtype != x.dtype) and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must be {x.dtype} like x, got {weight.dtype} and {bias.dtype}")
