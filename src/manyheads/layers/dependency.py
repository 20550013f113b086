"""The layer of DependencyViT: reversed attention, whose tokens choose heads and can fall silent.

    P = softmax_h( W_P x / temperature )                      head selector: how a child divides its message over heads
    m <- m * sigmoid( w_2 GELU(W_1 x) )                       message controller: what is left of it, layer by layer
    y = W_O concat_h( A_h^T (P_h m v_h) ),   q, k, v = W x    reversed attention, see ``manyheads.ops.reversed``

The message m starts at one and never grows, so that a token that has sent its content to its parents ends as a leaf.

Source: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282; no code was
published. Widths and biases follow the reimplementation proposed to timm (pull request 2062).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.ops.reversed import BACKENDS, dependency_mask, reversed_attention


class MessageController(nn.Module):
    """A number between 0 and 1 for every token: which share of its message it still sends.

    Args:
        dim: width.
        hidden_ratio: hidden width by ``dim``; 0.5 is timm's pull request, 1 comes closer to the published sizes.
        bias: None has no biases; a number gives the last layer one that begins there. The sigmoid starts near one
            half, so the message halves with each layer; with a bias of 3 it keeps 95% of itself.

    Shape: (batch, tokens, dim) to (batch, tokens).

    >>> import torch
    >>> MessageController(8)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(self, dim: int, *, hidden_ratio: int | float = 0.5, bias: int | float | None = None) -> None:
        super().__init__()
        if hidden_ratio <= 0:
            raise ValueError(f"hidden_ratio={hidden_ratio} must be positive")
        hidden = max(1, int(dim * hidden_ratio))
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, 1, bias=bias is not None)
        if bias is not None:
            nn.init.constant_(self.fc2.bias, bias)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens"]:
        return self.fc2(F.gelu(self.fc1(x))).squeeze(-1).sigmoid()


class ReversedAttention(nn.Module):
    """Reversed attention with head selector and message controller.

    Args:
        dim: width, a multiple of ``heads``.
        heads: attention heads.
        qkv_bias: give the fused projection (order q, k, v) a bias.
        qk_norm: layer norm of queries and keys, head by head.
        norm_eps: of those norms.
        temperature: of the head selector; small values let a child speak through one head.
        message_hidden_ratio: hidden width of the message controller by ``dim``.
        message_bias: as ``bias`` of ``MessageController``.
        attn_drop: dropout of the shares A while training.
        proj_drop: dropout of the output while training.
        backend: as in ``manyheads.ops.reversed.reversed_attention``.

    Shape: (batch, tokens, dim) and messages (batch, tokens) to both again.

    Raises:
        ValueError: heads that do not divide ``dim``, a temperature that is not positive, an unknown backend; in
            ``forward``, tokens of another width, messages of another shape or negative ones (looked for on CPUs and
            outside torch.compile only).

    Source: "Visual Dependency Transformers", arXiv 2304.03282.

    >>> import torch
    >>> y, message = ReversedAttention(24, 4)(torch.randn(2, 9, 24))
    >>> y.shape, message.shape
    (torch.Size([2, 9, 24]), torch.Size([2, 9]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        temperature: int | float = 0.1,
        message_hidden_ratio: int | float = 0.5,
        message_bias: int | float | None = None,
        attn_drop: int | float = 0.0,
        proj_drop: int | float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("backend", backend, BACKENDS)
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} of the head selector must be positive")
        self.dim, self.heads, self.temperature = dim, heads, temperature
        self.attn_drop, self.backend = attn_drop, backend
        self.head_selector = nn.Linear(dim, heads, bias=False)
        self.message_controller = MessageController(dim, hidden_ratio=message_hidden_ratio, bias=message_bias)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        message: Float[Tensor, "batch tokens"] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        parents: Float[Tensor, "batch parents dim"] | None = None,
    ) -> tuple[Float[Tensor, "batch parents dim"], Float[Tensor, "batch tokens"]]:
        """What the parents receive, and what is left of the children's messages.

        Args:
            x: the children.
            message: m as the layer before left it; None is one for every token.
            mask: boolean (batch, tokens), True for real tokens; padded ones neither send nor receive.
            causal: children send to themselves and earlier parents only.
            parents: tokens that receive instead of the children themselves (cross form); ``mask`` is the children's.
        """
        query, key, value = self._projections(x, parents)
        weight, message = self._weight(x, message)
        received = reversed_attention(
            query, key, value, weight=weight, child_mask=mask, parent_mask=mask if parents is None else None,
            causal=causal, dropout=self.attn_drop if self.training else 0.0, backend=self.backend,
        )  # fmt: skip
        y = self.proj_drop(self.proj(rearrange(received, "b h n d -> b n (h d)")))
        if mask is not None and parents is None:
            y = y.masked_fill(~mask[..., None], 0)
        return y, message

    def dependency(
        self,
        x: Float[Tensor, "batch tokens dim"],
        message: Float[Tensor, "batch tokens"] | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        parents: Float[Tensor, "batch parents dim"] | None = None,
    ) -> Float[Tensor, "batch parents tokens"]:
        """The soft dependency mask D of the same arguments as ``forward``: (batch, parent, child)."""
        query, key, _ = self._projections(x, parents)
        return dependency_mask(
            query, key, weight=self._weight(x, message)[0], child_mask=mask,
            parent_mask=mask if parents is None else None, causal=causal,
        )  # fmt: skip

    def _projections(self, x: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        for name, tokens in (("x", x), ("parents", x if parents is None else parents)):
            if tokens.ndim != 3 or tokens.shape[2] != self.dim or tokens.shape[0] != x.shape[0]:
                raise ValueError(f"{name} must be (batch, tokens, {self.dim}), got {tuple(tokens.shape)}")
        query, key, value = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if parents is not None:
            dim = x.shape[-1]
            bias = None if self.qkv.bias is None else self.qkv.bias[dim : 2 * dim]
            key = F.linear(parents, self.qkv.weight[dim : 2 * dim], bias)
            key = rearrange(key, "b n (h d) -> b h n d", h=self.heads)
        return self.q_norm(query), self.k_norm(key), value

    def _weight(self, x: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor]:
        """P * m for every head, and m."""
        left = self.message_controller(x)
        if message is not None:
            if message.shape != x.shape[:2]:
                raise ValueError(f"message must be (batch, tokens) = {tuple(x.shape[:2])}, got {tuple(message.shape)}")
            if not torch.compiler.is_compiling() and message.device.type == "cpu" and (message < 0).any():
                raise ValueError("message must not be negative")
            left = message * left
        heads = (self.head_selector(x) / self.temperature).softmax(-1)
        return (heads * left[..., None]).mT, left
