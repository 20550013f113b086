"""The gating unit of NiNformer with its weights.

Source: "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", arXiv 2403.02411.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.ops.mixer_gate import BACKENDS, GateWeights, mixer_gating, resize_token_mixing, token_mixing_gate


class TokenMixer(nn.Module):
    """The inner MLP-Mixer: mixes tokens, then channels; its output is the gate of ``MixerGating``.

    Args:
        dim: channels C.
        tokens: N, fixed: the weights belong to positions.
        token_hidden: hidden units T of the mixing over tokens.
        channel_hidden: hidden units F of the mixing over channels; None takes T, as the authors do.
        dropout: after each GELU and each second linear, in training (0.5 in the authors' code).
        backend: as in ``manyheads.ops.mixer_gate.token_mixing_gate``.

    Shape: (batch, tokens, dim), returned as it came.

    Raises:
        ValueError: sizes below one, ``dropout`` outside [0, 1); in ``forward``, other tokens or channels.

    Source: "NiNformer", arXiv 2403.02411.

    >>> import torch
    >>> TokenMixer(8, 16, 32)(torch.randn(2, 16, 8)).shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        token_hidden: int,
        channel_hidden: int | None = None,
        dropout: int | float = 0.5,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        channel_hidden = token_hidden if channel_hidden is None else channel_hidden
        sizes = {"dim": dim, "tokens": tokens, "token_hidden": token_hidden, "channel_hidden": channel_hidden}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        check_choice("backend", backend, BACKENDS)
        self.tokens, self.dropout, self.backend = tokens, dropout, backend
        self.token_norm, self.channel_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_in, self.token_out = nn.Linear(tokens, token_hidden), nn.Linear(token_hidden, tokens)
        self.channel_in, self.channel_out = nn.Linear(dim, channel_hidden), nn.Linear(channel_hidden, dim)

    @property
    def weights(self) -> GateWeights:
        """What the operator takes."""
        parts = (self.token_norm, self.token_in, self.token_out, self.channel_norm, self.channel_in, self.channel_out)
        return GateWeights(*((part.weight, part.bias) for part in parts))

    def set_grid(self, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Resize the mixing over tokens for good, from a map of ``old`` to one of ``new`` positions."""
        with torch.no_grad():
            parts = self.weights
            resized = resize_token_mixing(parts.token_in, parts.token_out, old, new)
            for linear, (weight, bias) in zip((self.token_in, self.token_out), resized, strict=True):
                linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
                linear.out_features, linear.in_features = weight.shape
        self.tokens = new[0] * new[1]

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        dropout = self.dropout if self.training else 0.0
        return token_mixing_gate(x, self.weights, dropout=dropout, backend=self.backend)


class MixerGating(nn.Module):
    """Every token projected, times the gate that an inner mixer computes from all tokens: attention's place.

    Args:
        dim, tokens, token_hidden, channel_hidden, dropout, backend: as in ``TokenMixer``.

    Shape: (batch, tokens, dim), returned as it came.

    Raises:
        ValueError: as in ``TokenMixer``.

    Source: "NiNformer", arXiv 2403.02411.

    >>> import torch
    >>> MixerGating(8, 16, 32)(torch.randn(2, 16, 8)).shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        token_hidden: int,
        channel_hidden: int | None = None,
        dropout: int | float = 0.5,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.mixer = TokenMixer(dim, tokens, token_hidden, channel_hidden, dropout, backend=backend)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        options = {"dropout": self.mixer.dropout if self.training else 0.0, "backend": self.mixer.backend}
        return mixer_gating(x, (self.proj.weight, self.proj.bias), self.mixer.weights, **options)
