"""The TNL attention layer: lightning attention between silu projections, a norm and a low-rank sigmoid gate.

::

    q, k, v = silu(W_q x), silu(W_k x), silu(W_v x)
    y       = LayerNorm(lightning_attention(q, k, v, slopes of the layer))
    out     = W_o (y * sigmoid(W_2 W_1 x))

Source: "Various Lengths, Constant Speed", arXiv 2405.17381, in the form of the authors' example module; parameter names
are theirs. The paper's text and the released language models use two other forms of this layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.ops.lightning import lightning_attention, lightning_slopes


class TNLAttention(nn.Module):
    """Lightning attention layer of TNL with a cache of constant size.

    Args:
        embed_dim: D, width of the tokens.
        num_heads: H; divides D.
        bias: biases in all six linear maps.
        layer_idx: l, index of this layer: it sets how fast the heads forget.
        num_layers: L, layers of the model.
        slope_rule: ``rule`` of :func:`manyheads.ops.lightning.lightning_slopes`.
        backend: ``backend`` of :func:`manyheads.ops.lightning.lightning_attention`.

    Attributes:
        operator: what computes the attention; ``manyheads.parallel.context_parallel`` puts another one here where the
            sequence is sharded.

    Raises:
        ValueError: heads that do not divide the width, a layer index outside 0 .. num_layers - 1.

    Source: arXiv 2405.17381; OpenNLPLab/lightning-attention.

    >>> import torch
    >>> layer = TNLAttention(64, 4, layer_idx=3, num_layers=12)
    >>> layer(torch.randn(2, 50, 64)).shape
    torch.Size([2, 50, 64])
    """

    slopes: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = False,
        layer_idx: int = 0,
        num_layers: int = 1,
        slope_rule: str = "geometric",
        backend: str = "auto",
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        self.num_heads, self.backend = num_heads, backend
        self.operator: Callable[..., Any] = lightning_attention
        head_dim = embed_dim // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.output_gate = nn.Sequential(
            nn.Linear(embed_dim, head_dim, bias=bias), nn.Linear(head_dim, embed_dim, bias=bias)
        )
        slopes = lightning_slopes(num_heads, layer=layer_idx, layers=num_layers, rule=slope_rule)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        *,
        state: Float[Tensor, "batch heads head_dim head_dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend over the tokens, after those that ``state`` stands for.

        Args:
            x: (batch, tokens, embed_dim).
            state: what an earlier call returned, (batch, heads, head_dim, head_dim) float32; None at the start.
            mask: True for real tokens, False for padding on either side, which then adds nothing to the state.
            return_state: also return the state after the last token; its size does not depend on the tokens seen.

        Raises:
            ValueError: a mask of another shape than (batch, tokens), a state that does not fit.
        """
        if mask is not None and tuple(mask.shape) != tuple(x.shape[:2]):
            raise ValueError(f"mask must have shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        query, key, value = (
            rearrange(F.silu(project(x)), "b n (h d) -> b h n d", h=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if mask is not None:
            value = value.masked_fill(~mask[:, None, :, None], 0)
        options: dict[str, Any] = {"slopes": self.slopes.to(torch.float32), "initial_state": state}
        if return_state:
            options["return_state"] = True
        found: Any = self.operator(query, key, value, backend=self.backend, **options)
        out = found[0] if return_state else found
        out = self.norm(rearrange(out, "b h n d -> b n (h d)")) * torch.sigmoid(self.output_gate(x))
        out = self.o_proj(out)
        return (out, found[1]) if return_state else out
