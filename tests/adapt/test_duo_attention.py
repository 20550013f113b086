"""DuoAttention on tiny random models of several families, against attention with the mask written out."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.adapt.duo_attention import DuoAttention
from manyheads.adapt.duo_cache import DuoCache, live_bytes
from manyheads.adapt.duo_pattern import binarize, load_pattern, save_pattern, strongest
from manyheads.data.cache_names import returned_cache, with_cache

MAP = torch.tensor([[True, False], [False, False], [True, True]])
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma"]


def tiny(kind: str = "llama", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, sliding_window=None, initializer_range=0.3,
    )  # fmt: skip
    config = AutoConfig.for_model(kind, **{**sizes, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def llama() -> torch.nn.Module:
    return tiny()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def expected_logits(model, tokens: torch.Tensor, chunks: list[int], sinks: int, recent: int, strict: bool, map=MAP):
    """One forward pass with, per layer and head, the (tokens x tokens) mask that the chunking implies."""
    length = tokens.shape[1]
    visible = torch.zeros(length, length, dtype=torch.bool)
    held: list[int] = []
    start = 0
    for size in chunks:
        for i in range(start, start + size):
            for j in [*held, *range(start, i + 1)]:
                visible[i, j] = not strict or (i - j < recent or j < sinks)
        held += range(start, start + size)
        start += size
        if len(held) > sinks + recent:
            held = held[:sinks] + held[-recent:]
    causal = torch.ones(length, length).tril().bool()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")

    def masked(module, args, kwargs):
        heads = map[module.layer_idx].repeat_interleave(2)[:, None, None]
        allowed = torch.where(heads, causal, visible)
        kwargs["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None]
        return args, kwargs

    for layer in eager.get_decoder().layers:
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    with torch.no_grad():
        return eager(tokens, use_cache=False).logits


def chunked_logits(model, duo: DuoAttention, tokens: torch.Tensor, chunks: list[int], **kwargs) -> torch.Tensor:
    cache, rows, seen = duo.cache(), [], 0
    mask = kwargs.get("attention_mask")
    with duo(model), torch.no_grad():
        for chunk in tokens.split(chunks, dim=1):
            seen += chunk.shape[1]
            more = (
                {} if mask is None else {"attention_mask": mask[:, :seen], "position_ids": positions(mask, seen, chunk)}
            )
            rows.append(model(chunk, **with_cache(model, cache), **more).logits)
    return torch.cat(rows, dim=1)


def positions(mask: torch.Tensor, seen: int, chunk: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)[:, seen - chunk.shape[1] : seen]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("chunks", [[24], [12, 7, 1, 1, 1, 2], [1] * 24, [3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 7]])
def test_calls_see_what_the_chunking_implies(llama, chunks: list[int], strict: bool) -> None:
    tokens = ids(2, 24)
    duo = DuoAttention(MAP, sinks=2, recent=5, strict_streaming_prefill=strict)
    got = chunked_logits(llama, duo, tokens, chunks)
    torch.testing.assert_close(got, expected_logits(llama, tokens, chunks, 2, 5, strict), rtol=1e-4, atol=1e-4)


def test_strict_prefill_does_not_depend_on_the_chunking(llama) -> None:
    tokens = ids(1, 30)
    duo = DuoAttention(MAP, sinks=2, recent=5, strict_streaming_prefill=True)
    whole = chunked_logits(llama, duo, tokens, [30])
    torch.testing.assert_close(chunked_logits(llama, duo, tokens, [9, 1, 1, 19]), whole, rtol=1e-4, atol=1e-4)
    with duo(llama), torch.no_grad():
        torch.testing.assert_close(llama(tokens, use_cache=False).logits, whole, rtol=1e-4, atol=1e-4)
    loose = DuoAttention(MAP, sinks=2, recent=5)
    assert (chunked_logits(llama, loose, tokens, [9, 1, 1, 19]) - whole).abs().max() > 1e-2


@pytest.mark.parametrize("kind", FAMILIES)
def test_generate_is_unchanged_when_every_head_is_a_retrieval_head(kind: str) -> None:
    model, tokens = tiny(kind), ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    before = model.generate(tokens, **options)
    with DuoAttention(torch.ones(3, 2, dtype=torch.bool), sinks=1, recent=2)(model):
        after = model.generate(tokens, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert isinstance(returned_cache(after), DuoCache)
    assert returned_cache(after).nbytes == live_bytes(returned_cache(before))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_model_is_left_bit_identical(kind: str) -> None:
    model, tokens = tiny(kind), ids(1, 20)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(tokens).logits
        with DuoAttention(MAP, sinks=2, recent=5)(model):
            inside = model.generate(tokens, max_new_tokens=8, do_sample=False)
        after = model(tokens).logits
    assert inside.shape == (1, 28)
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_decoder()._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_error_inside_detaches_too(llama) -> None:
    with pytest.raises(KeyError), DuoAttention(MAP)(llama):
        raise KeyError
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("strict", [False, True])
def test_left_padding_changes_no_sequence(llama, strict: bool) -> None:
    """Every row of a padded batch equals the same sequence alone: each has its own sinks."""
    duo = DuoAttention(MAP, sinks=2, recent=4, strict_streaming_prefill=strict)
    tokens, pads, chunks = ids(3, 26), [0, 5, 14], [10, 6, 1, 1, 1, 1, 1, 1, 4]
    mask = torch.ones_like(tokens)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    got = chunked_logits(llama, duo, tokens, chunks, attention_mask=mask)
    assert got.isfinite().all()
    for row, pad in enumerate(pads):
        alone, left = [], pad
        for size in chunks:
            alone.append(max(size - left, 0))
            left = max(left - size, 0)
        single = chunked_logits(llama, duo, tokens[row : row + 1, pad:], [size for size in alone if size])
        torch.testing.assert_close(got[row : row + 1, pad:], single, rtol=1e-4, atol=1e-4)


def test_generate_makes_chunks_and_beams_and_batches(llama) -> None:
    duo, tokens = DuoAttention(MAP, sinks=2, recent=5), ids(2, 20)
    with duo(llama):
        chunked = llama.generate(tokens, max_new_tokens=6, do_sample=False, prefill_chunk_size=8)
        result = llama.generate(tokens, max_new_tokens=6, do_sample=False, num_beams=3, return_dict_in_generate=True)
        uncached = llama.generate(tokens, max_new_tokens=2, do_sample=False, use_cache=False)
    assert returned_cache(result).slots[0][1] == 7
    assert uncached.shape == (2, 22)
    expected = tokens
    for step in range(6):
        chunks = [8, 8, 4] + [1] * step
        logits = chunked_logits(llama, duo, expected, chunks)
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(chunked, expected)


def test_streaming_heads_hold_less_memory(llama) -> None:
    tokens = ids(1, 120)
    with torch.no_grad(), DuoAttention(MAP, sinks=2, recent=6)(llama):
        cache = returned_cache(llama(tokens))
    per_row = 2 * 8 * 4
    assert cache.nbytes == per_row * (3 * 120 + 3 * 8)
    with torch.no_grad():
        assert live_bytes(returned_cache(llama(tokens))) == per_row * 6 * 120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    with DuoAttention(MAP, sinks=2, recent=5)(model), torch.no_grad():
        cache = returned_cache(model(ids(1, 20)))
        assert model(ids(1, 1), **with_cache(model, cache)).logits.isfinite().all()
    assert cache.layers[0].stream_keys.dtype == dtype


def test_wrong_models_and_maps(llama) -> None:
    with (
        pytest.raises(ValueError, match=r"\(2, 2\), but the model has \(layers, kv heads\) = \(3, 2\)"),
        DuoAttention(MAP[:2])(llama),
    ):
        pass
    with pytest.raises(ValueError, match="sliding window"), DuoAttention(MAP)(tiny("mistral", sliding_window=16)):
        pass
    with DuoAttention(MAP)(llama), pytest.raises(RuntimeError, match="attached"), DuoAttention(MAP)(llama):
        pass
    assert llama.config._attn_implementation == "sdpa"


def test_wrong_caches_and_masks(llama) -> None:
    tokens, duo = ids(2, 8), DuoAttention(MAP, sinks=1, recent=3)
    with torch.no_grad():
        filled = returned_cache(llama(tokens))
    other = DuoAttention(~MAP, sinks=1, recent=3).cache()
    padded = torch.ones_like(tokens)
    padded[0, :2] = 0
    with duo(llama), torch.no_grad():
        with pytest.raises(ValueError, match="filled before"):
            llama(tokens, **with_cache(llama, filled))
        with pytest.raises(ValueError, match="another retrieval map"):
            llama(tokens, **with_cache(llama, other))
        with pytest.raises(ValueError, match="on the left"):
            llama(tokens, attention_mask=padded.flip(1))
        with pytest.raises(ValueError, match="2-D attention_mask"):
            llama(tokens, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
        with pytest.raises(ValueError, match="packed"):
            llama(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1), use_cache=False)
        cache = returned_cache(llama(tokens, attention_mask=padded))
        with pytest.raises(ValueError, match="whole sequence"):
            llama(tokens[:, :1], **with_cache(llama, cache))


def test_binarize_by_quantile_keeps_ties() -> None:
    gates = torch.tensor([[1.4, 0.6], [0.2, -0.3]])
    assert binarize(gates, sparsity=0.5).tolist() == [[True, True], [False, False]]
    assert binarize(gates, sparsity=0.0).all()
    assert not binarize(gates, sparsity=1.0).any()
    assert binarize(gates, threshold=0.6).tolist() == [[True, True], [False, False]]
    assert binarize(torch.full((2, 3), 0.5), sparsity=0.9).all()
    # clipping comes first: 1.4 and 1.2 tie at 1
    assert binarize(torch.tensor([[1.4, 1.2, 0.0, 0.0]]), sparsity=0.75).tolist() == [[True, True, False, False]]


def test_scores_give_exactly_the_wanted_number_of_heads() -> None:
    scores = torch.zeros(3, 4)
    scores[2, 3] = 0.4
    assert strongest(scores, 2, sparsity=0.5).tolist() == [[True, True], [False, False], [False, True]]
    assert DuoAttention.from_retrieval_scores(scores, 2, sparsity=1.0).retrieval.sum() == 0
    assert DuoAttention.from_retrieval_scores(scores, 2, sparsity=0.0, sinks=4).sinks == 4


def test_pattern_folder_round_trip(tmp_path) -> None:
    gates = torch.tensor([[1.02, 0.5], [0.0, -0.01], [0.3, 0.9]])
    save_pattern(tmp_path / "new", gates, sinks=128, recent=200, lr=0.02)
    loaded, config = load_pattern(tmp_path / "new")
    torch.testing.assert_close(loaded, gates)
    assert config == {"sink_size": 128, "recent_size": 200, "lr": 0.02}
    duo = DuoAttention.from_pattern_folder(tmp_path / "new")
    assert (duo.sinks, duo.recent, int(duo.retrieval.sum())) == (128, 200, 3)
    assert DuoAttention.from_pattern_folder(tmp_path / "new", threshold=0.2, recent=8).recent == 8


def test_bad_patterns(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="full_attention_heads"):
        load_pattern(tmp_path)
    for text, message in (("1\t2\n1\n", "as many columns"), ("1\tx\n", "x"), ("1\tnan\n", "finite")):
        (tmp_path / "full_attention_heads.tsv").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_pattern(tmp_path)
    for options, message in (
        ({}, "either"),
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"threshold": -1.0}, "threshold=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            binarize(torch.ones(2, 2), **options)
    with pytest.raises(ValueError, match="divide"):
        strongest(torch.ones(2, 4), 3, sparsity=0.5)
