"""Tables that layers make of their weights alone: in evaluation they are made once, not at every call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

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
    held = _KEPT.get(owner)
    if held is None or held.key != key or not held.fresh(weights):
        # The aliases keep the memory: no other tensor can take an address that was looked at.
        seen = [(weight, weight._version, weight.data_ptr(), weight.detach()) for weight in weights]
        _KEPT[owner] = held = _Held(key, seen, make())
    return held.table


@dataclass(frozen=True, eq=False)
class _Held:
    key: Hashable
    seen: list[tuple[Tensor, int, int, Tensor]]  # a weight, its version, its address, its memory
    table: Any

    def fresh(self, weights: Sequence[Tensor]) -> bool:
        return len(weights) == len(self.seen) and all(
            weight is before and weight._version == version and weight.data_ptr() == address
            for weight, (before, version, address, _) in zip(weights, self.seen)
        )


_KEPT: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
