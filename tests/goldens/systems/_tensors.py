"""What golden adapters share: arrays in, tensors that want gradients, arrays out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Torch tensors of all arrays."""
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def arrays(outputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Numpy arrays of all tensors."""
    return {name: value.detach().cpu().numpy() for name, value in outputs.items()}


def gradients(function: Callable[..., Tensor], wanted: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """Gradients of ``sum(function(**wanted) * grad_out)`` for every tensor of ``wanted``."""
    leaves = {name: value.detach().requires_grad_() for name, value in wanted.items()}
    (function(**leaves) * grad_out).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def with_counters(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights and the model's own counters of normalised batches, which cases leave out."""
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return counters | weights
