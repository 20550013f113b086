"""DuoAttention: retrieval heads keep the whole context, streaming heads keep sinks and a recent window.

With S sinks and R recent tokens, a streaming head's query i sees key j where ``j <= i and (i - j < R or j < S)``.
Deployed as the authors do, one call with T new tokens computes, per layer::

    cache empty:  plain causal attention for ALL heads (streaming heads too)
    otherwise:    retrieval heads: causal over everything seen + the T new tokens
                  streaming heads: every cached slot + the new tokens, causal among the new ones
    afterwards:   streaming heads keep their first S and last R keys

so what a streaming head sees depends on the chunking; ``strict_streaming_prefill`` applies the mask inside calls too.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from manyheads.adapt.duo_cache import DuoCache, DuoLayer, Parts, check_duo
from manyheads.adapt.duo_pattern import binarize, load_pattern, strongest
from manyheads.data.cache_names import CACHE_NAMES, cache_keyword, given_cache
from manyheads.interpret.attach import AttentionCall, attention_function, decoder, geometry


@dataclass(frozen=True, eq=False)
class DuoAttention:
    """Attach with ``with duo(model): model.generate(...)``; on exit the model is bit for bit what it was.

    ``generate()`` and plain calls make their ``DuoCache`` by themselves; one made by ``duo.cache()`` can be passed
    as the model's cache to keep it between calls. Feed a long prompt in chunks (``prefill_chunk_size`` of
    ``generate``, or several calls) to bound the memory of the prefill: the first chunk is attended to in full.
    Any batch size; shorter sequences are padded on the left and keep sinks of their own.

    Args:
        retrieval: boolean (layers, key/value heads), True for retrieval heads. A layer may have none or only such.
        sinks: first tokens that streaming heads keep (S; the authors deploy 64).
        recent: last tokens that streaming heads keep (R; the authors deploy 256).
        strict_streaming_prefill: apply the streaming mask inside a call too, so that the chunking makes no
            difference. The authors do not (False): they attend to every cached slot and causally inside a chunk.

    Raises:
        ValueError: a map that is not boolean and two-dimensional, sinks < 0, recent < 1; on attaching, a map of
            another model's shape or sliding-window layers.
        RuntimeError: something is attached to the model already.

    Source: arXiv 2410.10819, section 2.4.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from manyheads.data.cache_names import returned_cache
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)).eval()
    >>> duo = DuoAttention(torch.tensor([[True, False], [False, False]]), sinks=2, recent=6)
    >>> with duo(model), torch.no_grad():
    ...     out = model(torch.arange(1, 21)[None], use_cache=True)
    >>> returned_cache(out).slots
    [(20, 8), (0, 8)]
    """

    retrieval: Tensor
    sinks: int = 64
    recent: int = 256
    strict_streaming_prefill: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "retrieval", check_duo(self.retrieval, self.sinks, self.recent))

    @classmethod
    def from_gates(
        cls, gates: Tensor, *, sparsity: float | None = None, threshold: float | None = None, **options
    ) -> DuoAttention:
        """From optimised gates (layers, key/value heads): see ``binarize`` for sparsity and threshold."""
        return cls(binarize(gates, sparsity=sparsity, threshold=threshold), **options)

    @classmethod
    def from_retrieval_scores(cls, scores: Tensor, kv_heads: int, *, sparsity: float = 0.5, **options) -> DuoAttention:
        """From retrieval scores (layers, query heads): a key/value head counts as the best of its query heads.

        Exactly ``round((1 - sparsity) * heads)`` key/value heads keep their cache, ties in (layer, head) order: most
        scores are zero, and the quantile rule of gates would keep every one of those.
        """
        return cls(strongest(scores, kv_heads, sparsity=sparsity), **options)

    @classmethod
    def from_pattern_folder(
        cls, folder: str | Path, *, sparsity: float | None = 0.5, threshold: float | None = None, **options
    ) -> DuoAttention:
        """From a folder of the authors' (``full_attention_heads.tsv`` and ``config.json``, which has S and R)."""
        gates, config = load_pattern(folder)
        sizes = {"sinks": config.get("sink_size", 64), "recent": config.get("recent_size", 256)}
        return cls.from_gates(gates, sparsity=None if threshold is not None else sparsity, threshold=threshold,
                              **{**sizes, **options})  # fmt: skip

    def cache(self) -> DuoCache:
        """An empty cache for this map."""
        return DuoCache(self.retrieval, sinks=self.sinks, recent=self.recent)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Attach to a Hugging Face causal language model for the length of a ``with`` block."""
        state = _State(self)
        check_fits(model, self.retrieval)
        with attention_function(model, state.attend, mask=state.mask):
            hook = decoder(model)[0].register_forward_pre_hook(state.provide_cache, with_kwargs=True)
            try:
                yield model
            finally:
                hook.remove()


class _State:
    """What one attachment remembers between the cache hook, the mask function and the layers of one forward call."""

    def __init__(self, duo: DuoAttention) -> None:
        self.duo = duo
        self.cache: DuoCache | None = None
        self.pads: Tensor | None = None
        self.longest_pad = 0
        self.heads: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def provide_cache(self, module: Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        named = {**{name: value for name, value in named.items() if name != "kwargs"}, **named.get("kwargs", {})}
        given, use_cache = given_cache(named), named.get("use_cache")
        use_cache = cast(Any, module.config).use_cache if use_cache is None else use_cache
        self.cache = self._checked(given) if given is not None else (self.duo.cache() if use_cache else None)
        self.pads, self.longest_pad = None, 0
        if self.cache is not None:
            named = {name: value for name, value in named.items() if name not in CACHE_NAMES}
            named[cache_keyword(module)] = self.cache
        return (), named

    def _checked(self, given: Cache) -> DuoCache:
        duo = self.duo
        if isinstance(given, DuoCache):
            same = given.retrieval.shape == duo.retrieval.shape and torch.equal(given.retrieval, duo.retrieval)
            if not same or (given.sinks, given.recent) != (duo.sinks, duo.recent):
                raise ValueError("the cache was made with another retrieval map, sinks or recent: start a new one")
            return given
        if not isinstance(given, DynamicCache):
            raise ValueError(f"DuoAttention keeps its own DuoCache and cannot use a {type(given).__name__}")
        if given.get_seq_length():
            raise ValueError("the cache was filled before DuoAttention was attached: start a new cache")
        return duo.cache()

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        *,
        attention_mask: Tensor | None = None,
        mask_function: Callable = causal_mask_function,
        **_,
    ) -> None:
        """In the place of Hugging Face's mask: note the left padding, mask nothing (``attend`` does)."""
        if mask_function is not causal_mask_function:
            raise ValueError("DuoAttention takes plain causal attention: no packed sequences, no special masks")
        if attention_mask is not None and not attention_mask.all():
            real = attention_mask[:, :kv_length].to(torch.bool)
            if (real[:, :-1] & ~real[:, 1:]).any():
                raise ValueError("DuoAttention needs padding on the left; attention_mask has zeros after ones")
            self.pads = (~real).sum(dim=1)
            self.longest_pad = int(self.pads.max())
        if self.cache is not None:
            if self.pads is None and self.cache.longest_pad:
                raise ValueError("earlier calls had left padding: pass the attention_mask of the whole sequence")
            self.cache.longest_pad = self.longest_pad
        return None

    def attend(
        self,
        call: AttentionCall,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """The attention function: one SDPA call for retrieval heads, one for streaming heads."""
        if attention_mask is not None:
            raise ValueError("DuoAttention makes its own masks; pass a 2-D attention_mask of padding, not a 4-D one")
        duo, layer = self.duo, call.layer
        parts = self._parts(layer, key, value)
        full, stream = self._query_heads(layer, query.shape[1], query.device)
        run = lambda q, k, v, mask: sdpa_attention_forward(  # noqa: E731
            module, q, k, v, mask, dropout=dropout, scaling=scaling, softcap=kwargs.get("softcap")
        )[0]
        tokens = query.shape[2]
        full_mask = causal_mask(tokens, parts.keys.shape[2], self.pads, query.device)
        if len(stream) == 0:
            return run(query, parts.keys, parts.values, full_mask), None
        stream_mask = streaming_call_mask(
            tokens,
            parts.stream_keys.shape[2],
            parts.stream_positions,
            window=(duo.sinks, duo.recent) if duo.strict_streaming_prefill else None,
            device=query.device,
        )
        if len(full) == 0:
            return run(query, parts.stream_keys, parts.stream_values, stream_mask), None
        out = query.new_empty(query.shape[0], tokens, query.shape[1], value.shape[-1])
        out[:, :, full] = run(query[:, full], parts.keys, parts.values, full_mask)
        out[:, :, stream] = run(query[:, stream], parts.stream_keys, parts.stream_values, stream_mask)
        return out, None

    def _parts(self, layer: int, key: Tensor, value: Tensor) -> Parts:
        positions = self.pads is not None or self.duo.strict_streaming_prefill
        if self.cache is not None:
            return self.cache.duo_layers[layer].read(self.pads, self.longest_pad, positions=positions)
        # Without a cache the call is a first chunk whose keys nobody keeps.
        once = DuoLayer(self.duo.retrieval[layer], sinks=self.duo.sinks, recent=self.duo.recent)
        once.update(key, value)
        return once.read(self.pads, self.longest_pad, positions=positions)

    def _query_heads(self, layer: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if (layer, device) not in self.heads:
            retrieval = self.duo.retrieval[layer].repeat_interleave(heads // self.duo.retrieval.shape[1])
            self.heads[layer, device] = (
                retrieval.nonzero().flatten().to(device),
                (~retrieval).nonzero().flatten().to(device),
            )
        return self.heads[layer, device]


def causal_mask(tokens: int, keys: int, pads: Tensor | None, device: torch.device) -> Tensor | None:
    """Boolean (1 or batch, 1, tokens, keys), the last query seeing the last key; None where SDPA needs no mask."""
    if pads is None and tokens in (1, keys):
        return None
    key = torch.arange(keys, device=device)
    mask = key <= torch.arange(keys - tokens, keys, device=device)[:, None]
    return mask[None, None] if pads is None else (mask & (key >= pads.to(device)[:, None, None]))[:, None]


def streaming_call_mask(
    tokens: int, keys: int, positions: Tensor | None, *, window: tuple[int, int] | None, device: torch.device
) -> Tensor | None:
    """The same for streaming heads: every slot and, causally, the new tokens; (sinks, recent) narrows it to the mask.

    ``positions`` are those of ``Parts.stream_positions``: negative ones are padding.
    """
    mask = causal_mask(tokens, keys, None, device)
    if positions is None:
        return mask
    key = positions.to(device)[:, None, None, :]
    seen = key >= 0
    if mask is not None:
        seen = seen & mask
    elif tokens > 1:
        seen = seen & torch.ones(tokens, keys, dtype=torch.bool, device=device).tril()
    if window is not None:
        sinks, recent = window
        query = key[..., -tokens:].transpose(-1, -2)
        seen = seen & ((query - key < recent) | (key < sinks))
    return seen.expand(-1, -1, tokens, -1)


def check_fits(model: PreTrainedModel, heads: Tensor) -> None:
    """Raise ValueError unless a head map has this model's shape and every layer attends to its whole context."""
    sizes, config = geometry(model), model.config.get_text_config(decoder=True)
    wanted = (sizes.layers, sizes.kv_heads)
    if tuple(heads.shape) != wanted:
        raise ValueError(f"the map is {tuple(heads.shape)}, but the model has (layers, kv heads) = {wanted}")
    windows = sliding_layers(config)
    if windows:
        raise ValueError(
            f"layers {windows[:6]}{'...' if len(windows) > 6 else ''} of this {config.model_type} model use a sliding "
            "window already: DuoAttention needs layers that attend to their whole context"
        )


def sliding_layers(config) -> list[int]:
    """Indices of layers that do not attend to their whole context."""
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding"] * config.num_hidden_layers if getattr(config, "sliding_window", None) else []
    return [index for index, kind in enumerate(types) if kind != "full_attention"]
