"""The two-part cache of DuoAttention: whole context for retrieval heads, sinks and a recent window for the others.

After N tokens a layer with F retrieval heads out of H_k key/value heads holds, per sequence, twice (keys, values)::

    F * N + (H_k - F) * min(N, sinks + recent)      rows of head_dim values

Keys are stored after the rotary embedding at their true positions and are never rotated again, so the cache reports the
number of tokens *seen*, not the slots held. Old keys of streaming heads are freed, not masked.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819,
section 2.4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Parts(NamedTuple):
    """What the tokens of one call attend to, the new tokens last in both parts.

    Attributes:
        keys: (batch, retrieval heads, tokens seen, head_dim).
        values: likewise.
        stream_keys: (batch, streaming heads, slots held before the call + new tokens, head_dim).
        stream_values: likewise.
        stream_positions: (1 or batch, slots + new tokens) position of every streaming key, counted from the first
            real token of its sequence; negative for padding.
    """

    keys: Tensor
    values: Tensor
    stream_keys: Tensor
    stream_values: Tensor
    stream_positions: Tensor | None


class DuoCache(Cache):
    """A Hugging Face cache that keeps every key of retrieval heads and at most sinks + recent keys of the others.

    It works together with the attention function that ``DuoAttention`` attaches, which makes one by itself for
    every ``generate()``; make one by hand to keep it between calls.

    Args:
        retrieval: boolean (layers, key/value heads), True where a head keeps its whole context.
        sinks: first tokens that streaming heads keep (S).
        recent: last tokens that streaming heads keep (R).

    Raises:
        ValueError: a map that is not two-dimensional, sinks < 0 or recent < 1.

    Source: arXiv 2410.10819, section 2.4.

    >>> import torch
    >>> cache = DuoCache(torch.tensor([[True, False], [False, False]]), sinks=4, recent=16)
    >>> len(cache), cache.get_seq_length(), cache.nbytes
    (2, 0, 0)
    """

    def __init__(self, retrieval: Tensor, *, sinks: int, recent: int) -> None:
        retrieval = check_duo(retrieval, sinks, recent)
        self.duo_layers = [DuoLayer(row, sinks=sinks, recent=recent) for row in retrieval]
        super().__init__(layers=list(self.duo_layers))
        self.retrieval, self.sinks, self.recent = retrieval, sinks, recent
        self.longest_pad = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are alive in the cache now."""
        return live_bytes(self)

    @property
    def slots(self) -> list[tuple[int, int]]:
        """Per layer, the keys held by each retrieval head and by each streaming head."""
        return [(layer.full_slots, layer.stream_slots) for layer in self.duo_layers]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.longest_pad = 0


