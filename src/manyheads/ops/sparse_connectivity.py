"""Predicted sparse attention: a low-rank guess of the attention matrix decides which pairs are computed at all.

With N tokens (token 0 is the class token), H heads, c reduced channels and K reduced tokens, for every head::

    q' = Linear_q(q), k' = Linear_k(k)                 (N, c)
    coefficients = softmax( q' (k'^T P_in) H^-1/2 )    (N - 1, K), sparsified; the class token needs none
    basis = |P_out^T|, small entries 0                 (K, N)
    scores = coefficients basis                        (N - 1, N)
    M = the largest of every row, or those above a threshold; the class token attends to all

and attention is softmax over the pairs in M. No gradient passes through M: the predictor learns when its ``scores``,
dense while they are trained, are compared with real attention.

Source: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from manyheads.engines.blocksparse import blocksparse_attention
from manyheads.engines.blocksparse_plan import BlockPlan
from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv
from manyheads.engines.dense import attention
from manyheads.engines.select import select_attention, select_top_tokens


class PredictorWeights(NamedTuple):
    """What the predictor learns; all heads share it.

    Attributes:
        query: weight (c, head_dim) and bias (c) of the queries' projection.
        key: the same for the keys.
        reduce: P_in, (N, K).
        restore: P_out, (N, K); may be ``reduce``.
    """

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    reduce: Tensor
    restore: Tensor


@dataclasses.dataclass(frozen=True)
class PairRule:
    """Which entries of the predicted matrix survive.

    Attributes:
        keep_rate: share of the N keys that every query keeps, rounded up; in (0, 1].
        score_threshold: keep what exceeds it instead of a share; None keeps a share.
        basis_threshold: entries of the basis up to it become 0.
        coefficient_top: coefficients that stay in every row; None goes by ``coefficient_threshold``.
        coefficient_threshold: coefficients up to it become 0, where ``coefficient_top`` is None; 0 leaves all.
        prune_rows: dropped tokens (of a token mask) attend to nothing, instead of to what their rows say.

    Raises:
        ValueError: a rate outside (0, 1], a threshold that is not positive, less than one coefficient.
    """

    keep_rate: int | float = 0.25
    score_threshold: int | float | None = None
    basis_threshold: int | float = 0.02
    coefficient_top: int | None = 8
    coefficient_threshold: int | float = 0.05
    prune_rows: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate={self.keep_rate} must be in (0, 1]")
        if self.score_threshold is not None and self.score_threshold <= 0:
            raise ValueError(f"score_threshold={self.score_threshold} must be positive; None keeps a share of the keys")
        if self.coefficient_top is not None and self.coefficient_top < 1:
            raise ValueError(f"coefficient_top={self.coefficient_top} must be at least 1, or None")


class Prediction(NamedTuple):
    """The low-rank guess.

    Attributes:
        coefficients: (batch, heads, N - 1, K).
        basis: (K, N).
        scores: their product (batch, heads, N - 1, N), the approximate attention of all tokens but the class token.
    """

    coefficients: Tensor
    basis: Tensor
    scores: Tensor


def predict_scores(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    weights: PredictorWeights,
    rule: PairRule,
    *,
    token_mask: Bool[Tensor, "batch patches"] | None = None,
    sparse: bool = True,
) -> Prediction:
    """The approximate attention of every token but the class token, differentiable in weights, queries and keys.

    Args:
        query: (batch, heads, N, head_dim), token 0 the class token.
        key: same shape.
        weights: of the predictor.
        rule: how basis and coefficients are thinned.
        token_mask: boolean (batch, N - 1), False for dropped tokens; their reduced queries and keys are zero.
        sparse: False leaves basis (signs included) and coefficients whole, as they are trained.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes that do not fit each other or the weights, more coefficients kept than there are, a token
            mask of another shape or kind.

    The scale is H^-1/2, of the number of heads, which is what the authors' code computes.

    Source: arXiv 2303.13755, section 3.2.

    >>> import torch
    >>> q, pair = torch.randn(1, 2, 9, 8), (torch.randn(4, 8), torch.zeros(4))
    >>> weights = PredictorWeights(pair, pair, torch.randn(9, 3), torch.randn(9, 3))
    >>> predict_scores(q, q, weights, PairRule(coefficient_top=2)).scores.shape
    torch.Size([1, 2, 8, 9])
    """
    check_qkv(query, key, key)
    _check_weights(query, key, weights, rule, token_mask)
    wide = torch.promote_types(accumulation_dtype(query.dtype), weights.restore.dtype)
    reduced_query, reduced_key = F.linear(query, *weights.query), F.linear(key, *weights.key)
    if token_mask is not None:
        kept = F.pad(token_mask, (1, 0), value=True)[:, None, :, None]
        reduced_query, reduced_key = reduced_query * kept, reduced_key * kept
    summary = reduced_key.mT.to(wide) @ weights.reduce.to(wide)
    logits = reduced_query[:, :, 1:].to(wide) @ summary * query.shape[1] ** -0.5
    coefficients, basis = logits.softmax(-1), weights.restore.mT.to(wide)
    if sparse:
        basis = basis.abs()
        basis = basis * (basis > rule.basis_threshold)
        if rule.coefficient_top is not None:
            best = coefficients.topk(rule.coefficient_top, dim=-1, sorted=False)
            coefficients = torch.zeros_like(coefficients).scatter(-1, best.indices, best.values)
        elif rule.coefficient_threshold > 0:
            coefficients = coefficients * (coefficients > rule.coefficient_threshold)
    return Prediction(coefficients, basis, coefficients @ basis)


def pair_index(
    scores: Float[Tensor, "batch heads patches tokens"],
    rule: PairRule,
    *,
    token_mask: Bool[Tensor, "batch patches"] | None = None,
    kept: int | None = None,
) -> Int64[Tensor, "batch heads patches selected"]:
    """The keys that every token but the class token attends to, ascending, -1 for none: M as lists.

    Args:
        scores: as ``predict_scores`` gives them.
        rule: share or threshold.
        token_mask: boolean (batch, N - 1); dropped tokens are no keys. All images keep equally many.
        kept: how many tokens the mask keeps; None counts, which costs a look at the data. At most so many keys are
            listed: the class token takes one of these places if it is selected.

    Raises:
        ValueError: a token mask of another shape, or one that keeps different numbers of tokens.

    Where scores are equal, which of them is selected is not defined.

    >>> import torch
    >>> pair_index(torch.tensor([[[[0.1, 0.0, 0.4, 0.5]]]]), PairRule(keep_rate=0.5))
    tensor([[[[2, 3]]]])
    """
    tokens = scores.shape[-1]
    scores = scores.detach()
    if token_mask is not None:
        _check_mask(token_mask, scores.shape[0], tokens, count=kept is None)
        dropped = F.pad(~token_mask, (1, 0))[:, None, None]
        scores = scores.masked_fill(dropped, -math.inf)
    if rule.score_threshold is None:
        budget = math.ceil(rule.keep_rate * tokens)
        if token_mask is not None:
            budget = min(budget, int(token_mask[0].sum()) if kept is None else kept)
        # A batch without images and rows without keys have no largest score.
        index = select_top_tokens(scores, budget) if budget else scores.new_zeros((*scores.shape[:3], 0)).long()
    else:
        above = scores > rule.score_threshold
        longest = tokens
        if above.numel() and not torch.compiler.is_compiling():  # a compiled graph cannot look at the data
            longest = int(above.sum(-1).max())
        positions = torch.arange(tokens, device=scores.device).where(above, tokens)
        index = positions.sort(-1).values[..., :longest]
        index = index.masked_fill(index == tokens, -1)
    if token_mask is not None and rule.prune_rows:
        index = index.masked_fill(~token_mask[:, None, :, None], -1)
    return index


def pair_mask(
    index: Int64[Tensor, "batch heads patches selected"], tokens: int
) -> Bool[Tensor, "batch heads tokens tokens"]:
    """The lists of ``pair_index`` as a matrix with the class token's row of ones on top: M itself.

    >>> import torch
    >>> pair_mask(torch.tensor([[[[0, 1], [2, -1]]]]), 3).int().tolist()
    [[[[1, 1, 1], [1, 1, 0], [0, 0, 1]]]]
    """
    # Entries that name no key land in a column of their own.
    wide = torch.zeros((*index.shape[:3], tokens + 1), dtype=torch.bool, device=index.device)
    wide = wide.scatter(-1, index.where(index >= 0, tokens), True)[..., :tokens]
    return F.pad(wide, (0, 0, 1, 0), value=True)


def sparse_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    index: Int64[Tensor, "batch heads patches selected"],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention of the class token to all tokens and of every other token to the keys that it lists.

    Args:
        query: (batch, heads, N, head_dim), token 0 the class token.
        key: same shape.
        value: (batch, heads, N, value_dim).
        index: (batch, heads, N - 1, selected), see ``pair_index``; entries of -1 name no key.
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        backend: "gather" (only the listed pairs count; see ``manyheads.engines.select``), "dense" (all pairs, then
            masked), "reference" (the same as written) or "auto": "gather" on a GPU, and elsewhere from as many tokens
            as ``GATHER_FROM`` says, because on fewer dense products, and their gradients, are as fast.

    Tokens that list nothing give zeros.

    Raises:
        TypeError, ValueError: tensors that do not fit each other.

    Source: arXiv 2303.13755, section 3.3.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
    >>> sparse_attention(q, k, v, torch.tensor([0, 3]).expand(1, 2, 4, 2)).shape
    torch.Size([1, 2, 5, 8])
    """
    check_choice("backend", backend, ("auto", "gather", "dense", "reference"))
    check_qkv(query, key, value)
    wanted = (*query.shape[:2], query.shape[2] - 1)
    if tuple(index.shape[:3]) != wanted or query.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"index must be {wanted} lists of keys for query {tuple(query.shape)} and key {tuple(key.shape)}, got "
            f"{tuple(index.shape)}"
        )
    if backend == "auto":
        learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        backend = "gather" if query.is_cuda or query.shape[2] >= GATHER_FROM[learns] else "dense"
    if backend == "gather":
        first = attention(query[:, :, :1], key, value, scale=scale)
        others = select_attention(query[:, :, 1:], key, value, index, scale=scale)
        return torch.cat([_alone(first), _alone(others)], dim=2)
    mask = pair_mask(index, key.shape[2])
    how = "reference" if backend == "reference" else "auto"
    return _alone(attention(query, key, value, mask=mask, scale=scale, backend=how))


