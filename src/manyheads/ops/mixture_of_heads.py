"""Mixture-of-head attention: every token chooses and weighs the heads whose outputs it receives.

With o_i the output of head i before the output projection, h_s shared heads (the first ones) that all tokens use, h_r
routed ones, and K of these active for each token::

    g = concat( a0 h_s softmax(W_1 x),  a1 K P m / sum_j P_j m_j ),      (a0, a1) = 2 softmax(W_0 x)
    P = softmax(W x) over the routed heads,     m_i = 1 where P_i is one of the K largest, else 0
    y = W_o concat_i( g_i o_i )

The paper's formula has neither the factors h_s, K and 2 nor the division by the chosen sum; these are the authors'
code, on which their checkpoints rest. Pretrained language models have no W: there the norm of a head's query is its
score, and the chosen heads count fully::

    P = softmax( l / std(l) ),  l_i = |q_i|        g_i = 1 for shared and chosen heads, else 0

Routing looks at one token at a time, so it goes with any attention: causal or not, to the same or to other tokens.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, and the authors' code.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv
from manyheads.engines.dense import attention

BACKENDS = ("auto", "reference", "dense", "gathered")
# What "auto" needs before it gathers: below, sorting and copying rows costs more than the attention that it saves.
# Measured on two CPU cores, head_dim 64, float32 (the crossing lies between 512 and 1024 keys).
GATHER_KEYS = 1024
GATHER_SHARE = 0.6
# Rows of a causal call that share one cut of the keys.
CAUSAL_ROWS = 256


class Routing(NamedTuple):
    """What a router decided for every token.

    Attributes:
        gates: (..., heads), the factor of every head's output; exactly 0 where a head was not chosen.
        probabilities: (..., routed), P, softmax scores of the routed heads.
        chosen: (..., routed), True for the K chosen ones.
    """

    gates: Tensor
    probabilities: Tensor
    chosen: Tensor

    def balance_loss(self, real: Tensor | None = None) -> Tensor:
        """The load-balancing loss of these tokens; see ``load_balance_loss``."""
        return load_balance_loss(self.probabilities, self.chosen, real=real)


def check_routing(heads: int, shared: int, active: int) -> None:
    """Raise ValueError unless ``shared`` always-on heads and ``active`` of the others make sense for ``heads`` heads.

    >>> check_routing(8, 6, 3)
    Traceback (most recent call last):
        ...
    ValueError: active=3 heads of heads - shared = 2 routed ones cannot be chosen
    """
    if not 0 <= shared <= heads or heads < 1:
        raise ValueError(f"shared={shared} must lie between 0 and heads={heads}")
    if not 0 <= active <= heads - shared:
        raise ValueError(f"active={active} heads of heads - shared = {heads - shared} routed ones cannot be chosen")
    if active == 0 and shared < heads:
        raise ValueError(f"active=0 would leave {heads - shared} of heads={heads} unused: shared={shared} is below it")


def learned_routing(
    routed: Float[Tensor, "... routed"] | None,
    shared: Float[Tensor, "... shared"] | None,
    balance: Float[Tensor, "... 2"] | None,
    *,
    active: int,
) -> Routing:
    """Gates of shared and routed heads from the three linear maps of a token.

    Args:
        routed: W x, (..., h_r); None where no head is routed.
        shared: W_1 x, (..., h_s); None where no head is shared. One shared head has gate 1 before the balance,
            whatever its score.
        balance: W_0 x, (..., 2), for (shared, routed); needed where there are both.
        active: K, routed heads that each token uses.

    Raises:
        ValueError: neither kind of head, K out of range, ``balance`` where it has nothing to balance, or none where it
            has.

    Source: arXiv 2410.11842, equations 5 to 8, with the factors of the authors' code.

    >>> import torch
    >>> found = learned_routing(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.3]]), torch.zeros(1, 2), active=2)
    >>> [round(gate, 3) for gate in found.gates[0].tolist()]
    [1.0, 1.462, 0.0, 0.538]
    """
    given = routed if routed is not None else shared
    if given is None:
        raise ValueError("routed and shared are both None: there is no head to weigh")
    h_r, h_s = (0 if scores is None else scores.shape[-1] for scores in (routed, shared))
    check_routing(h_s + h_r, h_s, active)
    if (balance is not None) != (h_s > 0 and h_r > 0):
        raise ValueError(f"balance is for shared and routed heads together; here are {h_s} and {h_r}")
    wide = accumulation_dtype(given.dtype)
    always, sometimes = torch.ones((), dtype=wide), torch.ones((), dtype=wide)
    if balance is not None:
        always, sometimes = (2 * balance.to(wide).softmax(-1)).split(1, dim=-1)
    gates: list[Tensor] = []
    if shared is not None:
        gates.append(always.to(given.device) * h_s * shared.to(wide).softmax(-1))
    if routed is None:
        empty = given.new_empty(*given.shape[:-1], 0)
        return Routing(gates[0].to(given.dtype), empty, empty.bool())
    scores = routed.to(wide).softmax(-1)
    chosen = _top(scores, active)
    kept = scores.masked_fill(~chosen, 0)
    share = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).eps)
    gates.append(sometimes.to(given.device) * active * share)
    return Routing(torch.cat(gates, dim=-1).to(given.dtype), scores, chosen)


def query_norm_routing(
    query: Float[Tensor, "batch heads tokens head_dim"], *, shared: int, active: int, straight_through: bool = False
) -> Routing:
    """Gates of a pretrained model's heads, without parameters: the heads with the longest queries are chosen.

    Rotary embeddings keep norms, so the query may be taken before or after them.

    Args:
        query: (batch, heads, tokens, head_dim).
        shared: h_s, the first heads, which every token uses.
        active: K, how many of the others each token uses.
        straight_through: let the gates of chosen heads pass their gradient to P, as training does. The values stay 1
            up to rounding.

    Returns:
        Gates 0 and 1, (batch, tokens, heads), float32 or float64; see ``Routing``.

    Raises:
        ValueError: heads that do not add up, or fewer than 2 routed heads (their deviation needs two).

    Source: arXiv 2410.11842, section 4.4 ("parameter-free router"), and the authors' inference code.

    >>> import torch
    >>> query = torch.tensor([3.0, 1.0, 2.0, 5.0]).view(1, 4, 1, 1)
    >>> query_norm_routing(query, shared=1, active=2).gates
    tensor([[[1., 0., 1., 1.]]])
    """
    heads = query.shape[1]
    check_routing(heads, shared, active)
    if heads - shared < 2:
        raise ValueError(f"shared={shared} of {heads} heads leaves fewer than 2 routed ones to compare by their norms")
    norms = query[:, shared:].to(accumulation_dtype(query.dtype)).norm(dim=-1).transpose(1, 2)
    # Softmax and a positive divisor keep the order; a token whose norms are all equal has no deviation to divide by.
    chosen = _top(norms, active)
    deviation = norms.std(-1, keepdim=True)
    scores = (norms / deviation.where(deviation > 0, 1)).softmax(-1)
    kept = chosen.to(norms.dtype)
    if straight_through:
        kept = (scores + (1 - scores).detach()).masked_fill(~chosen, 0)
    return Routing(torch.cat([kept.new_ones(*kept.shape[:-1], shared), kept], dim=-1), scores, chosen)


def load_balance_loss(
    probabilities: Float[Tensor, "... routed"],
    chosen: Bool[Tensor, "... routed"],
    *,
    real: Tensor | None = None,
) -> Tensor:
    """h_r sum_i mean_t(P_ti) mean_t(m_ti), which is K where all routed heads are used alike.

    Args:
        probabilities: P, (..., routed).
        chosen: m, (..., routed).
        real: (...), True for the tokens that count; None counts all. Without a token, or a head to choose from, the
            loss is 0.

    Raises:
        ValueError: ``real`` that is not of these tokens.

    Source: arXiv 2410.11842, equation 9; the factor h_r as in the authors' code.

    >>> import torch
    >>> load_balance_loss(torch.full((6, 4), 0.25), torch.tensor([True, True, False, False]).expand(6, 4))
    tensor(2.)
    """
    routed = probabilities.shape[-1]
    if real is not None and real.numel() != probabilities.shape[:-1].numel():
        raise ValueError(f"real must say of tokens {tuple(probabilities.shape[:-1])}, got shape {tuple(real.shape)}")
    if routed == 0:
        return probabilities.sum()
    weights = probabilities.new_ones(probabilities.shape[:-1]) if real is None else real.to(probabilities.dtype)
    weights = (weights / weights.sum().clamp(min=1)).reshape(-1, 1)
    means = (weights * probabilities.reshape(-1, routed)).sum(0), (weights * chosen.reshape(-1, routed)).sum(0)
    return routed * (means[0] * means[1]).sum()


def mixture_of_heads_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    gates: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """g_i o_i: the output of every head times its gate; what has gate 0 need not be computed.

    A gate of exactly 0 says that its head was not chosen; no gradient flows into it.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); kv_heads divides heads.
        value: (batch, kv_heads, keys, value_dim).
        gates: (batch, heads, queries); ``Routing.gates`` transposed.
        mask, bias, causal, scale: as in ``manyheads.engines.dense.attention``; the mask is a tensor.
        backend: "reference" (the equations), "dense" (all heads, times their gates), "gathered" (a head that at most
            ``GATHER_SHARE`` of the queries chose attends with these alone, half of that for causal attention) or
            "auto": gathered from ``GATHER_KEYS`` keys on. Who chose a head is read from the gates, so compiled graphs
            take "dense".

    Raises:
        TypeError: dtypes that do not fit, a mask that is no tensor.
        ValueError: shapes that do not fit.

    Source: arXiv 2410.11842, equation 4.

    >>> import torch
    >>> q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    >>> gates = query_norm_routing(q, shared=1, active=2).gates.transpose(1, 2)
    >>> mixture_of_heads_attention(q, k, k, gates).shape
    torch.Size([2, 4, 5, 8])
    """
    check_choice("backend", backend, BACKENDS)
    check_qkv(query, key, value)
    if tuple(gates.shape) != tuple(query.shape[:3]):
        raise ValueError(f"gates must be (batch, heads, queries) = {tuple(query.shape[:3])}, got {tuple(gates.shape)}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a boolean tensor, got {type(mask).__name__}")
    if backend == "auto":
        backend = "dense" if torch.compiler.is_compiling() or key.shape[2] < GATHER_KEYS else "gathered"
    if backend == "gathered" and gates.numel():
        # How many queries chose each head, in the sequence where they are most.
        counts = (gates != 0).sum(-1).amax(0).tolist()
        limit = query.shape[2] * (GATHER_SHARE / 2 if causal else GATHER_SHARE)
        seldom = [head for head, count in enumerate(counts) if count <= limit]
        often = [head for head, count in enumerate(counts) if count > limit]
        if seldom:
            mask, bias = (_four_axes(extra, query, key) for extra in (mask, bias))
            options = {"causal": causal, "scale": scale}
            # At least one, so that the output depends on its inputs.
            most = max(1, *(counts[head] for head in seldom))
            few = _gathered(*_heads(seldom, query, key, value, gates, mask, bias), most=most, **options)
            if not often:
                return few
            all_queries = _dense(*_heads(often, query, key, value, gates, mask, bias), **options)
            back = torch.tensor(often + seldom, device=query.device).argsort()
            return torch.cat([all_queries, few], dim=1).index_select(1, back)
    return _dense(query, key, value, gates, mask, bias, causal=causal, scale=scale, backend=backend)


def _dense(query, key, value, gates, mask, bias, *, causal, scale, backend="auto") -> Tensor:
    engine = "reference" if backend == "reference" else "auto"
    out = attention(query, key, value, mask=mask, bias=bias, causal=causal, scale=scale, backend=engine)
    return _gated(cast(Tensor, out), gates)


def _gathered(query, key, value, gates, mask, bias, *, most, causal, scale) -> Tensor:
    """Attention of ``most`` queries of each head, the chosen ones before others; what was not chosen stays 0."""
    queries, keys = query.shape[2], key.shape[2]
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    # Stable, so that chosen rows keep their order and a causal block of them needs few keys beyond its first row's.
    index = (gates != 0).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    for rows in index.split(CAUSAL_ROWS if causal else most, dim=-1):
        seen, stop = None if mask is None else _rows(mask, rows), keys
        if causal:
            last = rows + keys - queries
            stop = max(int(last.max()) + 1, 1)
            before = torch.arange(stop, device=rows.device) <= last[..., None]
            seen = before if seen is None else seen[..., :stop] & before
        part = attention(
            _rows(query, rows), key[:, :, :stop], value[:, :, :stop], mask=seen,
            bias=None if bias is None else _rows(bias, rows)[..., :stop], scale=scale,
        )  # fmt: skip
        part = _gated(cast(Tensor, part), gates.gather(2, rows))
        out = out.scatter(2, rows[..., None].expand_as(part), part)
    return out


def _gated(out: Tensor, gates: Tensor) -> Tensor:
    gates = gates[..., None].to(out.dtype)
    return (out * gates).masked_fill(gates == 0, 0)


def _top(scores: Tensor, active: int) -> Tensor:
    best = scores.topk(active, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """The queries ``rows`` (batch, heads, few) of every head of x, (batch or 1, heads or 1, queries, width)."""
    x = x.expand(*rows.shape[:2], *x.shape[2:])
    return x.gather(2, rows[..., None].expand(*rows.shape, x.shape[-1]))


def _heads(wanted: list[int], query, key, value, gates, mask, bias) -> list:
    """Some of the query heads of everything, with a key/value head for each; mask and bias may serve all heads."""
    heads = torch.tensor(wanted, device=query.device)
    groups = heads // (query.shape[1] // key.shape[1])
    extras = [x if x is None or x.shape[1] == 1 else x.index_select(1, heads) for x in (mask, bias)]
    pairs = ((query, heads), (key, groups), (value, groups), (gates, heads))
    return [*(x.index_select(1, index) for x, index in pairs), *extras]


def _four_axes(x: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Mask or bias with its queries and keys written out; batch and heads may stay 1."""
    if x is None:
        return None
    x = x[(None,) * (4 - x.ndim)]
    return x.expand(*x.shape[:2], query.shape[2], key.shape[2])
