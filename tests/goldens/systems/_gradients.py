"""Gradients that a case asks for, whatever it calls them.

An input named like ``dy``, ``dout``, ``grad_y`` or ``grad_out`` is the gradient of an output ("out" and "output" mean
the first one); outputs named like ``dx``, ``d_x``, ``grad_x`` or "grad x" are then added for inputs and parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.models.checkpoints import Convert, load_checkpoint
from tests.goldens.systems._tensors import with_counters

Computed = tuple[dict[str, Tensor], dict[str, Tensor]]
_PREFIX = re.compile(r"^(?:grad_|grad |d_|d)")
_PREFIXES = ("d", "d_", "grad_", "grad ")


def with_gradients(compute: Callable[[dict[str, Tensor]], Computed], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of ``compute(inputs)``, which also returns parameters by the authors' names, and the gradients asked."""
    asked = {name: value for name, value in given.items() if _PREFIX.match(name) and value.is_floating_point()}
    inputs = {name: value for name, value in given.items() if name not in asked}
    if not asked:
        with torch.no_grad():
            return compute(inputs)[0]
    leaves = {name: value for name, value in inputs.items() if value.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs, parameters = compute(inputs)
    terms = []
    for name, gradient in asked.items():
        wanted = _PREFIX.sub("", name)
        output = outputs[wanted] if wanted in outputs else next(iter(outputs.values()))
        terms.append((output * gradient).sum())
    torch.stack(terms).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    result = {**outputs}
    for name, gradient in found.items():
        result |= {f"{prefix}{name}": gradient for prefix in _PREFIXES}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            result |= {f"{prefix}{name}": parameter.grad for prefix in _PREFIXES}
    return result


def by_their_names(model: nn.Module, theirs: dict[str, Tensor], converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters by the names of the tensors that a converter took them from, untouched."""
    names = {id(value): name for name, value in theirs.items()}
    own = dict(model.named_parameters())
    return {names[id(value)]: own[name] for name, value in converted.items() if name in own and id(value) in names}


def of_backbone(model: Any, weights: dict[str, Tensor], convert: Convert, given: dict[str, Tensor], *, training=False):
    """Logits, the map of every stage and the gradients asked of a backbone that loads ``weights``.

    With ``training`` the model is as it trains, without any dropout; a pair of logits is then ``logits`` and
    ``logits_dist``.
    """
    converted = convert(weights, model)
    load_checkpoint(model, with_counters(converted, model), lambda state, _: state)
    theirs = by_their_names(model, weights, converted)
    model.train(training)

    def compute(inputs: dict[str, Tensor]) -> Computed:
        last, maps = model.forward_intermediates(inputs["x"])
        logits = model.forward_head(last)
        both = {"logits": logits[0], "logits_dist": logits[1]} if isinstance(logits, tuple) else {"logits": logits}
        pooled = {"features": last, "pre_logits": model.forward_head(last, pre_logits=True)}
        return {**both, **{f"feature{s}": x for s, x in enumerate(maps, 1)}, **pooled}, theirs

    return with_gradients(compute, given)