def block_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    scores: Float[Tensor, "batch heads patches tokens"],
    rule: PairRule,
    *,
    block: int = 16,
    scale: float | None = None,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The same with whole blocks of keys chosen for whole blocks of queries, which hardware skips more easily.

    A block of queries keeps the share ``rule.keep_rate`` of the key blocks, those with the largest sums of scores;
    not in the paper, whose masks are scattered.

    Args:
        query, key, value, scale: as in ``sparse_attention``.
        scores: as ``predict_scores`` gives them.
        rule: its ``keep_rate`` counts, rounded up to whole blocks.
        block: queries and keys of a block.

    Raises:
        ValueError: a block below one, or a rule with a threshold.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 9, 8)
    >>> block_attention(q, k, v, torch.rand(1, 2, 8, 9), PairRule(), block=4).shape
    torch.Size([1, 2, 9, 8])
    """
    check_qkv(query, key, value)
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    if rule.score_threshold is not None:
        raise ValueError("a rule with score_threshold has no share of blocks to keep")
    patches, tokens = scores.shape[2:]
    padded = F.pad(scores.detach(), (0, -tokens % block, 0, -patches % block))
    sums = padded.unflatten(3, (-1, block)).sum(-1).unflatten(2, (-1, block)).sum(3)
    chosen = select_top_tokens(sums, math.ceil(rule.keep_rate * sums.shape[-1]))
    plan = BlockPlan.from_index(chosen, query_block=block, key_block=block)
    first = attention(query[:, :, :1], key, value, scale=scale)
    others = blocksparse_attention(query[:, :, 1:], key, value, plan, scale=scale)
    return torch.cat([_alone(first), _alone(others)], dim=2)


def sparsities(prediction: Prediction, mask: Tensor) -> dict[str, Tensor]:
    """Fractions of zeros in basis, coefficients and M (with the class token's row).

    >>> import torch
    >>> guess = Prediction(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]), torch.zeros(1))
    >>> {name: float(value) for name, value in sparsities(guess, torch.tensor([True])).items()}
    {'basis': 1.0, 'coefficients': 0.5, 'mask': 0.0}
    """
    named = {"basis": prediction.basis, "coefficients": prediction.coefficients, "mask": mask}
    return {name: (matrix == 0).float().mean() for name, matrix in named.items()}


GATHER_FROM = {False: 64, True: 1024}  # without gradients and with them, measured on CPUs


def _alone(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _check_weights(
    query: Tensor, key: Tensor, weights: PredictorWeights, rule: PairRule, token_mask: Tensor | None
) -> None:
    tokens, width = query.shape[2:]
    if query.shape != key.shape:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} must have one shape")
    built, reduced = weights.reduce.shape
    if built != tokens or weights.restore.shape != weights.reduce.shape:
        raise ValueError(
            f"the predictor is built for {built} tokens (reduce {tuple(weights.reduce.shape)}, restore "
            f"{tuple(weights.restore.shape)}), query has {tokens}"
        )
    for name, (weight, bias) in (("query", weights.query), ("key", weights.key)):
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1] or not weight.shape[0]:
            found = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            raise ValueError(f"weights.{name} must be (c, {width}) and (c) with c of at least 1, got {found}")
    if weights.query[0].shape != weights.key[0].shape:
        raise ValueError("weights.query and weights.key must reduce to the same width")
    if rule.coefficient_top is not None and rule.coefficient_top > reduced:
        raise ValueError(f"coefficient_top={rule.coefficient_top} exceeds the {reduced} reduced tokens")
    if token_mask is not None:
        _check_mask(token_mask, query.shape[0], tokens, count=False)


def _check_mask(token_mask: Tensor, batch: int, tokens: int, *, count: bool) -> None:
    if token_mask.dtype != torch.bool or tuple(token_mask.shape) != (batch, tokens - 1):
        raise ValueError(
            f"token_mask must be boolean ({batch}, {tokens - 1}), got {token_mask.dtype} {tuple(token_mask.shape)}"
        )
    if count and len(set(token_mask.sum(1).tolist())) > 1:
        raise ValueError(f"token_mask must keep as many tokens of every image, got {token_mask.sum(1).tolist()}")
