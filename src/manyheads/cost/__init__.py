"""Cost formulas of attention systems. Pure Python."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from manyheads.cost.formulas import Cost, Shape, bilevel_routing, channel, dense, duo, lightning, neighborhood
from manyheads.cost.vision import (
    aggregated,
    halo,
    hilo,
    injective,
    mixer_gate,
    mixture_of_heads,
    multi_axis,
    predicted_pairs,
    reversed_,
    spectral,
    through_agents,
)

__all__ = ["FORMULAS", "Cost", "cost"]

FORMULAS = {
    "dense": dense,
    "neighborhood_attention": neighborhood,
    "lightning_attention": lightning,
    "lightning_attention_2": lightning,
    "davit": channel,
    "dependency_vit": reversed_,
    "biformer": bilevel_routing,
    "agent_attention": through_agents,
    "halonet": halo,
    "inline_attention": injective,
    "litv2": hilo,
    "maxvit": multi_axis,
    "ninformer": mixer_gate,
    "moh": mixture_of_heads,
    "sparsifiner": predicted_pairs,
    "spectformer": spectral,
    "transnext": aggregated,
    "duo_attention": duo,
}

SHARES = ("keep_rate", "basis_density")


def cost(
    system: str,
    length: int,
    *,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    element_bytes: int = 2,
    **settings: Any,
) -> Cost:
    """Operations, traffic and state of one attention call by closed formulas.

    Args:
        system: slug of a system that has formulas, or "dense".
        length: number of tokens.
        batch: sequences in the batch.
        heads: query heads (channel groups for davit).
        kv_heads: key/value heads; None means as many as query heads.
        head_dim: channels of a head.
        element_bytes: bytes of one number of the inputs, 2 for bfloat16.
        settings: the system's own sizes: ``window`` (neighborhood_attention, keys for every query), ``block``
            (lightning), ``regions`` and ``topk`` (biformer), ``window`` (tokens of a side) and ``alpha`` (litv2),
            ``window`` (likewise) and ``pooled`` (transnext), ``partition`` (maxvit), ``block`` and ``halo`` (halonet),
            ``keep_rate``, ``reduce_channels``, ``reduce_tokens``, ``coefficients`` and ``basis_density`` (sparsifiner),
            ``tokens_hidden`` and ``channels_hidden`` (ninformer, units of the gate's two feed-forwards),
            ``shared`` and ``active`` heads (moh), ``retrieval``, ``sinks``, ``recent`` and ``chunk``
            (duo_attention), ``causal`` (dense).

    Raises:
        ValueError: a system without formulas, a setting that it does not have, sizes below one, or heads that are not
            a multiple of the key/value heads.

    >>> ours, dense = cost("lightning_attention", 65536), cost("dense", 65536, causal=True)
    >>> round(dense.forward_flops / ours.forward_flops)
    256
    """
    if system not in FORMULAS:
        raise ValueError(f"{system!r} has no cost formulas{_nearest(system, FORMULAS)}; {', '.join(FORMULAS)} have")
    formula = FORMULAS[system]
    allowed = [name for name in inspect.signature(formula).parameters if name != "shape"]
    for name in settings:
        if name not in allowed:
            choices = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise ValueError(f"{system} has no setting {name!r}{_nearest(name, allowed)}; {choices}")
    kv_heads = heads if kv_heads is None else kv_heads
    sizes: dict[str, int] = dict(length=length, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for name, size in (sizes | {"element_bytes": element_bytes} | settings).items():
        if name in SHARES:
            if not 0 < size <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {size}")
        elif size < (0 if name in ("active", "alpha", "causal", "retrieval", "shared", "sinks") else 1):
            raise ValueError(f"{name} must be at least 1, got {size}")
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    return formula(Shape(element_bytes=element_bytes, **sizes), **settings)


def _nearest(wanted: str, words) -> str:
    close = difflib.get_close_matches(wanted, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
