"""Agent attention: a few agent tokens read the keys for all queries, and the queries read the agents.

    gathered = softmax( scale A K^T + agent_bias ) V                              (agents x value_dim)
    out      = softmax( query_scale Q A^T + query_bias ) gathered  +  shortcut V

Two ordinary softmax attentions, of m agents and over m agents: cost and memory are linear in the tokens.

Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.dense import attention

BACKENDS = ("auto", "reference", "sdpa")


def agent_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    agents: Float[Tensor, "batch agent_heads agents head_dim"],
    *,
    agent_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    query_scale: float | None = None,
    shortcut: int | float = 0.0,
    dropout: int | float = 0.0,
    causal: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Global attention through agent tokens, at a cost of queries x agents + agents x keys.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); kv_heads divides heads. Keys of another sequence make this cross
            attention.
        value: (batch, kv_heads, keys, value_dim).
        agents: A, (batch, heads, agents, head_dim), usually pooled queries; they follow the query heads.
        agent_bias: B1, added to the agents' scores; broadcasts to (batch, heads, agents, keys).
        query_bias: B2, added to the queries' scores; broadcasts to (batch, heads, queries, agents).
        key_mask: boolean (batch, keys), True for real tokens; a sample without any gives zeros (plus the shortcut).
        scale: of the agents' scores; None means ``head_dim ** -0.5``.
        query_scale: of the queries' scores; None means ``scale``. Agent attention in diffusion models takes
            ``(head_dim ** -0.5) ** 0.3``.
        shortcut: c, the share of each token's own value that is added (0.075 in diffusion models); needs as many
            queries as keys.
        dropout: probability with which weights of both softmaxes are dropped (in training only, so pass 0 otherwise).
        causal: must be False. Agents pool over all positions, so that no order of the tokens is kept.
        backend: "reference" (the equations as they stand), "sdpa" (the dense engine twice) or "auto".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes or biases that do not fit, ``causal=True``, a shortcut with unequal lengths, dropout outside
            [0, 1].

    Source: "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874, section 3.

    >>> import torch
    >>> q, k = torch.randn(2, 3, 196, 32), torch.randn(2, 3, 50, 32)
    >>> agent_attention(q, k, k, q[:, :, ::4]).shape
    torch.Size([2, 3, 196, 32])
    """
    check_choice("backend", backend, BACKENDS)
    _check(query, key, value, agents, key_mask, shortcut, dropout, causal)
    _check_bias("agent_bias", agent_bias, (*query.shape[:2], agents.shape[2], key.shape[2]))
    _check_bias("query_bias", query_bias, (*query.shape[:3], agents.shape[2]))
    scale = resolve_scale(scale, query.shape[-1])
    query_scale = scale if query_scale is None else float(query_scale)
    mask = None if key_mask is None else key_mask[:, None, None]
    if backend == "reference" or dropout:
        gathered = _softmax(agents, key, value, agent_bias, mask, scale, dropout)
        out = _softmax(query, agents, gathered, query_bias, None, query_scale, dropout)
    else:
        gathered = attention(agents, key, value, bias=agent_bias, mask=mask, scale=scale)
        assert isinstance(gathered, Tensor)
        out = attention(query, agents, gathered, bias=query_bias, scale=query_scale)
        assert isinstance(out, Tensor)
    if shortcut:
        own = repeat_heads(value, query.shape[1])
        own = own if key_mask is None else own.masked_fill(~key_mask[:, None, :, None], 0)
        out = out + shortcut * own
    return out


def agent_weights(
    query: Tensor,
    agents: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One of the two softmaxes as a matrix: of the queries over the agents, or of the agents over the keys.

    Args:
        query: what asks, (batch, heads, n, head_dim).
        agents: what is asked, (batch, kv_heads, m, head_dim).
        bias: added to the scaled scores.
        mask: boolean, True where a pair attends; a row without any gives zeros.
        scale: None means ``head_dim ** -0.5``.

    Source: "Agent Attention", arXiv 2312.08874.

    >>> import torch
    >>> agent_weights(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 3, 8)).shape
    torch.Size([1, 2, 10, 3])
    """
    wide = accumulation_dtype(query.dtype)
    asked = repeat_heads(agents, query.shape[1]).to(wide)
    scores = resolve_scale(scale, query.shape[-1]) * query.to(wide) @ asked.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(wide)
    if mask is None:
        return scores.softmax(dim=-1)
    # Rows without keys: softmax over finite scores, then zeros, so that no NaN reaches the gradients.
    scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    return scores.softmax(dim=-1).masked_fill(~mask, 0)


def _softmax(query, key, value, bias, mask, scale, dropout) -> Tensor:
    weights = F.dropout(agent_weights(query, key, bias=bias, mask=mask, scale=scale), float(dropout))
    return (weights @ repeat_heads(value, query.shape[1]).to(weights.dtype)).to(query.dtype)


def _check(query, key, value, agents, key_mask, shortcut, dropout, causal) -> None:
    check_qkv(query, key, value)
    check_qkv(query, agents, agents)
    if agents.shape[1] != query.shape[1] or agents.shape[2] == 0:
        raise ValueError(
            f"agents of shape {tuple(agents.shape)} must have the query's {query.shape[1]} heads and at least one token"
        )
    if causal:
        raise ValueError("causal=True is not defined: agents pool over all positions, later ones included")
    if shortcut and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"shortcut={shortcut} adds each token's own value, but there are {query.shape[2]} queries and "
            f"{key.shape[2]} keys"
        )
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} must be between 0 and 1")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2])):
        wanted = (key.shape[0], key.shape[2])
        raise ValueError(f"key_mask must be boolean of shape {wanted}, got {key_mask.dtype} {tuple(key_mask.shape)}")


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is None:
        return
    axes = zip(reversed(bias.shape), reversed(shape))
    if bias.ndim > len(shape) or any(have not in (1, wanted) for have, wanted in axes):
        raise ValueError(f"{name} of shape {tuple(bias.shape)} does not broadcast to {tuple(shape)}")
