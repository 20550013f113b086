"""The linear engine: attention without a softmax over pairs, so that a state of fixed size stands for the past.

With feature map phi, log decay g <= 0 and scale c::

    S_i = exp(g_i) S_{i-1} + phi(k_i) v_i^T          (head_dim x value_dim, float32)
    o_i = c phi(q_i) S_i   =   c sum_{j<=i} exp(g_{j+1} + ... + g_i) (phi(q_i) . phi(k_j)) v_j

The own token has weight 1; the state is decayed before a token is added. Without causality there is no decay and
S = S_0 + sum_j phi(k_j) v_j^T serves every query. Normalised attention divides by the same sum with v replaced by 1.

Sources: "Transformers are RNNs", arXiv 2006.16236; "Various Lengths, Constant Speed", arXiv 2405.17381 (decay);
"Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635 (gates).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.features import FeatureMap, resolve_feature_map
from manyheads.engines.linear_chunked import CHANNEL_CHUNK, CLOSED, chunked, sequence_bounds

BACKENDS = ("auto", "reference", "recurrent", "chunked", "triton")


def linear_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch key_heads key_tokens head_dim"],
    value: Float[Tensor, "batch key_heads key_tokens value_dim"],
    *,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap | str | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    causal: bool = True,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with optional decay, gates, feature maps and normaliser; time and memory linear in tokens.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, key_heads, key_tokens, head_dim); key_heads divides heads (grouped-query attention).
        value: (batch, key_heads, key_tokens, value_dim).
        log_decay: logarithm of the decay, <= 0; causal only. Shape (heads,) for a constant decay per head (lightning
            attention, retention), (batch, heads, tokens) for a gate per token (Mamba-2, simple GLA), (batch, heads,
            tokens, head_dim) for a gate per token and key channel (GLA). Gates get gradients. ``-inf`` resets.
        feature_map: phi, applied to query and key: None, a name of :data:`manyheads.engines.features.FEATURE_MAPS`,
            or a callable on (..., head_dim); it may change the width.
        normalize: divide by the sum of the weights. The state then has value_dim + 1 columns, the last one holding
            the normaliser (sum of keys).
        eps: added to the normaliser.
        causal: query i sees keys up to i; needs as many keys as queries (earlier keys enter as ``initial_state``).
            False: every query sees every key; key_tokens is free (cross attention), decay is not defined.
        scale: factor on the scores; 1 by default as in the papers of this family; None means ``head_dim ** -0.5``.
        initial_state: state before the first token, (batch or sequences, heads, head_dim of phi, value_dim [+ 1]),
            float32 (float64 for float64 inputs). It gets gradients.
        cu_seqlens: integer borders (sequences + 1,) of sequences packed along the tokens of a batch of 1: the state
            starts anew at each border, state i belongs to sequence i.
        chunk: tokens per chunk of the chunked and triton backends; any value gives the same result. A gate per
            channel uses at most 16, triton a multiple of 16 up to 64.
        return_state: also return the state after the last token, shaped like ``initial_state``; differentiable.
        backend: "reference" (every weight of every pair, memory tokens squared), "recurrent" (token by token),
            "chunked" (torch, any device; keeps tokens / chunk states for the backward pass), "triton" (GPU; forward
            and backward; no gate per channel, head_dim up to 256) or "auto" (triton on a GPU where it serves).

    Returns:
        The output (batch, heads, tokens, value_dim) in the dtype of query, or (output, state).

    Raises:
        TypeError: mixed or integer dtypes, a state that is not float32.
        ValueError: shapes that do not fit, decay above 0, decay or unequal lengths without or with causality
            respectively, borders that do not tile the tokens, a chunk below 1.

    Source: "Transformers are RNNs", arXiv 2006.16236, section 3; decay: arXiv 2405.17381, section 3.

    >>> import torch
    >>> x = torch.randn(1, 2, 100, 16)
    >>> out, state = linear_attention(x, x, x, log_decay=torch.tensor([-0.5, -0.1]), return_state=True)
    >>> out.shape, state.shape
    (torch.Size([1, 2, 100, 16]), torch.Size([1, 2, 16, 16]))
    """
    check_choice("backend", backend, BACKENDS)
    check_qkv(query, key, value)
    phi, scale = resolve_feature_map(feature_map), resolve_scale(scale, query.shape[-1])
    if phi is not None:
        query, key = phi(query), phi(key)
    if normalize:
        value = F.pad(value, (0, 1), value=1.0)
    _check(query, key, value, log_decay, causal, initial_state, cu_seqlens, chunk)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if log_decay is not None and log_decay.ndim == 1 and log_decay.requires_grad:
        log_decay = log_decay[None, :, None].expand(query.shape[:3])  # a learned decay is a gate that all tokens share

    backend = _choose(backend, query, value, log_decay, causal, cu_seqlens)
    arguments = (query, key, value, log_decay, initial_state, cu_seqlens, scale)
    if backend == "direct":
        out, state = _noncausal(query, key, value, initial_state, scale)
    elif backend in ("reference", "recurrent"):
        out, state = _each_sequence(_reference if backend == "reference" else _recurrent, *arguments, causal)
    else:
        gradient = any(x is not None and x.requires_grad for x in (query, key, value, log_decay, initial_state))
        keep = gradient and torch.is_grad_enabled()
        if backend == "triton":
            from manyheads.engines.triton.linear import chunked_triton

            out, state, _ = chunked_triton(*arguments, triton_chunk(chunk, query.shape[-1]), keep)
        else:
            per_channel = log_decay is not None and log_decay.ndim == 4
            out, state, _ = chunked(*arguments, min(chunk, CHANNEL_CHUNK) if per_channel else chunk, causal, keep)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    return (out, state) if return_state else out


