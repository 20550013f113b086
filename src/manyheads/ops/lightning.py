"""Lightning attention: exact causal linear attention with a fixed exponential decay per head.

With slope s >= 0 of the head (no softmax, no denominator, no 1/sqrt(head_dim))::

    o_i = sum_{j<=i} exp(-s (i - j)) (q_i . k_j) v_j
    S_i = exp(-s) S_{i-1} + k_i v_i^T,    o_i = S_i^T q_i         (the same, token by token)

Source: "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", arXiv 2405.17381, and
"Lightning Attention-2", arXiv 2401.04658 (the tiling). Version 1, version 2 and the variant without decay compute this
one operator; they differ in how the work is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import check_choice, check_qkv
from manyheads.engines.linear import linear_attention, linear_attention_step

RULES = ("geometric", "linear", "minimax")


def lightning_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch key_heads key_tokens head_dim"],
    value: Float[Tensor, "batch key_heads key_tokens value_dim"],
    *,
    slopes: Tensor | Sequence[float] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    block: int = 64,
    causal: bool = True,
    scale: float | None = 1.0,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with decay in time and memory linear in the tokens, state in and out.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, key_heads, key_tokens, head_dim); grouped heads are repeated, slopes belong to query heads.
        value: (batch, key_heads, key_tokens, value_dim); any value_dim.
        slopes: s, (heads,), >= 0: the decay per token is exp(-s). None means no decay. :func:`lightning_slopes` gives
            the papers' values.
        initial_state: S_0, float32 (batch or sequences, heads, head_dim, value_dim). It is decayed before the first
            token is added, so cutting a sequence anywhere and passing the state on is exact. Gets gradients.
        cu_seqlens: integer borders (sequences + 1,) of sequences packed along the tokens of a batch of 1.
        block: B, tokens per block; every value gives the same result.
        causal: False gives Q (K^T V), defined without slopes only; key_tokens is then free.
        scale: factor on the scores, 1 in the papers; None means ``head_dim ** -0.5`` (flash-linear-attention's
            default).
        return_state: also return the state after the last token, float32; differentiable.
        backend: "reference", "recurrent", "chunked", "triton" or "auto", see
            :func:`manyheads.engines.linear.linear_attention`.

    Returns:
        Output (batch, heads, tokens, value_dim), or (output, state).

    Raises:
        TypeError: mixed or integer dtypes, a state that is not float32.
        ValueError: widths, lengths, heads, slopes, states or borders that do not fit; decay without causality; unequal
            lengths with it; a block below 1.

    Padding: set value to 0 at padded tokens. That is exact for padding on the right, and on the left too, because
    positions enter as differences only.

    flash-linear-attention's ``lightning_attn`` takes (batch, tokens, heads, width) and a log decay per head: transpose,
    and call with ``slopes=-log_decay`` (its rule is ``lightning_slopes(heads, layer=.., layers=.., rule="linear")``)
    and ``scale=None``. Its states have the same layout as here.

    Source: arXiv 2405.17381, section 3; arXiv 2401.04658, section 3.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 4, 100, 32).unbind()
    >>> out, state = lightning_attention(q, k, v, slopes=lightning_slopes(4), return_state=True)
    >>> out.shape, state.shape
    (torch.Size([1, 4, 100, 32]), torch.Size([1, 4, 32, 32]))
    """
    check_qkv(query, key, value)
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    log_decay = _log_decay(slopes, query)
    if not causal and log_decay is not None:
        raise ValueError("slopes need causal=True: the papers define no decay where every query sees every key")
    return linear_attention(
        query, key, value, log_decay=log_decay, causal=causal, scale=scale, initial_state=initial_state,
        cu_seqlens=cu_seqlens, chunk=block, return_state=return_state, backend=backend,
    )  # fmt: skip


