"""The two-part cache against a plain list of everything that was ever put in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from manyheads.adapt.duo_cache import DuoCache, DuoLayer, live_bytes

RETRIEVAL = torch.tensor([True, False, False, True])


def feed(layer: DuoLayer, chunks: list[int], pads: list[int], positions: bool = True):
    """Feed chunks of keys that say who they are (value = position in the padded sequence) and yield what is read."""
    seen = 0
    for tokens in chunks:
        where = torch.arange(seen, seen + tokens, dtype=torch.float32)
        key = where[None, None, :, None].expand(len(pads), 4, -1, 2).clone()
        layer.update(key, key + 0.5)
        padding = torch.tensor(pads) if any(pads) else None
        yield seen, layer.read(padding, max(pads), positions=positions)
        seen += tokens


def visible_slots(seen: int, pad: int, chunks: list[int], sinks: int, recent: int) -> list[int]:
    """What the rule "afterwards keep the first S and the last R" leaves of one sequence, told step by step."""
    held: list[int] = []
    at = 0
    for tokens in chunks:
        if at == seen:
            break
        held += [token for token in range(at, at + tokens) if token >= pad]
        at += tokens
        if len(held) > sinks + recent:
            held = held[:sinks] + held[len(held) - recent :]
    return held


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    chunks=st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 12]), min_size=1, max_size=14),
    pads=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    sinks=st.integers(0, 3),
    recent=st.integers(1, 5),
)
def test_every_sequence_keeps_its_first_and_last_tokens(chunks, pads, sinks, recent) -> None:
    layer = DuoLayer(RETRIEVAL, sinks=sinks, recent=recent)
    for seen, parts in feed(layer, chunks, pads):
        total = layer.get_seq_length()
        assert parts.keys.shape == (len(pads), 2, total, 2)
        assert torch.equal(parts.keys[0, 0, :, 0], torch.arange(total, dtype=torch.float32))
        assert torch.equal(parts.stream_values, parts.stream_keys + 0.5)
        for row, pad in enumerate(pads):
            expected = visible_slots(seen, pad, chunks, sinks, recent)
            expected += [token for token in range(seen, total) if token >= pad]
            positions = parts.stream_positions[row if len(parts.stream_positions) > 1 else 0]
            got = parts.stream_keys[row, 1, :, 0][positions >= 0].long()
            assert sorted(got.tolist()) == expected
            assert torch.equal(got - pad, positions[positions >= 0])
        assert layer.stream_slots == min(total, sinks + recent)


def test_the_reported_bytes_are_those_of_live_tensors() -> None:
    cache = DuoCache(RETRIEVAL.expand(3, -1), sinks=2, recent=6)
    for layer in cache.layers:
        for _ in feed(layer, [12, 7, 1, 1, 1], [0, 0]):
            pass
    # keys and values, 3 layers, batch 2: 2 retrieval heads x 22 tokens + 2 streaming heads x 8 slots of 2 floats
    assert cache.nbytes == 2 * 3 * 2 * (2 * 22 + 2 * 8) * 2 * 4
    assert cache.slots == [(22, 8)] * 3
    assert cache.get_seq_length() == 22
    assert cache.get_mask_sizes(4, 0) == (26, 0)
    cache.reset()
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0


def test_bytes_of_an_ordinary_cache_count_a_shared_storage_once() -> None:
    cache = DynamicCache()
    key = torch.randn(1, 2, 10, 4)
    cache.update(key, key, 0)
    assert live_bytes(cache) == 2 * key.numel() * 4
    cache.layers[0].values = cache.layers[0].keys[:, :, :5]
    assert live_bytes(cache) == key.numel() * 4


@pytest.mark.parametrize("heads", [[True] * 4, [False] * 4])
def test_layers_with_one_kind_of_head(heads: list[bool]) -> None:
    layer = DuoLayer(torch.tensor(heads), sinks=1, recent=2)
    for _, parts in feed(layer, [5, 1, 1], [0]):
        assert parts.keys.shape[1] + parts.stream_keys.shape[1] == 4
    assert (layer.full_slots, layer.stream_slots) == ((7, 0) if heads[0] else (0, 3))


def test_beams_and_batches_are_reordered() -> None:
    layer = DuoLayer(RETRIEVAL, sinks=1, recent=2)
    key = torch.arange(3.0)[:, None, None, None].expand(3, 4, 6, 2).clone()
    layer.update(key, key)
    layer.read()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert layer.full_keys[:, 0, 0, 0].tolist() == layer.stream_keys[:, 0, 0, 0].tolist() == [2, 0, 0]
    layer.batch_select_indices(torch.tensor([0, 1]))
    layer.batch_repeat_interleave(2)
    assert layer.stream_values[:, 0, 0, 0].tolist() == [2, 2, 0, 0]


def test_crop_is_exact_or_refused() -> None:
    layer = DuoLayer(RETRIEVAL, sinks=2, recent=6)
    for _ in feed(layer, [7], [0]):
        pass
    layer.crop(-3)
    assert (layer.get_seq_length(), layer.full_slots, layer.stream_slots) == (4, 4, 4)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(2)
    for _ in feed(layer, [9], [0]):
        pass
    with pytest.raises(ValueError, match="freed 5 of 13 keys"):
        layer.crop(-1)


def test_a_cache_that_nobody_reads_complains() -> None:
    layer = DuoLayer(RETRIEVAL, sinks=2, recent=6)
    key = torch.zeros(1, 4, 3, 2)
    with pytest.raises(RuntimeError, match="update"):
        layer.read()
    layer.update(key, key)
    with pytest.raises(RuntimeError, match="with duo"):
        layer.update(key, key)
    with pytest.raises(ValueError, match="4 key/value heads"):
        DuoLayer(RETRIEVAL, sinks=2, recent=6).update(key[:, :2], key[:, :2])


def test_gradients_flow_through_a_decode_step() -> None:
    layer = DuoLayer(RETRIEVAL, sinks=1, recent=2)
    total = torch.zeros(())
    leaves = []
    for tokens in (4, 1, 1):
        key = torch.randn(1, 4, tokens, 2, requires_grad=True)
        leaves.append(key)
        layer.update(key, key)
        total = total + layer.read().stream_keys.square().sum()
    total.backward()
    assert all(leaf.grad is not None and leaf.grad[:, 1].abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieval": torch.zeros(4, dtype=torch.bool)}, "layers, key/value heads"),
        ({"retrieval": torch.zeros(2, 4)}, "binarize"),
        ({"sinks": -1}, "sinks=-1"),
        ({"recent": 0}, "recent=0"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DuoCache(**{"retrieval": torch.ones(2, 4, dtype=torch.bool), "sinks": 2, "recent": 6, **change})
