"""InLine attention: linear attention whose weights sum to one by subtraction, which keeps distinct queries distinct.

With features phi (the identity by default), N keys, and means k~ of phi(k) and v~ of v::

    w_ij  = (s / N) phi(q_i) . phi(k_j)  -  (s / N) phi(q_i) . k~  +  1 / N           rows sum to 1, weights may be < 0
    out_i = (s / N) phi(q_i) (sum_j phi(k_j) v_j^T)  +  (1 - s phi(q_i) . k~) v~      the same, linear in the tokens

A state (sum phi(k) v^T, sum phi(k), sum v, N) of fixed size stands for all keys seen, so the causal form decodes at a
constant cost; only the noncausal form is the paper's.

Source: "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv 2412.06590.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv, repeat_heads, resolve_scale
from manyheads.engines.linear import linear_attention

BACKENDS = ("auto", "reference", "linear")
KERNELS = ("identity", "relu", "leakyrelu", "exp")


@dataclass(frozen=True)
class InLineState:
    """What causal InLine attention remembers of the keys seen, in float32 (float64 for float64 inputs).

    Attributes:
        key_value: sum of phi(k) v^T, (batch, heads, head_dim, value_dim).
        key: sum of phi(k), (batch, heads, head_dim).
        value: sum of v, (batch, heads, value_dim).
        count: keys seen, (batch,).
    """

    key_value: Tensor
    key: Tensor
    value: Tensor
    count: Tensor


def inline_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    kernel: str = "identity",
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Injective linear attention; time and memory linear in the tokens.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); kv_heads divides heads.
        value: (batch, kv_heads, keys, value_dim).
        kernel: phi, of query and key: "identity" (published), "relu", "leakyrelu" (slope 0.01), "exp" (exp(0.2 x)).
        scale: s; None means ``head_dim ** -0.5``.
        causal: sums and means run over the keys that a query may see, the last query seeing the last key.
        key_mask: boolean (batch, keys), True for real tokens: sums, means and N are theirs alone. With ``causal``,
            queries before the first real key give zeros.
        backend: "reference" (the weights of all pairs), "linear" (the engine's sums) or "auto".

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit, an unknown kernel, no keys at all, a sample whose mask has no real token
            (noncausal; not looked for while compiling), fewer keys than queries with ``causal``.

    Source: "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv 2412.06590, section 4.

    >>> import torch
    >>> x = torch.randn(2, 3, 196, 32)
    >>> inline_attention(x, x, x).shape
    torch.Size([2, 3, 196, 32])
    """
    check_choice("backend", backend, BACKENDS)
    _check(query, key, value, kernel, causal, key_mask)
    scale = resolve_scale(scale, query.shape[-1])
    if backend == "reference":
        weights = inline_weights(query, key, kernel=kernel, scale=scale, causal=causal, key_mask=key_mask)
        return (weights @ repeat_heads(value, query.shape[1]).to(weights.dtype)).to(query.dtype)
    if causal:
        earlier = key.shape[2] - query.shape[2]
        parts = [None if key_mask is None else key_mask[:, part] for part in (slice(earlier), slice(earlier, None))]
        state = _summary(key[:, :, :earlier], value[:, :, :earlier], query.shape[1], kernel, parts[0])
        return _causal(query, key[:, :, earlier:], value[:, :, earlier:], state, kernel, scale, parts[1])[0]
    return _noncausal(query, key, value, kernel, scale, key_mask)


def inline_attention_step(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads tokens head_dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    state: InLineState | None = None,
    *,
    kernel: str = "identity",
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], InLineState]:
    """Causal InLine attention of new tokens after a state; the cost does not depend on how much came before.

    Args:
        query: the new tokens, (batch, heads, tokens, head_dim).
        key: as in :func:`inline_attention`, as many as queries.
        value: likewise.
        state: of the tokens before, or None for none. It is not changed in place.
        kernel: as in :func:`inline_attention`.
        scale: as in :func:`inline_attention`.
        key_mask: boolean (batch, tokens), True for real tokens.

    Returns:
        (output, new state).

    Raises:
        TypeError, ValueError: as :func:`inline_attention`.

    Source: "Bridging the Divide", arXiv 2412.06590; the causal form is derived from its equation.

    >>> import torch
    >>> x = torch.randn(1, 2, 5, 8)
    >>> first, state = inline_attention_step(x[:, :, :3], x[:, :, :3], x[:, :, :3])
    >>> second, state = inline_attention_step(x[:, :, 3:], x[:, :, 3:], x[:, :, 3:], state)
    >>> torch.allclose(torch.cat([first, second], 2), inline_attention(x, x, x, causal=True), atol=1e-5)
    True
    """
    _check(query, key, value, kernel, True, key_mask)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"a step needs as many keys as queries, got {key.shape[2]} and {query.shape[2]}")
    if state is None:
        state = _summary(key[:, :, :0], value[:, :, :0], query.shape[1], kernel, None)
    return _causal(query, key, value, state, kernel, resolve_scale(scale, query.shape[-1]), key_mask)