def lightning_attention_step(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch key_heads tokens head_dim"],
    value: Float[Tensor, "batch key_heads tokens value_dim"],
    state: Tensor | None,
    *,
    slopes: Tensor | Sequence[float] | None = None,
    scale: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Decoding: S <- exp(-s) S + k v^T, o = S^T q, for one or a few new tokens.

    Args:
        query: (batch, heads, tokens, head_dim), usually one token.
        key: (batch, key_heads, tokens, head_dim).
        value: (batch, key_heads, tokens, value_dim).
        state: (batch, heads, head_dim, value_dim) float32, or None for an empty past; not changed in place.
        slopes: as in :func:`lightning_attention`.
        scale: as in :func:`lightning_attention`.

    Returns:
        (output, new state).

    Raises:
        TypeError, ValueError: as :func:`lightning_attention`.

    Source: arXiv 2405.17381; arXiv 2307.14995, "robust inference".

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 4, 1, 32).unbind()
    >>> out, state = lightning_attention_step(q, k, v, None, slopes=lightning_slopes(4))
    >>> out.shape
    torch.Size([1, 4, 1, 32])
    """
    check_qkv(query, key, value)
    return linear_attention_step(query, key, value, state, log_decay=_log_decay(slopes, query), scale=scale)


def lightning_slopes(
    heads: int,
    *,
    layer: int | None = None,
    layers: int | None = None,
    rule: str = "geometric",
) -> Float[Tensor, " heads"]:
    """The decay slopes s of the papers and of the repositories that re-implement them.

    Args:
        heads: H, number of query heads.
        layer: l, index of the layer, 0 .. layers - 1; None for the slopes before any layer's factor.
        layers: L, number of layers; given exactly when ``layer`` is.
        rule: how slopes depend on head h = 0 .. H-1 and layer.

            - "geometric": the authors' code and released weights. 2^(-8(h+1)/H) for H a power of two; otherwise the
              slopes of the next lower power of two P, then every other slope of 2P heads. Times
              1 - l/(L-1) + 1e-5 (1 + 1e-5 where L = 1).
            - "linear": the paper's text and flash-linear-attention. (8h/H)(1 - l/L); head 0 never decays.
            - "minimax": transformers' MiniMax. 2^(-8(h+1)/H) for every H, times 1 - l/(L-1+1e-5) + 1e-5.

    Returns:
        (heads,) float32, computed in float64.

    Raises:
        ValueError: an unknown rule, no heads, only one of layer and layers, a layer outside 0 .. layers - 1.

    Source: arXiv 2405.17381, section 3; OpenNLPLab/lightning-attention; transformers MiniMax.

    >>> lightning_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    check_choice("rule", rule, RULES)
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    if (layer is None) != (layers is None):
        raise ValueError(f"layer and layers go together, got layer={layer}, layers={layers}")
    if layer is not None and layers is not None and not 0 <= layer < layers:
        raise ValueError(f"layer={layer} is outside 0 .. {layers - 1} (layers={layers})")
    slopes = [8 * h / heads for h in range(heads)] if rule == "linear" else _geometric(heads, rule == "geometric")
    factor = 1.0
    if layer is not None and layers is not None:
        if rule == "linear":
            factor = 1 - layer / layers
        elif rule == "minimax":
            factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
        else:
            factor = 1 - layer / max(layers - 1, 1) + 1e-5
    return (torch.tensor(slopes, dtype=torch.float64) * factor).to(torch.float32)


def _geometric(heads: int, by_powers_of_two: bool) -> list[float]:
    power = 2 ** int(math.log2(heads)) if by_powers_of_two else heads
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]


def _log_decay(slopes: Tensor | Sequence[float] | None, query: Tensor) -> Tensor | None:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        slopes = torch.tensor(list(slopes), dtype=torch.float32)
    heads = query.shape[1]
    if tuple(slopes.shape) != (heads,) or not slopes.is_floating_point():
        raise ValueError(
            f"slopes must be floating-point of shape ({heads},), one per query head, got {slopes.dtype} "
            f"{tuple(slopes.shape)}"
        )
    if not torch.compiler.is_compiling() and not (slopes >= 0).all():
        raise ValueError(f"slopes must be >= 0, got {slopes.tolist()}")
    return -slopes.to(query.device)
