"""LASP-2: linear attention over a sharded sequence with one all-gather of states in each direction.

Rank r holds n_r tokens in the order of the sequence. With phi the feature map, g_a <= 0 the log decay of token a and
G_r the sum of a rank's g (0 without decay)::

    M_r = sum_a exp(g_{a+1} + .. + g_n) phi(k_a) v_a^T                 a rank's own state, float32 (d x e)
    all-gather of M_r (and of G_r, where decay depends on the data), meanwhile the attention within the rank
    P_r = sum_{u<r} exp(G_{u+1} + .. + G_{r-1}) M_u                    the state of all ranks before
    o_a = (within the rank) + exp(g_1 + .. + g_a) phi(q_a) P_r

and backward, with dP_r the gradient that a rank has for P_r: all-gather of dP_r, meanwhile the gradients within the
rank, then dM_r = sum_{u>r} exp(G_{r+1} + .. + G_{u-1}) dP_u. Without causality P is the sum of all M_u, dM of all dP_u.
A rank puts B H d e numbers into each all-gather, whatever n is. LASP, its predecessor, passes the state from rank to
rank instead: 2 (W - 1) hops that wait for each other.

Source: "LASP-2: Rethinking Sequence Parallelism for Linear Attention and Its Hybrid", arXiv 2502.07563 (decay follows
from the formulas of LASP, arXiv 2404.02882; gates, initial state and packed sequences are derived alike).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyheads.engines.common import accumulation_dtype, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.features import FeatureMap, resolve_feature_map
from manyheads.engines.linear import _check as check_linear
from manyheads.engines.linear import linear_attention
from manyheads.parallel import recorder
from manyheads.parallel.layouts import cumulative_lengths
from manyheads.parallel.plan import pack, unpack
from manyheads.parallel.wire import TIMEOUT, Pending, Wire, connect, eager, reconnect


def lasp2(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    group: Any = None,
    log_decay: Tensor | None = None,
    causal: bool = True,
    feature_map: FeatureMap | str | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Any = None,
    chunk: int = 64,
    return_state: bool = False,
    timeout: int | float = TIMEOUT,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention over a sequence that is sharded in order over the ranks of a group; call it on every rank.

    Args:
        query: this rank's queries, (batch, heads, queries, head_dim). Ranks may hold different numbers of tokens.
        key: this rank's keys, (batch, kv_heads, keys, head_dim); as many as queries if causal.
        value: this rank's values, (batch, kv_heads, keys, value_dim).
        group: process group, or one-dimensional device mesh, over which the sequence is sharded; None for all ranks.
        log_decay: logarithm of the decay, <= 0, causal only: (heads,), the same on all ranks, for a constant decay per
            head; (batch, heads, tokens) or (batch, heads, tokens, head_dim) of this rank's tokens for gates.
        causal: query i sees keys up to i. False: every query sees every key (the paper's form without mask).
        feature_map: phi, a name or a callable, as in :func:`manyheads.engines.linear.linear_attention`.
        normalize: divide by the sum of the weights (a column of ones is appended to value).
        eps: added to the normaliser.
        scale: factor on the scores, 1 in the paper; None means ``head_dim ** -0.5``.
        initial_state: state before the first token of the whole sequence, float32 (batch, heads, head_dim of phi,
            value_dim [+ 1 with ``normalize``]). Only rank 0 of the group reads it; the others may pass None.
        cu_seqlens: cumulative lengths 0, n1, n1 + n2, ... of sequences packed into the tokens of all ranks together
            (batch must be 1): the state starts anew at each border, wherever the ranks' borders are.
        chunk: tokens per chunk of the local computation; every value gives the same result.
        return_state: also return the state after the last token of the whole sequence, on every rank.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output (batch, heads, queries, value_dim), or (output, state); differentiable (once). A loss that
        uses the state on several ranks is the sum of theirs.

    Raises:
        TypeError: mixed or integer dtypes, a state that is not float32.
        ValueError: on every rank and before data moves: shapes that do not fit, decay without causality, arguments or
            decays that differ between ranks, the wrong group or none.
        RankError: a rank died, stalls or failed; the message names it.

    Source: arXiv 2502.07563, sections 3.2 to 3.4.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 1, 4, 10, 8).unbind()
    >>> lasp2(q, k, v, log_decay=torch.tensor([-0.5, -0.3, -0.1, 0.0])).shape
    torch.Size([1, 4, 10, 8])
    >>> dist.destroy_process_group()
    """
    out, state = eager(_call)(
        "lasp2", query, key, value, group, timeout, log_decay, causal, feature_map, normalize, eps, scale,
        initial_state, cu_seqlens, chunk, return_state,
    )  # fmt: skip
    return (out, state) if return_state else out