class DuoLayer(CacheLayerMixin):
    """One layer of a ``DuoCache``.

    ``update`` only takes the new keys and values in, because how they are kept depends on the padding, which the
    cache is not told; ``read`` (called by the attention function) hands out what to attend to and then frees.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, retrieval: Tensor, *, sinks: int, recent: int) -> None:
        super().__init__()
        self.full = retrieval.nonzero().flatten()
        self.stream = (~retrieval).nonzero().flatten()
        self.sinks, self.recent = sinks, recent
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.seen = 0
        self.head = 0  # index, within the recent part, of its oldest slot: the part is a ring while decoding
        self.new: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False
        self.full_keys = self.full_values = self.stream_keys = self.stream_values = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take device and head_dim from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.full, self.stream = self.full.to(self.device), self.stream.to(self.device)
        self.full_keys, self.full_values = (x[:, self.full, :0] for x in (key_states, value_states))
        self.stream_keys, self.stream_values = (x[:, self.stream, :0] for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take the keys and values of one call in; the attention function then calls ``read``."""
        if self.new is not None:
            raise RuntimeError("a DuoCache works only inside `with duo(model):`, whose attention reads it")
        heads = len(self.full) + len(self.stream)
        if key_states.shape[1] != heads:
            raise ValueError(f"the retrieval map has {heads} key/value heads, the model's keys {key_states.shape[1]}")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.new = (key_states, value_states)
        return key_states, value_states

    def read(self, pads: Tensor | None = None, longest_pad: int = 0, *, positions: bool = True) -> Parts:
        """Keys and values that the tokens taken in by ``update`` attend to; afterwards only the kept ones stay alive.

        Args:
            pads: (batch,) padding tokens on the left of every sequence, in all calls so far; None for none.
            longest_pad: the largest of ``pads``.
            positions: False leaves ``stream_positions`` out where nobody needs them.
        """
        if self.new is None:
            raise RuntimeError("read() needs update() first")
        (key, value), self.new = self.new, None
        if len(self.stream) == 0:
            new_full, new_stream = (key, value), (key[:, :0], value[:, :0])
        else:
            new_full = (key[:, self.full], value[:, self.full])
            new_stream = (key[:, self.stream], value[:, self.stream])
        self.full_keys = torch.cat([self.full_keys, new_full[0]], dim=2)
        self.full_values = torch.cat([self.full_values, new_full[1]], dim=2)

        slots, tokens, most = self.stream_keys.shape[2], key.shape[2], self.sinks + self.recent
        # A ring needs every sequence to have outgrown its slots; the graph of a backward pass forbids writing in place.
        ring = tokens == 1 and self.seen - longest_pad >= most and not key.requires_grad
        if not ring and self.head:
            self._unroll()
        where = self._positions(pads, tokens) if positions else None
        keys = torch.cat([self.stream_keys, new_stream[0]], dim=2)
        values = torch.cat([self.stream_values, new_stream[1]], dim=2)
        if ring:
            oldest = self.sinks + self.head
            self.stream_keys[:, :, oldest] = new_stream[0][:, :, 0]
            self.stream_values[:, :, oldest] = new_stream[1][:, :, 0]
            self.head = (self.head + 1) % self.recent
        elif slots + tokens <= most:
            self.stream_keys, self.stream_values = keys, values
        else:
            self.stream_keys = self._trimmed(keys, slots, pads)
            self.stream_values = self._trimmed(values, slots, pads)
        self.seen += tokens
        return Parts(self.full_keys, self.full_values, keys, values, where)

    def _unroll(self) -> None:
        order = torch.arange(self.recent, device=self.stream_keys.device).roll(-self.head) + self.sinks
        order = torch.cat([torch.arange(self.sinks, device=order.device), order])
        self.stream_keys, self.stream_values = self.stream_keys[:, :, order], self.stream_values[:, :, order]
        self.head = 0

    def _positions(self, pads: Tensor | None, tokens: int) -> Tensor:
        """Position of every slot and then of every new token, from the first real token; negative for padding."""
        slots = self.stream_keys.shape[2]
        slot = torch.arange(slots, device=self.stream_keys.device)
        pads = slot.new_zeros(1) if pads is None else pads.to(slot.device)
        real = (self.seen - pads)[:, None]
        # Slots end with the newest token. A sequence that fills them has its first tokens in the sink slots.
        rank = slot if not self.head else self.sinks + (slot - self.sinks - self.head) % self.recent
        chronological = real - slots + rank
        held = torch.where((slot < self.sinks) & (real >= slots), slot, chronological)
        return torch.cat([held, real + torch.arange(tokens, device=slot.device)], dim=1)

    def _trimmed(self, tensor: Tensor, slots: int, pads: Tensor | None) -> Tensor:
        """The first ``sinks`` real tokens and the last ``recent`` of every sequence; shorter ones keep left padding."""
        most, length = self.sinks + self.recent, tensor.shape[2]
        if pads is None:
            return torch.cat([tensor[:, :, : self.sinks], tensor[:, :, length - self.recent :]], dim=2)
        tokens = length - slots
        before, after = (self.seen - pads).clamp(min=0), (self.seen + tokens - pads).clamp(min=0)
        real = before.clamp(max=slots) + (after - before)
        slot = torch.arange(most, device=tensor.device)
        first = length - real.to(tensor.device).clamp(min=most)[:, None] + slot
        index = torch.where(slot < self.sinks, first, length - most + slot)
        index = index[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        return tensor.gather(2, index)

    @property
    def full_slots(self) -> int:
        """Keys held by each retrieval head (0 where the layer has none)."""
        return self.full_keys.shape[2] if self.is_initialized and len(self.full) else 0

    @property
    def stream_slots(self) -> int:
        """Keys held by each streaming head (0 where the layer has none)."""
        return self.stream_keys.shape[2] if self.is_initialized and len(self.stream) else 0

    def get_seq_length(self) -> int:
        """Tokens seen, which is what rotary positions and masks need."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers every token seen and the new ones."""
        return self.seen + query_length, 0

    def _apply(self, change) -> None:
        if self.is_initialized:
            self.full_keys, self.full_values = change(self.full_keys), change(self.full_values)
            self.stream_keys, self.stream_values = change(self.stream_keys), change(self.stream_values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        self._apply(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """Move the tensors to the CPU."""
        self._apply(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the tensors back."""
        self._apply(lambda x: x.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (given as a negative number), as long as no streaming key has been freed.

        Raises:
            ValueError: a positive number, or streaming heads have already dropped keys that would be needed again.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if len(self.stream) and self.stream_keys.shape[2] < self.seen:
            raise ValueError(
                f"cannot take back {-tokens_to_remove} tokens: streaming heads have freed "
                f"{self.seen - self.stream_keys.shape[2]} of {self.seen} keys; decode without an assistant model"
            )
        self.seen = max(self.seen + tokens_to_remove, 0)
        self._apply(lambda x: x[:, :, : self.seen].contiguous())


def check_duo(retrieval: Tensor, sinks: int, recent: int) -> Tensor:
    """The retrieval map as a boolean CPU tensor, after checking the three settings."""
    retrieval = torch.as_tensor(retrieval)
    if retrieval.ndim != 2 or retrieval.numel() == 0:
        raise ValueError(f"retrieval must be (layers, key/value heads), got shape {tuple(retrieval.shape)}")
    if retrieval.dtype != torch.bool:
        raise ValueError(f"retrieval must be boolean, got {retrieval.dtype}; turn gates into a map with binarize()")
    if sinks < 0:
        raise ValueError(f"sinks={sinks} must not be negative")
    if recent < 1:
        raise ValueError(f"recent={recent} must be at least 1: a token attends to itself")
    return retrieval.detach().cpu().clone()


def live_bytes(cache: Cache) -> int:
    """Bytes of all tensor storages reachable from a cache's layers, each storage counted once.

    Works for any Hugging Face cache: it looks at the tensors, not at formulas.

    >>> from transformers import DynamicCache
    >>> live_bytes(DynamicCache())
    0
    """
    storages: dict[int, int] = {}

    def visit(thing: object) -> None:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr() if storage.nbytes() else 0] = storage.nbytes()
        elif isinstance(thing, (list, tuple)):
            for item in thing:
                visit(item)
        elif isinstance(thing, dict):
            for item in thing.values():
                visit(item)

    for layer in cache.layers:
        # The head lists are a property of the method, not of the text; they are a few bytes but not cache.
        visit({name: value for name, value in vars(layer).items() if name not in ("full", "stream")})
    return sum(storages.values())