def linear_attention_step(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch key_heads tokens head_dim"],
    value: Float[Tensor, "batch key_heads tokens value_dim"],
    state: Tensor | None,
    *,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap | str | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    scale: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """Decoding: one or a few new tokens against the state; the cost does not depend on how much came before.

    Args:
        query: (batch, heads, tokens, head_dim), usually one token; key and value alike, grouped heads allowed.
        key: as in :func:`linear_attention`.
        value: as in :func:`linear_attention`.
        state: (batch, heads, head_dim of phi, value_dim [+ 1 with ``normalize``]) in float32, or None for an empty
            past. It is not changed in place.
        log_decay: as in :func:`linear_attention`, for the new tokens.
        feature_map: as in :func:`linear_attention`.
        normalize: as in :func:`linear_attention`.
        eps: as in :func:`linear_attention`.
        scale: as in :func:`linear_attention`.

    Returns:
        (output, new state).

    Raises:
        TypeError, ValueError: as :func:`linear_attention`.

    Source: "Transformers are RNNs", arXiv 2006.16236, section 3.4.

    >>> import torch
    >>> x = torch.randn(1, 2, 1, 16)
    >>> out, state = linear_attention_step(x, x, x, None)
    >>> state.shape
    torch.Size([1, 2, 16, 16])
    """
    options: dict[str, Any] = dict(
        log_decay=log_decay, feature_map=feature_map, normalize=normalize, eps=eps, scale=scale
    )
    return linear_attention(  # pyright: ignore[reportReturnType]
        query, key, value, initial_state=state, return_state=True, backend="recurrent", **options
    )


def triton_chunk(chunk: int, head_dim: int) -> int:
    """The kernels' tile: a power of two within 16..64 (32 where head_dim is above 128, to stay in registers)."""
    return 16 if chunk < 32 else 32 if chunk < 64 or head_dim > 128 else 64


def _choose(
    backend: str, query: Tensor, value: Tensor, log_decay: Tensor | None, causal: bool, cu_seqlens: Tensor | None
) -> str:
    if not causal and cu_seqlens is None and backend in ("auto", "chunked"):
        return "direct"
    missing = None
    if not causal:
        missing = "causal=True"
    elif log_decay is not None and log_decay.ndim == 4:
        missing = "a decay per head or per token, not per channel"
    elif query.dtype == torch.float64:
        missing = "float32, bfloat16 or float16"
    elif query.shape[-1] > 256:
        missing = f"head_dim up to 256 (after the feature map), got {query.shape[-1]}"
    elif not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        missing = "tensors on a GPU"
    if backend == "triton" and missing:
        raise ValueError(f"backend='triton' needs {missing}")
    if backend == "auto":
        return "triton" if query.is_cuda and not missing else "chunked"
    return backend


def _noncausal(query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(query.dtype)
    total = key.to(wide).transpose(-2, -1) @ value.to(wide)
    total = total if state is None else total + state
    return ((query.to(wide) * scale) @ total).to(query.dtype), total


def _each_sequence(
    function, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = accumulation_dtype(query.dtype)
    bounds = sequence_bounds(cu_seqlens, query.shape[2])
    if state is None:
        sequences = query.shape[0] if cu_seqlens is None else len(bounds)
        state = torch.zeros(
            sequences, query.shape[1], query.shape[-1], value.shape[-1], dtype=wide, device=query.device
        )
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay[None, :, None].expand(query.shape[:3])
    wides = query.to(wide) * scale, key.to(wide), value.to(wide)
    gates = None if log_decay is None else log_decay.to(wide)
    gates = gates.unsqueeze(-1) if gates is not None and gates.ndim == 3 else gates
    if cu_seqlens is None:
        out, final = function(*wides, gates, state, causal)
        return out.to(query.dtype), final
    parts = []
    for n, (i, j) in enumerate(bounds):
        piece = (x[:, :, i:j] for x in wides)
        parts.append(function(*piece, None if gates is None else gates[:, :, i:j], state[n : n + 1], causal))
    outs, finals = zip(*parts)
    return torch.cat(outs, dim=2).to(query.dtype), torch.cat(finals)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, state: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Every weight of every pair; ``gates`` is (batch, heads, tokens, 1 or head_dim)."""
    n = key.shape[2]
    if not causal:
        final = state + key.transpose(-2, -1) @ value
        return (query @ key.transpose(-2, -1)) @ value + query @ state, final
    if gates is None or n == 0:
        return (query @ key.transpose(-2, -1)).tril() @ value + query @ state, state + key.transpose(-2, -1) @ value
    total = gates.to(torch.float64).clamp(min=CLOSED).cumsum(dim=2)
    later = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)[:, :, None]
    decay = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(later, -torch.inf).exp().to(query.dtype)
    since = total.exp().to(query.dtype)
    if gates.shape[-1] == 1:
        scores = (query @ key.transpose(-2, -1)) * decay.squeeze(-1)
    else:
        scores = torch.einsum("bhid,bhjd,bhijd->bhij", query, key, decay)
    out = scores @ value + (query * since) @ state
    final = since[:, :, -1].unsqueeze(-1) * state + (key * decay[:, :, -1]).transpose(-2, -1) @ value
    return out, final


def _recurrent(
    query: Tensor, key: Tensor, value: Tensor, gates: Tensor | None, state: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Token by token; without causality the queries read the state that all keys left."""
    outs = []
    for i in range(key.shape[2]):
        if gates is not None:
            state = state * gates[:, :, i].exp().unsqueeze(-1)
        state = state + key[:, :, i].unsqueeze(-1) * value[:, :, i].unsqueeze(-2)
        if causal:
            outs.append((query[:, :, i].unsqueeze(-2) @ state).squeeze(-2))
    if not causal:
        return query @ state, state + 0
    return torch.stack(outs, dim=2) if outs else query[..., :0] @ state[..., :0, :], state + 0


def _check(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, causal: bool, state: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int,
) -> None:  # fmt: skip
    batch, heads, tokens, head_dim = query.shape
    if key.shape[-1] != head_dim:
        raise ValueError(f"feature_map gave query {head_dim} and key {key.shape[-1]} features; they must agree")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if causal and key.shape[2] != tokens:
        raise ValueError(
            f"causal linear attention needs as many keys as queries, got {key.shape[2]} keys and {tokens} queries; "
            "earlier keys enter as initial_state"
        )
    sequences = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens packs sequences into a batch of 1, got a batch of {batch}")
        if key.shape[2] != tokens:
            raise ValueError(f"packed sequences need as many keys ({key.shape[2]}) as queries ({tokens})")
        if cu_seqlens.is_floating_point() or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens must be integers of shape (sequences + 1,), got {cu_seqlens.dtype} "
                f"{tuple(cu_seqlens.shape)}"
            )
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        wanted, wide = (sequences, heads, head_dim, value.shape[-1]), accumulation_dtype(query.dtype)
        if tuple(state.shape) != wanted:
            raise ValueError(
                f"initial_state must have shape {wanted} (batch or sequences, heads, key width, value width), "
                f"got {tuple(state.shape)}"
            )
        if state.dtype != wide:
            raise TypeError(f"initial_state must be {wide}, got {state.dtype}")
        if state.device != query.device:
            raise ValueError(f"initial_state is on {state.device}, query on {query.device}")
    if log_decay is not None:
        if not causal:
            raise ValueError("log_decay needs causal=True: a decay has no meaning where every query sees every key")
        shapes = (heads,), (batch, heads, tokens), (batch, heads, tokens, head_dim)
        if tuple(log_decay.shape) not in shapes or not log_decay.is_floating_point():
            raise ValueError(
                f"log_decay must be floating-point of shape (heads,), (batch, heads, tokens) or (batch, heads, "
                f"tokens, head_dim) = {' or '.join(map(str, shapes))}, got {log_decay.dtype} {tuple(log_decay.shape)}"
            )
        if log_decay.device != query.device:
            raise ValueError(f"log_decay is on {log_decay.device}, query on {query.device}")
    # Reading values would break a traced graph, and stall a GPU for every gate.
    if not torch.compiler.is_compiling():
        if cu_seqlens is not None:
            sequence_bounds(cu_seqlens, tokens)
        if log_decay is not None and (log_decay.ndim == 1 or not log_decay.is_cuda) and not (log_decay <= 0).all():
            worst = log_decay.max().item()
            raise ValueError(f"log_decay must be <= 0 (a decay factor of at most 1), got {worst}")
