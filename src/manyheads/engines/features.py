"""Feature maps of kernel attention: phi(q) . phi(k) stands for the similarity that softmax attention exponentiates.

Each map is a plain function on (..., head_dim); pass it, its name, or any callable of your own as ``feature_map`` of
:func:`manyheads.engines.linear.linear_attention`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FeatureMap = Callable[[Tensor], Tensor]


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, positive everywhere ("Transformers are RNNs", arXiv 2006.16236)."""
    return F.elu(x) + 1


def exp(x: Tensor) -> Tensor:
    """exp(x) as it is: no shift, so keep the logits small."""
    return torch.exp(x)


def exp_shifted(x: Tensor) -> Tensor:
    """exp(x - max x), the maximum over the features of each token; it rescales every key by its own factor."""
    return torch.exp(x - x.amax(dim=-1, keepdim=True).detach())


def softmax_pair(x: Tensor) -> Tensor:
    """[softmax(x), softmax(-x)] over the features, twice as wide ("Hedgehog", arXiv 2402.04347)."""
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1)


def exp_pair(x: Tensor) -> Tensor:
    """[exp(x), exp(-x)], twice as wide ("Hedgehog", arXiv 2402.04347)."""
    return torch.cat([x.exp(), (-x).exp()], dim=-1)


def leaky_relu(x: Tensor) -> Tensor:
    """Leaky relu with slope 0.01."""
    return F.leaky_relu(x, 0.01)


def taylor(x: Tensor) -> Tensor:
    """[1, x, x x^T / sqrt(2)] of x / head_dim^(1/4): phi(q).phi(k) = 1 + s + s^2/2, s = q.k / sqrt(head_dim)."""
    x = x * x.shape[-1] ** -0.25
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, square], dim=-1)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu": elu_plus_one,
    "relu": torch.relu,
    "leaky_relu": leaky_relu,
    "silu": F.silu,
    "exp": exp,
    "exp_shifted": exp_shifted,
    "exp_pair": exp_pair,
    "softmax": softmax_pair,
    "taylor": taylor,
}


def resolve_feature_map(feature_map: FeatureMap | str | None) -> FeatureMap | None:
    """The callable behind a name; callables and None pass through.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is not one of {', '.join(map(repr, FEATURE_MAPS))}")
        return FEATURE_MAPS[feature_map]
    if feature_map is not None and not callable(feature_map):
        raise TypeError(f"feature_map must be a name or a callable, got {type(feature_map).__name__}")
    return feature_map
