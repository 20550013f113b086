"""Where analyses and adaptations take hold of a Hugging Face model, and how they let go of it again.

There are two places. **Head outputs**: a hook before the output projection of a layer sees every head's output.
**The attention itself**: a function registered with transformers' ``AttentionInterface`` receives query, key and value
after rotary embedding and cache update. Parts are found by probing known places and checking widths, never by class
name; no module is replaced or patched; leaving the ``with`` block restores the model exactly.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from manyheads.data.cache_names import given_cache

_BLOCKS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "layers",
    "h",
    "decoder.layers",
    "language_model.layers",
)
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
_PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj", "wo")
_PREFIX = "manyheads_"
_NUMBER = itertools.count()

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Geometry:
    """How many heads a model has, and where.

    Attributes:
        layers: number of attention layers.
        heads: query heads of each layer.
        kv_heads: key/value heads of each layer; query head h reads key/value head ``h // group``.
        head_dim: width of a head.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    def check_heads(self, heads: Iterable[Any], *, kv: bool = False) -> list[tuple[int, int]]:
        """The (layer, head) pairs as a sorted list without repetitions.

        Args:
            heads: (layer, head) pairs, counted in query heads.
            kv: they are counted in key/value heads instead.

        Raises:
            ValueError: a pair outside the model, with the valid range.
        """
        count = self.kv_heads if kv else self.heads
        kind = "key/value" if kv else "query"
        pairs = []
        for pair in heads:
            try:
                layer, head = (int(number) for number in pair)
            except (TypeError, ValueError) as error:
                raise ValueError(f"heads must be (layer, head) pairs, got {pair!r}") from error
            if not (0 <= layer < self.layers and 0 <= head < count):
                raise ValueError(
                    f"head ({layer}, {head}) is outside this model: layers 0 to {self.layers - 1}, "
                    f"{kind} heads 0 to {count - 1}"
                )
            pairs.append((layer, head))
        return sorted(set(pairs))


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a model.

    Attributes:
        index: its number, from 0.
        block: the transformer block that holds it.
        attention: the attention module, the one that an attention function is called with.
        output: its output projection; head h enters it in columns ``h * head_dim`` to ``(h + 1) * head_dim``.
    """

    index: int
    block: nn.Module
    attention: nn.Module
    output: nn.Module


def geometry(model: nn.Module) -> Geometry:
    """The head counts of the model's text decoder.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: a configuration without head counts, or with counts that do not fit each other.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=50)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    >>> geometry(model)
    Geometry(layers=2, heads=4, kv_heads=2, head_dim=8)
    """
    config = _text_config(model)
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        raise ValueError(
            f"the configuration of {type(model).__name__} names no single number of attention heads and layers "
            f"(num_attention_heads={heads!r}, num_hidden_layers={layers!r})"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads")
    return Geometry(layers, heads, kv_heads, head_dim)


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of the model's text decoder, in order.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: no blocks, no attention module in one of them, or no output projection of the right width; the
            message lists what was tried.
    """
    return _layers_of(decoder(model)[1], geometry(model), type(model).__name__)


def decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The text decoder without its language-model head, and its list of blocks.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: no list of blocks at any known place.
    """
    model = _plain(model)
    count = geometry(model).layers
    for path in _BLOCKS:
        *above, last = path.split(".")
        owner: Any = model
        for name in above:
            owner = getattr(owner, name, None)
        blocks = getattr(owner, last, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks) == count:
            return owner, blocks
    raise ValueError(
        f"found no list of {count} transformer blocks in {type(model).__name__}; tried {', '.join(_BLOCKS)}"
    )


def _layers_of(blocks: nn.ModuleList, sizes: Geometry, owner: str) -> list[AttentionLayer]:
    width = sizes.heads * sizes.head_dim
    found = []
    for index, block in enumerate(blocks):
        attention = _first(block, _ATTENTIONS)
        if attention is None:
            raise ValueError(
                f"block {index} of {owner} has no attention module; tried {', '.join(_ATTENTIONS)}, "
                f"it has {', '.join(name for name, _ in block.named_children())}"
            )
        output = _first(attention, _PROJECTIONS)
        if output is None or _input_width(output) != width:
            seen = f"one of width {_input_width(output)}" if output is not None else "none"
            raise ValueError(
                f"block {index} of {owner} needs an output projection of input width {width} "
                f"({sizes.heads} heads of {sizes.head_dim}); found {seen}, tried {', '.join(_PROJECTIONS)}"
            )
        found.append(AttentionLayer(index, block, attention, output))
    return found


@contextmanager
def head_outputs(model: nn.Module, function: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """See or change every head's output, after softmax times value and before the output projection.

    Args:
        model: a Hugging Face decoder; every attention backend serves.
        function: called as ``function(layer, outputs)`` with outputs (batch, tokens, heads, head_dim); what it returns
            replaces them, None leaves them.

    Raises:
        TypeError, ValueError: as ``attention_layers``; also replaced outputs of another shape.
    """
    sizes = geometry(model)

    def hook(layer: int) -> Callable:
        def before(module: nn.Module, args: tuple) -> tuple | None:
            merged = args[0]
            heads = merged.view(*merged.shape[:-1], sizes.heads, sizes.head_dim)
            changed = function(layer, heads)
            if changed is None:
                return None
            if changed.shape != heads.shape:
                raise ValueError(f"head outputs {tuple(heads.shape)} were replaced by {tuple(changed.shape)}")
            return (changed.reshape(merged.shape), *args[1:])

        return before

    handles = [layer.output.register_forward_pre_hook(hook(layer.index)) for layer in attention_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class AttentionCall:
    """What an attention function is told about the call beyond transformers' own arguments.

    Attributes:
        layer: number of the attention layer.
        past: tokens that the cache held before this call, so query row i stands at column ``past + i``.
        original: the attention that the model had; ``original(module, query, key, value, mask, **options)`` gives
            exactly the output it would have given.
    """

    layer: int
    past: int
    original: AttentionFunction


@contextmanager
def attention_function(
    model: nn.Module, function: Callable[..., tuple[Tensor, Tensor | None]], *, mask: Callable | None = None
) -> Iterator[None]:
    """Compute the model's attention by ``function`` inside the ``with`` block.

    Args:
        model: a Hugging Face decoder whose classes go through ``AttentionInterface``.
        function: called as ``function(call, module, query, key, value, attention_mask, **options)`` with an
            ``AttentionCall``, query (batch, heads, new, head_dim) and key, value (batch, kv_heads, all, head_dim) after
            rotary embedding and cache update; options hold ``scaling`` and ``dropout``. Returns the output (batch, new,
            heads, head_dim) and weights or None.
        mask: builder of attention masks, as ``AttentionMaskInterface`` takes them. None keeps the model's own where
            that is "eager" or "sdpa", otherwise takes one of these; ``visible_keys`` reads both.

    Parts that are no text decoder layers (a vision tower) keep the attention they had.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: a model that cannot be attached to, with what was tried.
        RuntimeError: something else is attached already.
    """
    owner = _plain(model)
    layers = {id(layer.attention): layer.index for layer in attention_layers(model)}
    configs = _configs(model)
    current = _text_config(model)._attn_implementation
    if str(current).startswith(_PREFIX):
        raise RuntimeError("an attention function is attached to this model already; leave its with block first")
    base = current if current in ("eager", "sdpa") else "sdpa" if getattr(owner, "_supports_sdpa", False) else "eager"
    name = f"{_PREFIX}{next(_NUMBER)}"
    past = 0

    def dispatch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        original = _original(base, module)
        if id(module) not in layers:
            return original(module, query, key, value, attention_mask, **options)
        call = AttentionCall(layers[id(module)], past, original)
        return function(call, module, query, key, value, attention_mask, **options)

    def note_past(module: nn.Module, args: tuple, options: dict) -> None:
        nonlocal past
        cache = given_cache(options)
        past = int(cache.get_seq_length()) if cache is not None else 0

    AttentionInterface.register(name, dispatch)
    AttentionMaskInterface.register(name, mask or AttentionMaskInterface._global_mapping[base])
    handle = decoder(model)[0].register_forward_pre_hook(note_past, with_kwargs=True)
    try:
        owner.set_attn_implementation(name)
        if _text_config(model)._attn_implementation != name:
            raise ValueError(f"{type(owner).__name__} does not compute its attention through AttentionInterface")
        yield
    finally:
        handle.remove()
        for config, implementation in configs:
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def visible_keys(attention_mask: Tensor | None, queries: int, keys: int, rows: Tensor) -> Tensor | None:
    """Which keys the given query rows see, as a boolean (batch or 1, heads or 1, rows, keys); None means all of them.

    Args:
        attention_mask: what the attention function got: boolean or additive (batch, heads or 1, queries, keys), or None
            for plain causal attention (every key for a single query).
        queries: query rows of the call.
        keys: keys of the call.
        rows: (rows,) the same query rows for every sequence, or (batch, rows).
    """
    if attention_mask is None:
        if queries == 1:
            return None
        # As in transformers' sdpa: several rows without a mask start at the first key (the cache was empty).
        seen = torch.arange(keys, device=rows.device) <= rows[..., None]
        return seen[None, None] if rows.ndim == 1 else seen[:, None]
    if attention_mask.ndim != 4:
        raise ValueError(f"an attention mask must have 4 axes here, got shape {tuple(attention_mask.shape)}")
    mask = attention_mask[..., :keys]
    if rows.ndim == 1:
        mask = mask[:, :, rows]
    else:
        mask = mask.expand(rows.shape[0], *mask.shape[1:])
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))
    # Additive masks mark hidden keys with the most negative number of their dtype.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _plain(model: nn.Module) -> Any:
    # A PEFT model wraps the one that has the layers.
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = model if unwrap is None else unwrap()
    if not hasattr(inner, "config") or not hasattr(inner, "set_attn_implementation"):
        raise TypeError(f"need a Hugging Face PreTrainedModel, got {type(model).__name__}")
    return inner


def _text_config(model: nn.Module) -> Any:
    return _plain(model).config.get_text_config()


def _configs(model: nn.Module) -> list[tuple[Any, Any]]:
    found: dict[int, Any] = {
        id(part.config): part.config for part in model.modules() if hasattr(part, "set_attn_implementation")
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


def _original(base: str, module: nn.Module) -> AttentionFunction:
    # "eager" is not in the table: each modelling file has its own.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


def _first(owner: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((part for name in names if isinstance(part := getattr(owner, name, None), nn.Module)), None)


def _input_width(projection: nn.Module) -> int | None:
    width = getattr(projection, "in_features", None)
    weight = getattr(projection, "weight", None)
    # GPT-2's Conv1D keeps its weight as (in, out).
    return width if width is not None else (weight.shape[0] if weight is not None else None)
