"""The gated linear attention layer of Linear-MoE, which LASP-2 was published with, on one device or sharded.

::

    [q_h | k_h | v_h] of every head h = rows of W_qkv x         q, k <- phi(q), phi(k)
    o_h = linear attention (LASP-2 where the sequence is sharded)
    y = W_o (RMSNorm_h(o_h) * silu(W_g x))                      one norm weight of head_dim for all heads

Source: "LASP-2", arXiv 2502.07563, and its code Linear-MoE. That code's kernels mask whole blocks of tokens only, so
that tokens see later ones or miss their neighbours; this layer computes the paper's equation.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.engines.features import FeatureMap
from manyheads.engines.linear import linear_attention
from manyheads.parallel.lasp2 import lasp2

_PUBLISHED_NORM = "core_linear_attention.la_output_norm.weight"


class LinearMoEAttention(nn.Module):
    """Gated linear attention with a norm for each head; loads the parameters of Linear-MoE's layer.

    Args:
        dim: width of the tokens, D.
        heads: number of heads; head_dim is dim / heads.
        feature_map: phi, "silu" as in the published scripts; None for none; any name or callable of the linear engine.
        norm: RMS norm of every head (eps 1e-5); False leaves it out.
        log_decay: constant log decays (heads,), <= 0, as in lightning attention and retention; None for none.
        group: process group or one-dimensional device mesh over which the sequence is sharded in order; None computes
            on this device alone (``torch.distributed.group.WORLD`` is all ranks).

    Raises:
        ValueError: heads that do not divide dim.

    Source: arXiv 2502.07563, section 4; Linear-MoE's ``LinearAttention``.

    >>> import torch
    >>> LinearMoEAttention(64, 4)(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    log_decay: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        feature_map: FeatureMap | str | None = "silu",
        norm: bool = True,
        log_decay: Tensor | None = None,
        group: Any = None,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.heads, self.feature_map, self.group = heads, feature_map, group
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.o_gate_proj = nn.Linear(dim, dim, bias=False)
        self.output_norm = nn.RMSNorm(dim // heads, eps=1e-5) if norm else nn.Identity()
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.register_buffer("log_decay", log_decay, persistent=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Attention of the tokens, or of this rank's tokens within the whole sequence where a group was given."""
        qkv = self.qkv_proj(x).unflatten(-1, (self.heads, 3, -1))
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind()
        options: dict[str, Any] = dict(log_decay=self.log_decay, feature_map=self.feature_map)
        if self.group is None:
            out = linear_attention(query, key, value, **options)
        else:
            out = lasp2(query, key, value, group=self.group, **options)
        assert isinstance(out, Tensor)
        out = self.output_norm(out.transpose(1, 2)).flatten(2)
        return self.o_proj(out * F.silu(self.o_gate_proj(x)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        published = prefix + _PUBLISHED_NORM
        if published in state_dict:
            state_dict[prefix + "output_norm.weight"] = state_dict.pop(published)
        super()._load_from_state_dict(state_dict, prefix, *args)
