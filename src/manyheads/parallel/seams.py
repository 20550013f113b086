"""Where a sharded sequence enters a model that knows nothing of it: its attention, its linear layers, its gradients.

Every seam is a context manager that leaves the model as it found it. Softmax attention is replaced through the
``AttentionInterface`` of transformers, linear attention through the ``operator`` of the library's layers, and gradients
are summed by hooks: on the parameters, or, where FSDP holds them, after its reduce-scatter.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from manyheads.parallel.wire import Wire

if TYPE_CHECKING:
    from manyheads.layers.lightning import TNLAttention

_PREFIX = "manyheads_context_parallel_"
_NUMBER = itertools.count()
# What transformers hands to attention functions of some models, and a sharded softmax does not compute.
_UNKNOWN = ("position_bias", "alibi", "head_mask")
# Kinds of layers, in configurations, whose tokens meet in attention alone.
_KNOWN_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def pretrained(model: nn.Module) -> Any:
    """The Hugging Face model inside (a PEFT model wraps one), or None where there is none."""
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    return inner if hasattr(inner, "config") and hasattr(inner, "set_attn_implementation") else None


def linear_layers(model: nn.Module) -> list[TNLAttention]:
    """The library's linear attention layers in the model."""
    # A model has none before their module was imported, and importing the layers takes seconds.
    module: Any = sys.modules.get("manyheads.layers.lightning")
    if module is None:
        return []
    parts: Any = model.modules()
    return [part for part in parts if isinstance(part, module.TNLAttention)]


class Given(NamedTuple):
    """What a model's layer tells its attention function.

    Attributes:
        scale: factor on the scores, None for ``head_dim ** -0.5``.
        window: tokens that a query sees, its own included; None for all before it.
        softcap: the scores' soft cap, None for none.
        sinks: (heads,), a logit for each head that takes part in the softmax without a value; None for none.
    """

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


def check_mixers(owner: Any, tokens: int) -> None:
    """Raise ValueError where tokens meet in a Hugging Face model elsewhere than in attention that can be replaced."""
    config, ours = owner.config.get_text_config(), {id(part) for one in linear_layers(owner) for part in one.modules()}
    kinds = set(getattr(config, "layer_types", None) or ()) - set(_KNOWN_LAYERS)
    if kinds:
        raise ValueError(f"{type(owner).__name__} has layers of kind {', '.join(sorted(map(str, kinds)))}, whose "
                         "tokens meet outside its attention: its sequence cannot be sharded")  # fmt: skip
    for name, part in owner.named_modules():
        if isinstance(part, nn.Conv1d | nn.RNNBase) and id(part) not in ours:
            raise ValueError(f"{name} ({type(part).__name__}) mixes tokens outside the attention of "
                             f"{type(owner).__name__}: its sequence cannot be sharded")  # fmt: skip
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < tokens:
        raise ValueError(f"{type(owner).__name__} attends within chunks of {chunk} of the {tokens} tokens, which a "
                         "sharded softmax lacks")  # fmt: skip


@contextmanager
def softmax_attention(owner: Any, compute: Callable[..., Tensor]) -> Iterator[None]:
    """Let ``compute(query, key, value, given, passed)`` be the attention of a Hugging Face model.

    ``given`` says how it attends, see :class:`Given`; ``passed`` is the keyword argument ``context_parallel`` of the
    model's call, where there was one and the model hands it on.
    """
    from transformers import AttentionInterface  # seconds to import, for those who shard no model

    configs = _configs(owner)
    if str(owner.config.get_text_config()._attn_implementation).startswith("manyheads_"):
        raise RuntimeError("something is attached to this model's attention already; leave its with block first")
    name = f"{_PREFIX}{next(_NUMBER)}"

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        if not options.get("is_causal", getattr(module, "is_causal", True)):
            raise ValueError(f"{type(module).__name__} is not causal: only causal language models can be sharded")
        if options.get("dropout"):
            raise ValueError(
                f"attention dropout is {options['dropout']}: it would need the same random numbers as one device; set "
                "it to 0 in the model's configuration"
            )
        for option in _UNKNOWN:
            if options.get(option) is not None:
                raise ValueError(f"{type(module).__name__} attends with {option!r}, which a sharded softmax lacks")
        if isinstance(attention_mask, Tensor):
            raise ValueError(f"{type(module).__name__} makes a mask of its own, which a sharded softmax does not know")
        given = Given(*(options.get(name) for name in ("scaling", "sliding_window", "softcap", "s_aux")))
        return compute(query, key, value, given, options.get("context_parallel")).transpose(1, 2), None

    # No mask function under this name: transformers then builds no mask, and causality is the scheme's.
    AttentionInterface.register(name, attend)
    try:
        owner.set_attn_implementation(name)
        if owner.config.get_text_config()._attn_implementation != name:
            raise ValueError(f"{type(owner).__name__} does not compute its attention through AttentionInterface")
        yield
    finally:
        for config, implementation in configs:
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(name, None)


@contextmanager
def linear_attention(layers: list[TNLAttention], operator: Callable[..., Any]) -> Iterator[None]:
    """Let ``operator`` compute the linear layers' attention."""
    before = [layer.operator for layer in layers]
    for layer in layers:
        layer.operator = operator
    try:
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.operator = old


@contextmanager
def summed_gradients(model: nn.Module, wire: Wire) -> Iterator[None]:
    """Sum every gradient over the ranks that share a sequence, in float32, before it is accumulated."""

    def total(grad: Tensor) -> Tensor:
        with wire.guard():
            whole = grad.detach().to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
            wire.all_reduce(whole, "gradient of parameters").wait()
        return whole.to(grad.dtype)

    def total_in_place(grad: Tensor) -> None:
        grad.copy_(total(grad))

    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    _check_meshes(model, wire)
    handles = []
    if wire.world > 1:
        for part in sharded:
            part.set_all_reduce_hook(total_in_place)
        plain = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        handles = [parameter.register_hook(total) for parameter in plain]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part in sharded:
            part.set_all_reduce_hook(None)  # pyright: ignore[reportArgumentType]


def _check_meshes(model: nn.Module, wire: Wire) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            shared = set(parameter.device_mesh.mesh.flatten().tolist()) & set(wire.members)
            if len(shared) > 1:
                raise ValueError(
                    f"{name} is sharded over ranks {sorted(shared)}, which also share a sequence: shard it over the "
                    "other dimension of the mesh, or pass gradients='averaged'"
                )


def _configs(owner: Any) -> list[tuple[Any, Any]]:
    found: dict[int, Any] = {
        id(part.config): part.config for part in owner.modules() if hasattr(part, "set_attn_implementation")
    }
    waiting = list(found.values())
    while waiting:
        config = waiting.pop()
        for name in getattr(config, "sub_configs", ()):
            inner = getattr(config, name, None)
            if inner is not None and id(inner) not in found:
                found[id(inner)] = inner
                waiting.append(inner)
    return [(config, config._attn_implementation_internal) for config in found.values()]
