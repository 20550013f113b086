"""The layers between a few latent tokens and a feature map: attention across, attention among the latents, MLP.

    MHA(x, y) = W_o concat_h softmax( d^-1/2  W_q x  (W_k y + P)^T )  W_v y  + b_o        d = channels of a head
    cross layer:  u = x + MHA(LN x, LN' y);    x <- u + W_2 GELU(W_1 LN u)
    self layer:   the same with y = x and one LN for both

P is an optional learned table of one vector a key. The query, key and value projections have no bias.

Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248; the layers are those of "Perceiver IO",
arXiv 2107.14795.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from manyheads.engines.dense import attention


class LatentAttention(nn.Module):
    """Multi-head attention from queries of one width to keys and values of another.

    Args:
        q_dim: width of the queries and of the output.
        kv_dim: width of what is attended.
        heads: attention heads, which divide the two inner widths.
        qk_dim: inner width of queries and keys; None takes ``q_dim``.
        v_dim: inner width of the values; None takes ``qk_dim``.
        keys: length of the learned key table P; None has none, and then any number of keys is attended. The authors
            call the table a relative position bias, but it belongs to absolute positions.
        dropout: on the attention weights, while training.
        backend: as in ``manyheads.engines.dense.attention``.

    Shape: queries (batch, N, q_dim) and keys (batch, L, kv_dim) to (batch, N, q_dim).

    Raises:
        ValueError: heads that do not divide the inner widths, a dropout outside [0, 1); in ``forward``, other widths,
            batches that differ, a number of keys other than the table's, a padding mask of another shape.

    Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, section 3.1.

    >>> import torch
    >>> layer = LatentAttention(32, 24, heads=4, keys=49)
    >>> layer(torch.randn(2, 8, 32), torch.randn(2, 49, 24)).shape
    torch.Size([2, 8, 32])
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int,
        heads: int = 1,
        *,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        keys: int | None = None,
        dropout: int | float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        qk_dim = q_dim if qk_dim is None else qk_dim
        v_dim = qk_dim if v_dim is None else v_dim
        if heads < 1 or qk_dim < 1 or v_dim < 1 or qk_dim % heads or v_dim % heads:
            raise ValueError(f"heads={heads} must divide the inner widths qk_dim={qk_dim} and v_dim={v_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        if keys is not None and keys < 1:
            raise ValueError(f"keys={keys} must be at least 1, or None for no key table")
        self.q_dim, self.kv_dim, self.heads, self.dropout, self.backend = q_dim, kv_dim, heads, dropout, backend
        self.q_proj = nn.Linear(q_dim, qk_dim, bias=False)
        self.k_proj = nn.Linear(kv_dim, qk_dim, bias=False)
        self.v_proj = nn.Linear(kv_dim, v_dim, bias=False)
        self.o_proj = nn.Linear(v_dim, q_dim)
        self.key_table = nn.Parameter(torch.zeros(1, keys, qk_dim)) if keys is not None else None

    def forward(
        self,
        query: Float[Tensor, "batch N q_dim"],
        key: Tensor,
        padding: Tensor | None = None,
    ) -> Float[Tensor, "batch N q_dim"]:
        """Attend.

        Args:
            query: what asks.
            key: what is attended.
            padding: boolean (batch, L), True marks keys that are padding; where all are, the output is that of zero
                values.
        """
        self._check(query, key, padding)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(key)
        if self.key_table is not None:
            k = k + self.key_table
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        visible = None if padding is None else ~padding[:, None, None, :]
        if self.training and self.dropout:
            weights = (q * q.shape[-1] ** -0.5 @ k.mT).float()
            if visible is None:
                weights = weights.softmax(dim=-1)
            else:
                # The product makes zeros of rows without a visible key.
                weights = weights.masked_fill(~visible, torch.finfo(weights.dtype).min).softmax(dim=-1) * visible
            out = F.dropout(weights.to(v.dtype), self.dropout) @ v
        else:
            out = attention(q, k, v, mask=visible, backend=self.backend)
            assert isinstance(out, Tensor)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _check(self, query: Tensor, key: Tensor, padding: Tensor | None) -> None:
        if query.ndim != 3 or query.shape[2] != self.q_dim:
            raise ValueError(f"query must be (batch, N, {self.q_dim}), got {tuple(query.shape)}")
        if key.ndim != 3 or key.shape[2] != self.kv_dim or key.shape[0] != query.shape[0]:
            raise ValueError(f"key must be ({query.shape[0]}, L, {self.kv_dim}), got {tuple(key.shape)}")
        if self.key_table is not None and key.shape[1] != self.key_table.shape[1]:
            raise ValueError(f"the key table is for {self.key_table.shape[1]} keys, got {key.shape[1]}")
        if padding is not None and (padding.shape != key.shape[:2] or padding.dtype != torch.bool):
            raise ValueError(
                f"padding must be boolean {tuple(key.shape[:2])}, True for keys that are padding, got {padding.dtype} "
                f"{tuple(padding.shape)}; other attention masks are not supported"
            )


class FeedForward(nn.Module):
    """W_2 GELU(W_1 LN x), the inner width ``ratio`` times the outer; the residual is the caller's."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.layernorm(x))))


class CrossLayer(nn.Module):
    """Attention from one set of tokens to another, then the MLP, both residual.

    Args:
        q_dim, kv_dim, heads, qk_dim, v_dim, keys, dropout: as in ``LatentAttention``.
        mlp_ratio: inner width of the MLP over ``q_dim``.

    Shape: (batch, N, q_dim) and (batch, L, kv_dim) to (batch, N, q_dim).

    >>> import torch
    >>> image, latents = torch.randn(2, 196, 64), torch.randn(2, 16, 64)
    >>> CrossLayer(64, 64, qk_dim=8)(image, latents).shape
    torch.Size([2, 196, 64])
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int,
        heads: int = 1,
        *,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        keys: int | None = None,
        mlp_ratio: int = 1,
        dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        self.q_norm, self.kv_norm = nn.LayerNorm(q_dim), nn.LayerNorm(kv_dim)
        self.attention = LatentAttention(
            q_dim, kv_dim, heads, qk_dim=qk_dim, v_dim=v_dim, keys=keys, dropout=dropout
        )  # fmt: skip
        self.mlp = FeedForward(q_dim, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "batch N q_dim"],
        attended: Float[Tensor, "batch L kv_dim"],
        padding: Bool[Tensor, "batch L"] | None = None,
    ) -> Float[Tensor, "batch N q_dim"]:
        """``padding``: True marks tokens of ``attended`` that are padding."""
        x = x + self.attention(self.q_norm(x), self.kv_norm(attended), padding)
        return x + self.mlp(x)


class SelfLayer(nn.Module):
    """Attention among the tokens, then the MLP, both residual.

    Args:
        dim: width.
        heads, qk_dim, v_dim, dropout: as in ``LatentAttention``.
        mlp_ratio: inner width of the MLP over ``dim``.

    Shape: (batch, N, dim), returned as it came.

    >>> import torch
    >>> SelfLayer(64, heads=4, mlp_ratio=4)(torch.randn(2, 16, 64)).shape
    torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        mlp_ratio: int = 1,
        dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = LatentAttention(dim, dim, heads, qk_dim=qk_dim, v_dim=v_dim, dropout=dropout)
        self.mlp = FeedForward(dim, mlp_ratio)

    def forward(
        self, x: Float[Tensor, "batch N dim"], padding: Bool[Tensor, "batch N"] | None = None
    ) -> Float[Tensor, "batch N dim"]:
        """``padding``: True marks tokens that are padding, and attended by none."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, padding)
        return x + self.mlp(x)
