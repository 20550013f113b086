"""The learned router over heads, and mixture-of-head attention with its projections.

    g = router(x),    o_i = attention of head i,    y = W_o concat_i( g_i o_i ) + b_o

The router reads the tokens that queries are made from, so tokens may attend to themselves, to what came before them or
to other tokens. Its load-balancing loss is collected from outside (``collect_routing``): nothing is kept in the layer.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.ops.mixture_of_heads import Routing, check_routing, learned_routing, mixture_of_heads_attention

Cache = tuple[Tensor, Tensor]


class HeadRouter(nn.Module):
    """Gates of all heads for every token: three linear maps without biases.

    Args:
        dim: width of the tokens.
        heads: h, all heads.
        shared: h_s, the first heads, which every token uses.
        active: K, how many of the other heads each token uses.

    State: ``wg`` (routed heads; where there are any), ``wg_0`` (shared against routed; where there are both), ``wg_1``
    (shared heads; where there are two or more).

    Shape: (..., dim) to a ``Routing`` with gates (..., heads).

    Raises:
        ValueError: head counts that do not add up.

    Source: arXiv 2410.11842, section 3.3.

    >>> import torch
    >>> found = HeadRouter(16, 8, shared=3, active=2)(torch.randn(2, 7, 16))
    >>> found.gates.shape, found.chosen.sum(-1).unique().tolist()
    (torch.Size([2, 7, 8]), [2])
    """

    def __init__(self, dim: int, heads: int, *, shared: int, active: int) -> None:
        super().__init__()
        check_routing(heads, shared, active)
        self.dim, self.heads, self.shared, self.active = dim, heads, shared, active
        routed = heads - shared
        self.wg = nn.Linear(dim, routed, bias=False) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, bias=False) if shared > 1 else None

    def forward(self, x: Float[Tensor, "... dim"]) -> Routing:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be (..., {self.dim}), got shape {tuple(x.shape)}")
        shared = self.wg_1(x) if self.wg_1 is not None else x.new_zeros(*x.shape[:-1], 1) if self.shared else None
        routed, balance = (None if part is None else part(x) for part in (self.wg, self.wg_0))
        return learned_routing(routed, shared, balance, active=self.active)


class CollectedRouting(dict[HeadRouter, Routing]):
    """What every router decided in its last call; see ``collect_routing``."""

    def balance_loss(self, real: Tensor | None = None) -> Tensor:
        """The load-balancing loss, averaged over the layers that route; 0 where none does.

        Args:
            real: (batch, tokens), True for the tokens that count; None counts all.
        """
        losses = [routing.balance_loss(real) for router, routing in self.items() if router.wg is not None]
        return torch.stack(losses).mean() if losses else torch.zeros(())


@contextmanager
def collect_routing(model: nn.Module) -> Iterator[CollectedRouting]:
    """Collect what the routers of a model decide inside the ``with`` block.

    >>> import torch
    >>> layer = MixtureOfHeadsAttention(16, 4, shared=1, active=1)
    >>> with collect_routing(layer) as routing:
    ...     out = layer(torch.randn(2, 5, 16))
    >>> loss = out.square().mean() + 0.01 * routing.balance_loss()
    """
    found = CollectedRouting()

    def keep(router: nn.Module, inputs: tuple, routing: Routing) -> None:
        found[cast(HeadRouter, router)] = routing

    handles = [part.register_forward_hook(keep) for part in model.modules() if isinstance(part, HeadRouter)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class MixtureOfHeadsAttention(nn.Module):
    """Multi-head attention whose heads are chosen and weighed by every token.

    Args:
        dim: width of the tokens.
        heads: query heads.
        shared: h_s, the first heads, which every token uses.
        active: K, how many of the others each token uses.
        head_dim: width of a head; None means ``dim / heads``, which must be whole.
        kv_heads: key/value heads, a divisor of ``heads``; None means as many. Gates belong to query heads.
        causal: later tokens are hidden.
        qkv_bias: bias of the fused input projection (order q, k, v).
        proj_drop: dropout on the output.
        backend: as in ``manyheads.ops.mixture_of_heads.mixture_of_heads_attention``.

    Shape: (batch, tokens, dim), returned as it came.

    Raises:
        ValueError: head counts that do not add up; in ``forward``, other widths or masks that do not fit.

    Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.

    >>> import torch
    >>> layer = MixtureOfHeadsAttention(16, 4, shared=1, active=1, causal=True)
    >>> x = torch.randn(2, 5, 16)
    >>> out, cache = layer.step(x[:, :3])
    >>> last, _ = layer.step(x[:, 3:], cache)
    >>> torch.allclose(torch.cat([out, last], dim=1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shared: int,
        active: int,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = False,
        qkv_bias: bool = True,
        proj_drop: int | float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}; give head_dim")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or dim // heads
        self.causal, self.backend = causal, backend
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=qkv_bias)
        self.router = HeadRouter(dim, heads, shared=shared, active=active)
        self.proj = nn.Linear(heads * self.head_dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        context: Float[Tensor, "batch keys dim"] | None = None,
        *,
        real: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend to the tokens themselves, or to ``context``.

        Args:
            x: (batch, tokens, dim).
            context: (batch, keys, dim), what keys and values are made from; None is x.
            real: (batch, keys), False for padding among the keys.
        """
        if context is None:
            query, key, value = self._project(self.qkv(x), self.heads, self.kv_heads, self.kv_heads)
        else:
            width = self.heads * self.head_dim
            weight, bias = self.qkv.weight, self.qkv.bias
            parts = ((x, slice(width)), (context, slice(width, None)))
            of_x, of_context = (F.linear(y, weight[rows], None if bias is None else bias[rows]) for y, rows in parts)
            (query,) = self._project(of_x, self.heads)
            key, value = self._project(of_context, self.kv_heads, self.kv_heads)
        return self._attend(x, query, key, value, real)

    def step(
        self, x: Float[Tensor, "batch tokens dim"], cache: Cache | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], Cache]:
        """Attend causally to the tokens of earlier calls too: gates belong to the new tokens alone.

        Args:
            x: (batch, tokens, dim), one token or more.
            cache: (key, value) as the previous call returned it, each (batch, kv_heads, tokens, head_dim).

        Raises:
            ValueError: a layer that is not causal.
        """
        if not self.causal:
            raise ValueError("step continues a sequence, which needs causal=True")
        query, key, value = self._project(self.qkv(x), self.heads, self.kv_heads, self.kv_heads)
        if cache is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip(cache, (key, value)))
        return self._attend(x, query, key, value, None), (key, value)

    def _project(self, x: Tensor, *heads: int) -> list[Tensor]:
        parts = x.split([count * self.head_dim for count in heads], dim=-1)
        return [rearrange(part, "b n (h d) -> b h n d", d=self.head_dim) for part in parts]

    def _attend(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        if real is not None and tuple(real.shape) != (key.shape[0], key.shape[2]):
            raise ValueError(f"real must be (batch, keys) = {(key.shape[0], key.shape[2])}, got {tuple(real.shape)}")
        mask = None if real is None else real[:, None, None]
        gates = self.router(x).gates.transpose(1, 2)
        out = mixture_of_heads_attention(query, key, value, gates, mask=mask, causal=self.causal, backend=self.backend)
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))
