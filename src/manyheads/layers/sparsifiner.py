"""Attention whose pairs a small predictor chooses, with the predictor's weights and the pruning of tokens.

Source: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.ops.sparse_connectivity import (
    PairRule,
    Prediction,
    PredictorWeights,
    block_attention,
    pair_index,
    pair_mask,
    predict_scores,
    sparse_attention,
)


class AttentionDetails(NamedTuple):
    """What a layer computed on its way, for losses and for looking at it.

    Attributes:
        prediction: the predictor's coefficients, basis and scores; None without a predictor.
        mask: M, boolean (batch, heads, N, N); None without a predictor.
        masked: attention over the pairs in M, (batch, heads, N, N); the unmasked one while reconstruction is trained.
        unmasked: attention over all pairs.
        token_mask: boolean (batch, N - 1), the tokens that go on to the next layer, or None for all.
    """

    prediction: Prediction | None
    mask: Tensor | None
    masked: Tensor
    unmasked: Tensor
    token_mask: Tensor | None


class ConnectivityPredictor(nn.Module):
    """The low-rank predictor of one layer, shared by its heads.

    Args:
        head_dim: channels of a head; c = head_dim // ``reduce_channels``.
        tokens: N, with the class token; K = N // ``reduce_tokens``.
        reduce_channels: factor between a head's channels and c.
        reduce_tokens: factor between N and K.
        share: use P_in for P_out too.
        rule: what survives, see ``PairRule``.

    Raises:
        ValueError: factors that leave no channel or no token, more coefficients kept than K.

    Source: arXiv 2303.13755, section 3.2.

    >>> import torch
    >>> predictor = ConnectivityPredictor(8, 17, reduce_tokens=2)
    >>> predictor(torch.randn(1, 2, 17, 8), torch.randn(1, 2, 17, 8)).scores.shape
    torch.Size([1, 2, 16, 17])
    """

    def __init__(
        self,
        head_dim: int,
        tokens: int,
        *,
        reduce_channels: int = 2,
        reduce_tokens: int = 6,
        share: bool = False,
        rule: PairRule | None = None,
    ) -> None:
        super().__init__()
        rule = PairRule() if rule is None else rule
        if min(reduce_channels, reduce_tokens) < 1:
            raise ValueError(f"reduce_channels={reduce_channels} and reduce_tokens={reduce_tokens} must be at least 1")
        channels, places = head_dim // reduce_channels, tokens // reduce_tokens
        if channels < 1:
            raise ValueError(f"reduce_channels={reduce_channels} leaves nothing of {head_dim} channels")
        if places < 1:
            raise ValueError(f"reduce_tokens={reduce_tokens} leaves nothing of {tokens} tokens")
        if rule.coefficient_top is not None and rule.coefficient_top > places:
            raise ValueError(f"coefficient_top={rule.coefficient_top} exceeds the {places} reduced tokens")
        self.rule = rule
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, channels), nn.Linear(head_dim, channels)
        self.proj_n = nn.Parameter(torch.empty(tokens, places))
        self.proj_back_n = self.proj_n if share else nn.Parameter(torch.empty(tokens, places))
        for weight in (self.proj_n, self.proj_back_n, self.proj_c_q.weight, self.proj_c_k.weight):
            trunc_normal_(weight, std=0.02)
        for linear in (self.proj_c_q, self.proj_c_k):
            nn.init.zeros_(linear.bias)

    @property
    def weights(self) -> PredictorWeights:
        """What the operator takes."""
        query, key = ((linear.weight, linear.bias) for linear in (self.proj_c_q, self.proj_c_k))
        return PredictorWeights(query, key, self.proj_n, self.proj_back_n)

    def forward(
        self,
        query: Float[Tensor, "batch heads tokens head_dim"],
        key: Float[Tensor, "batch heads tokens head_dim"],
        token_mask: Bool[Tensor, "batch patches"] | None = None,
        sparse: bool = True,
    ) -> Prediction:
        return predict_scores(query, key, self.weights, self.rule, token_mask=token_mask, sparse=sparse)


class SparsifiedAttention(nn.Module):
    """Self-attention of a class token and patches, computed where the predictor says.

    Args:
        dim: width, a multiple of ``heads``.
        heads: attention heads.
        predictor: of the pairs, for N tokens; None attends to all pairs.
        token_keep_rate: share of the patches that goes on to the next layers, those that the class token attends to
            most; 1 drops none. In (0, 1].
        qkv_bias: bias of the projection to queries, keys and values.
        backend: of ``manyheads.ops.sparse_connectivity.sparse_attention``; or "blocks" for its
            ``block_attention``, which does not go with dropped tokens.
        block: queries and keys of a block, with "blocks".

    While ``reconstruct`` is set and the layer trains, it attends to all pairs and predicts densely, so that the
    predictor can be compared with real attention.

    Shape: (batch, N, dim), returned as it came.

    Raises:
        ValueError: a width that heads do not divide, a rate outside (0, 1], blocks together with dropped tokens; in
            ``forward``, another number of tokens than the predictor's.

    Source: arXiv 2303.13755.

    >>> import torch
    >>> layer = SparsifiedAttention(16, 2, ConnectivityPredictor(8, 17, reduce_tokens=2))
    >>> layer(torch.randn(1, 17, 16)).shape
    torch.Size([1, 17, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        predictor: nn.Module | None,
        *,
        token_keep_rate: int | float = 1.0,
        qkv_bias: bool = True,
        backend: str = "auto",
        block: int = 16,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}")
        if not 0 < token_keep_rate <= 1:
            raise ValueError(f"token_keep_rate={token_keep_rate} must be in (0, 1]")
        check_choice("backend", backend, ("auto", "gather", "dense", "reference", "blocks"))
        if backend == "blocks" and token_keep_rate < 1:
            raise ValueError("backend='blocks' does not go with dropped tokens")
        self.heads, self.token_keep_rate, self.backend, self.block = heads, token_keep_rate, backend, block
        self.reconstruct = False
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        # Any, because its rule is read too, and something else may take its place (fixed masks, to compare with).
        self.mask_predictor: Any = predictor

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.attend(x)[0]

    def attend(
        self, x: Tensor, token_mask: Tensor | None = None, kept: int | None = None, details: bool = False
    ) -> tuple[Tensor, Tensor | None, AttentionDetails | None]:
        """(output, mask of the tokens that go on, details if wanted).

        Args:
            x: (batch, N, dim).
            token_mask: boolean (batch, N - 1), False for tokens dropped before; None for all.
            kept: how many it keeps; None counts them.
            details: also return everything that losses compare, which needs the whole attention matrix.
        """
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if token_mask is not None and not self.reconstruct:
            alive = F.pad(token_mask, (1, 0), value=True)[:, None, :, None]
            query, key, value = query * alive, key * alive, value * alive
        whole, prediction, index, rule = self.reconstruct and self.training, None, None, None
        if self.mask_predictor is not None:
            prediction = self.mask_predictor(query, key, token_mask, sparse=not whole)
            rule = self.mask_predictor.rule
            index = pair_index(prediction.scores, rule, token_mask=token_mask, kept=kept)
        going_on, found = self._keep(query, key, token_mask), None
        if details:
            mask = None if index is None else pair_mask(index, key.shape[2])
            logits = (query @ key.mT).float() * key.shape[3] ** -0.5
            unmasked = logits.softmax(-1)
            masked = unmasked if mask is None or whole else _masked_softmax(logits, mask)
            found = AttentionDetails(prediction, mask, masked, unmasked, going_on)
            out = masked.to(value.dtype) @ value
        elif prediction is None or index is None or rule is None or whole:
            out = F.scaled_dot_product_attention(query, key, value)
        elif self.backend == "blocks":
            out = block_attention(query, key, value, prediction.scores, rule, block=self.block)
        else:
            out = sparse_attention(query, key, value, index, backend=self.backend)
        return self.proj(out.transpose(1, 2).flatten(2)), going_on, found

    def _keep(self, query: Tensor, key: Tensor, token_mask: Tensor | None) -> Tensor | None:
        if self.token_keep_rate == 1 or self.reconstruct:
            return token_mask
        # The class token attends to all tokens, so its row needs no mask of pairs.
        row = ((query[:, :, :1] @ key.mT).float() * key.shape[3] ** -0.5).softmax(-1)
        importance = row.mean((1, 2))[:, 1:]
        if token_mask is not None:
            importance = importance.masked_fill(~token_mask, -math.inf)
        best = importance.topk(math.ceil(self.token_keep_rate * importance.shape[1]), dim=-1).indices
        return torch.zeros_like(importance, dtype=torch.bool).scatter(1, best, True)


def _masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the pairs in the mask; rows without any are zero and pass no gradient."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask
