"""Tables that layers make of their weights alone: in evaluation they are made once, not at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Table = TypeVar("Table")


def kept(owner: nn.Module, weights: Sequence[Tensor], key: Hashable, make: Callable[[], Table]) -> Table:
    """What ``make`` gives, remembered by ``owner`` for the last ``key`` until one of ``weights`` changes.

    Made anew while training, with gradients, in compiled graphs, and of weights that do not count their changes.

    >>> layer = nn.Linear(2, 2).eval()
    >>> with torch.no_grad():
    ...     first = kept(layer, [layer.weight], 3, lambda: layer.weight * 3)
    ...     again = kept(layer, [layer.weight], 3, lambda: layer.weight * 3)
    >>> again is first
    True
    """
    if owner.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference(weights[0]):
        return make()
    now = (key, *((weight.data_ptr(), weight._version) for weight in weights))
    held: tuple[Any, Table, list[Tensor]] | None = owner.__dict__.get("_kept")
    if held is None or held[0] != now:
        # The tensors are held as well, so that no others can come to lie at their addresses.
        held = owner.__dict__["_kept"] = now, make(), [weight.detach() for weight in weights]
    return held[1]