def inline_weights(
    query: Tensor,
    key: Tensor,
    *,
    kernel: str = "identity",
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The weights of all pairs, (batch, heads, queries, keys): every row sums to one, single weights may be negative.

    Arguments, errors and source as for :func:`inline_attention`.

    >>> import torch
    >>> weights = inline_weights(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 6, 8))
    >>> bool(weights.sum(-1).allclose(torch.ones(4))), bool((weights < 0).any())
    (True, True)
    """
    _check(query, key, key, kernel, causal, key_mask)
    wide = accumulation_dtype(query.dtype)
    asking, asked = _features(query.to(wide), kernel), _features(repeat_heads(key, query.shape[1]).to(wide), kernel)
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril(key.shape[2] - query.shape[2])
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    scores = resolve_scale(scale, query.shape[-1]) * asking @ asked.transpose(-2, -1)
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    scores = torch.where(seen, scores, 0)
    return torch.where(seen, (scores - scores.sum(-1, keepdim=True) / count + 1) / count, 0)


def _noncausal(query, key, value, kernel, scale, key_mask) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    key = _features(key, kernel)
    count: Tensor | int = key.shape[2]
    if key_mask is not None:
        real = key_mask[:, None, :, None]
        key, value, count = key.masked_fill(~real, 0), value.masked_fill(~real, 0), real.sum(2, keepdim=True).to(wide)
    # Half of the scale goes to either factor, so that in half precision the sum over all keys stays small.
    share = (abs(scale) / count) ** 0.5
    share = share if isinstance(share, float) else share.to(key.dtype)
    gathered = (key * (share if scale >= 0 else -share)).transpose(-2, -1) @ (value * share)
    mean_key = key.sum(2, keepdim=True, dtype=wide) / count
    mean_value = value.sum(2, keepdim=True, dtype=wide) / count
    # q S + (1 - s q.k~) v~ = q (S - s k~ v~^T) + v~: the correction has rank one and costs nothing on the small matrix.
    gathered = gathered.to(wide) - scale * mean_key.transpose(-2, -1) * mean_value
    heads = query.shape[1]
    gathered, mean_value = repeat_heads(gathered, heads).to(query.dtype), repeat_heads(mean_value, heads)
    return _features(query, kernel) @ gathered + mean_value.to(query.dtype)


def _summary(key, value, heads, kernel, key_mask) -> InLineState:
    wide = accumulation_dtype(key.dtype)
    key, value = _features(repeat_heads(key, heads).to(wide), kernel), repeat_heads(value, heads).to(wide)
    if key_mask is None:
        count = torch.full((key.shape[0],), float(key.shape[2]), dtype=wide, device=key.device)
    else:
        key, value = (t.masked_fill(~key_mask[:, None, :, None], 0) for t in (key, value))
        count = key_mask.sum(1).to(wide)
    return InLineState(key.transpose(-2, -1) @ value, key.sum(2), value.sum(2), count)


def _causal(query, key, value, state: InLineState, kernel, scale, key_mask) -> tuple[Tensor, InLineState]:
    wide, dtype, heads = accumulation_dtype(query.dtype), query.dtype, query.shape[1]
    query = _features(query.to(wide), kernel)
    key, value = _features(repeat_heads(key, heads).to(wide), kernel), repeat_heads(value, heads).to(wide)
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    key, value = (t.masked_fill(~real[:, None, :, None], 0) for t in (key, value))
    summed, last = linear_attention(
        query, key, value, causal=True, initial_state=state.key_value.to(wide), return_state=True
    )
    keys = state.key[:, :, None] + key.cumsum(2)
    values = state.value[:, :, None] + value.cumsum(2)
    counts = state.count[:, None] + real.cumsum(1)
    count = counts.clamp(min=1)[:, None, :, None]
    own = scale * (query * keys).sum(-1, keepdim=True) / count
    out = scale * summed / count + (1 - own) * values / count
    if query.shape[2] == 0:
        return out.to(dtype), state
    return out.to(dtype), InLineState(last, keys[:, :, -1], values[:, :, -1], counts[:, -1])


def _features(x: Tensor, kernel: str) -> Tensor:
    if kernel == "relu":
        return x.relu()
    if kernel == "leakyrelu":
        return F.leaky_relu(x, 0.01)
    return (0.2 * x).exp() if kernel == "exp" else x


def _check(query, key, value, kernel, causal, key_mask) -> None:
    check_choice("kernel", kernel, KERNELS)
    check_qkv(query, key, value)
    if causal and key.shape[2] < query.shape[2]:
        raise ValueError(
            f"causal=True needs at least as many keys as queries, got {key.shape[2]} keys and {query.shape[2]} queries"
        )
    if key.shape[2] == 0 and not causal:
        raise ValueError("key has no tokens: the mean over no keys is not defined")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2]):
        wanted = (key.shape[0], key.shape[2])
        raise ValueError(f"key_mask must be boolean of shape {wanted}, got {key_mask.dtype} {tuple(key_mask.shape)}")
    if not causal and not torch.compiler.is_compiling() and key_mask.device.type != "meta":
        empty = (~key_mask.any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"key_mask has no real token in samples {empty[:6]}: their mean key is not defined")
