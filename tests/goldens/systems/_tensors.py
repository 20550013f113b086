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


def sides(config: dict, tokens: int) -> tuple[int, int]:
    """The sides of a map of tokens: ``height`` and ``width``, ``input_resolution`` or ``img_size``, else a square."""
    for name in ("input_resolution", "img_size"):
        size = config.get(name)
        pair = [size, size] if isinstance(size, int) else size
        if pair and pair[0] * pair[1] == tokens:
            return pair[0], pair[1]
    square = round(tokens**0.5)
    height = config.get("height") or (tokens // config["width"] if config.get("width") else square)
    return height, config.get("width") or tokens // height


def through_layer(layer: nn.Module, x: Tensor, grad_out: Tensor | None, grid: tuple[int, int]) -> dict[str, Tensor]:
    """A layer for maps on tokens: ``out``, and the gradients ``dx`` and ``d<parameter>`` where one of the output is."""
    x = x.detach().requires_grad_(grad_out is not None)
    outputs = {"out": layer(x.unflatten(1, grid)).flatten(1, 2)}
    if grad_out is not None:
        (outputs["out"] * grad_out).sum().backward()
        learnt = {f"d{name}": weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
        outputs |= {"dx": x.grad, **learnt}
    return outputs