def lasp(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    group: Any = None,
    log_decay: Tensor | None = None,
    feature_map: FeatureMap | str | None = None,
    normalize: bool = False,
    eps: float = 1e-12,
    scale: float | None = 1.0,
    chunk: int = 64,
    timeout: int | float = TIMEOUT,
) -> Tensor:
    """LASP, the predecessor: causal linear attention whose state goes from rank to rank, one hop after the other.

    Args:
        query: as in :func:`lasp2`, as are all other arguments.
        key: this rank's keys.
        value: this rank's values.
        group: process group or one-dimensional device mesh.
        log_decay: logarithm of the decay.
        feature_map: phi.
        normalize: divide by the sum of the weights.
        eps: added to the normaliser.
        scale: factor on the scores.
        chunk: tokens per chunk of the local computation.
        timeout: seconds after which a rank that does not answer is an error.

    Returns:
        This rank's output, the same as that of :func:`lasp2`.

    Raises:
        TypeError, ValueError, RankError: as :func:`lasp2`.

    Source: "Linear Attention Sequence Parallelism", arXiv 2404.02882, section 2.

    >>> import torch, torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> q, k, v = torch.randn(3, 1, 4, 10, 8).unbind()
    >>> lasp(q, k, v).shape
    torch.Size([1, 4, 10, 8])
    >>> dist.destroy_process_group()
    """
    return eager(_call)("lasp", query, key, value, group, timeout, log_decay, True, feature_map, normalize, eps, scale,
                None, None, chunk, False)[0]  # fmt: skip


def _call(
    name: str, query: Tensor, key: Tensor, value: Tensor, group: Any, timeout: int | float, log_decay: Tensor | None,
    causal: bool, feature_map: FeatureMap | str | None, normalize: bool, eps: float, scale: float | None,
    initial_state: Tensor | None, cu_seqlens: Any, chunk: int, return_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mapped: list[Any] = []

    def describe(wire: Wire) -> tuple[dict[str, Any], list[Any]]:
        check_qkv(query, key, value)
        phi = resolve_feature_map(feature_map)
        q, k = (query, key) if phi is None else (phi(query), phi(key))
        v = F.pad(value, (0, 1), value=1.0) if normalize else value
        check_linear(q, k, v, log_decay, causal, initial_state if wire.rank == 0 else None, None, chunk)
        borders = cumulative_lengths(cu_seqlens)
        if borders is not None and (not causal or query.shape[0] != 1 or initial_state is not None or return_state):
            raise ValueError(
                "cu_seqlens needs causal=True, a batch of 1, and neither initial_state nor return_state; got "
                f"causal={causal}, a batch of {query.shape[0]}"
            )
        mapped.extend((q, k, v, borders))
        given = (q, k, v, log_decay, initial_state)
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        options = {"causal": causal, "normalize": normalize, "scale": resolve_scale(scale, query.shape[-1]),
                   "cu_seqlens": borders, "return_state": return_state}  # fmt: skip
        return options | _alike(q, k, v, log_decay), [query.shape[2], learns]

    wire, own = connect(name, group, timeout, describe)
    q, k, v, borders = mapped
    lengths, learns = [n for n, _ in own], any(learns for _, learns in own)
    if borders is not None and (borders[0] != 0 or borders[-1] != sum(lengths) or borders != sorted(borders)):
        raise ValueError(
            f"{name}: cu_seqlens must rise from 0 to the {sum(lengths)} tokens of all ranks, got {borders}"
        )
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    wide, factor = accumulation_dtype(q.dtype), resolve_scale(scale, query.shape[-1])
    gates = _gates(log_decay, borders, sum(lengths[: wire.rank]), q)
    upto, after, total = _decays(gates, q, wide)
    state = initial_state if wire.rank == 0 else None

    own_state = (k.to(wide) * after).transpose(-2, -1) @ v.to(wide)
    if state is not None:
        own_state = own_state + total.exp().unsqueeze(-1) * state
    travels = gates is not None and gates.ndim > 1  # decays that depend on the data are known to their rank only
    known = None if gates is None or travels else [_times(gates.to(wide), n)[None, :, None] for n in lengths]
    exchange = _Exchange(wire, name == "lasp", causal, return_state, known, travels)
    anchor = own_state.new_zeros((), requires_grad=learns)
    posted = _Post.apply(own_state, total, anchor, exchange)
    out = None
    if causal:
        # A half-precision kernel would round the part within the rank: on a CPU float32 costs nothing extra.
        local = [t.to(wide) if t.device.type == "cpu" else t for t in (q, k, v)]
        out = linear_attention(*local, log_decay=gates, scale=factor, chunk=chunk)
        assert isinstance(out, Tensor)
    before, final = _Collect.apply(posted, exchange)
    before = before if state is None or not causal else before + state
    across = (q.to(wide) * factor * upto) @ before
    out = across if out is None else out.to(wide) + across
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + eps)
    return out.to(query.dtype), final


def _alike(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> dict[str, Any]:
    """What must be the same on all ranks; numbers of tokens may differ."""
    constant = log_decay is not None and log_decay.ndim == 1
    return {
        "batch, heads and width of query": [*q.shape[:2], q.shape[-1]],
        "batch, heads and width of key": [*k.shape[:2], k.shape[-1]],
        "batch, heads and width of value": [*v.shape[:2], v.shape[-1]],
        "dtype": str(q.dtype),
        "axes of log_decay": None if log_decay is None else log_decay.ndim,
        "log_decay": log_decay.tolist() if log_decay is not None and constant else None,
    }


def _gates(log_decay: Tensor | None, borders: list[int] | None, first: int, q: Tensor) -> Tensor | None:
    """Decays with a reset at every border of packed sequences: (heads,), (batch, heads, tokens [, width]) or None."""
    if log_decay is not None and log_decay.ndim == 1 and (log_decay.requires_grad or borders is not None):
        log_decay = log_decay[None, :, None].expand(q.shape[:3])  # a learned decay is a gate that all tokens share
    if borders is None:
        return log_decay
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    starts = torch.tensor([b - first for b in borders if first <= b < first + q.shape[2]], dtype=torch.int64)
    reset = torch.zeros(q.shape[2], dtype=torch.bool, device=q.device).index_fill(0, starts.to(q.device), True)
    return log_decay.masked_fill(reset.view(1, 1, -1, *[1] * (log_decay.ndim - 3)), -math.inf)


def _decays(gates: Tensor | None, q: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Decay factors up to each token and from it to the end, (batch | 1, heads | 1, tokens, width | 1); G."""
    tokens = torch.arange(q.shape[2], device=q.device)
    if gates is None:
        one = torch.ones(1, 1, 1, 1, dtype=wide, device=q.device)
        return one, one, one.new_zeros(1, 1, 1)
    gates = gates.to(wide)
    if gates.ndim == 1:
        decay = gates[None, :, None, None]
        upto, after = _times(decay, (tokens + 1)[:, None]), _times(decay, (q.shape[2] - 1 - tokens)[:, None])
        return upto.exp(), after.exp(), _times(gates, q.shape[2])[None, :, None]
    gates = gates.unsqueeze(-1) if gates.ndim == 3 else gates
    later = torch.cat([gates[:, :, 1:], torch.zeros_like(gates[:, :, :1])], dim=2)
    return gates.cumsum(2).exp(), later.flip(2).cumsum(2).flip(2).exp(), gates.sum(2)


def _times(decay: Tensor, count: Tensor | int) -> Tensor:
    """Log decay over ``count`` tokens; no token is no decay, even where the decay is -inf."""
    count = torch.as_tensor(count, device=decay.device)
    return torch.where(count == 0, 0, decay * count)


@dataclass
class _Exchange:
    """How the states of the ranks become what each of them starts from, and back."""

    wire: Wire
    hops: bool  # LASP: from rank to rank; else LASP-2: one all-gather
    causal: bool
    final: bool
    known: Sequence[Tensor | None] | None  # G of all ranks, where every rank can tell
    travels: bool
    own: list[Tensor] = field(default_factory=list)
    pending: Pending | None = None
    arriving: Tensor | None = None

    def post(self, state: Tensor, total: Tensor) -> None:
        """Send off this rank's M (and G)."""
        recorder.keep("local_state", 0, state)
        self.shape, self.decay_shape = state.shape, total.shape
        self.own = [state, total]
        with self.wire.guard():
            if self.hops:
                self._receive(self.wire.rank - 1, self.wire.rank)
            else:
                buffer = pack(state, total) if self.travels else pack(state)
                self.arriving, self.pending = self.wire.all_gather(buffer, "state")

    def collect(self) -> tuple[Tensor, Tensor]:
        """P of this rank, and the state after all of them."""
        rank, state = self.wire.rank, self.own[0]
        if self.hops:
            before = self._wait(self.wire, torch.zeros_like(state))
            total = self.own[1] if self.travels else self._decay(rank)
            self._send(self.wire, _apply(total, before) + state, rank + 1)
            final = before
        else:
            rows = self._wait(self.wire, state)
            shapes = (self.shape, self.decay_shape) if self.travels else (self.shape,)
            parts = [(*unpack(row, *shapes), self._decay(u))[:2] for u, row in enumerate(rows)]
            before = final = torch.zeros_like(state)
            for u, (one, total) in enumerate(parts):  # in the order of the ranks: all of them get the same bits
                before = final if u == rank and self.causal else before
                final = _apply(total, final) + one  # pyright: ignore[reportOperatorIssue]
            before = before if self.causal else final
            if self.travels:
                self.known = [total for _, total in parts]
        self.before = before
        recorder.keep("prefix_state", 0, before)
        # Two outputs of a function must be two tensors: the gradients of one would arrive as the other's.
        return before, final.clone() if self.final else final.new_zeros(())

    def post_gradient(self, grad: Tensor, grad_final: Tensor) -> None:
        """Send off this rank's dP (and that of the final state)."""
        recorder.keep("local_grad_state", 0, grad)
        self.again = reconnect(self.wire, f"{self.wire.call} backward")
        self.own_gradient = grad
        with self.again.guard():
            if self.hops:
                self._receive(self.wire.rank + 1, self.wire.world - 1 - self.wire.rank, self.again)
            else:
                buffer = pack(grad, grad_final) if self.final else pack(grad)
                self.arriving, self.pending = self.again.all_gather(buffer, "gradient of state")

    def collect_gradient(self) -> tuple[Tensor, Tensor]:
        """dM and dG of this rank."""
        rank, grad = self.wire.rank, self.own_gradient
        if self.hops:
            after = self._wait(self.again, torch.zeros_like(grad))
            total = self.own[1] if self.travels else self._decay(rank)
            self._send(self.again, _apply(total, after) + grad, rank - 1)
        else:
            rows = [unpack(row, *[self.shape] * (2 if self.final else 1)) for row in self._wait(self.again, grad)]
            after = torch.zeros_like(grad)
            for row in rows if self.final else ():
                after = after + row[1]
            for u in range(self.wire.world - 1, rank if self.causal else -1, -1):
                after = _apply(self._decay(u), after) + rows[u][0]
        recorder.keep("suffix_grad_state", 0, after)
        total = self.own[1]
        d_total = (after * _apply(total, self.before)).sum(-1).sum_to_size(total.shape)
        return after, d_total

    def _decay(self, rank: int) -> Tensor | None:
        return None if self.known is None else self.known[rank]

    def _receive(self, source: int, step: int, wire: Wire | None = None) -> None:
        wire, self.pending, self.arriving = wire or self.wire, None, None
        wire.step = step
        if 0 <= source < wire.world:
            self.arriving = torch.empty_like(self.own[0], memory_format=torch.contiguous_format)
            self.pending = wire.exchange([], [(self.arriving, source, "state")])

    def _wait(self, wire: Wire, otherwise: Tensor) -> Tensor:
        with wire.guard():
            if self.pending is not None:
                self.pending.wait()
        result, self.pending, self.arriving = self.arriving, None, None
        return otherwise if result is None else result

    def _send(self, wire: Wire, state: Tensor, to: int) -> None:
        if 0 <= to < wire.world:
            with wire.guard():
                wire.exchange([(state.contiguous(), to, "state")], []).wait()


def _apply(total: Tensor | None, state: Tensor) -> Tensor:
    return state if total is None else total.exp().unsqueeze(-1) * state


class _Post(torch.autograd.Function):
    """Before the work within the rank: forward sends the state off; backward, run last, takes the gradients in."""

    @staticmethod
    def forward(ctx, state: Tensor, total: Tensor, anchor: Tensor, exchange: _Exchange) -> Tensor:
        exchange.post(state, total)
        ctx.exchange = exchange
        return torch.zeros_like(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *ctx.exchange.collect_gradient(), None, None


class _Collect(torch.autograd.Function):
    """After the work within the rank: forward takes the states in; backward, run first, sends the gradients off."""

    @staticmethod
    def forward(ctx, posted: Tensor, exchange: _Exchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        return exchange.collect()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_final: Tensor):
        ctx.exchange.post_gradient(grad, grad_final)
        return torch.zeros((), dtype=grad.dtype, device=grad.device), None
