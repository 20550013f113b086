"""What `manyheads try` measures, on a tiny random model with a tokenizer made here; once on the real one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyheads.adapt.duo_attention import DuoAttention
from manyheads.adapt.duo_pattern import save_pattern
from manyheads.bench.language import FACTS, measure, memory_and_speed, perplexity, pieces
from manyheads.bench.try_method import attention_patterns, try_method
from manyheads.data.needles import NEEDLES
from manyheads.data.text import python_documentation

TEXT = "The sentence ends . " + python_documentation()[:40_000] + " ".join(n.sentence for n in (*FACTS, *NEEDLES))


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<pad>", *sorted(set(TEXT.split()))]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, attn_implementation="sdpa",
        pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_perplexity_in_chunks_is_the_models_own_loss(model) -> None:
    tokens = torch.randint(2, 300, (70,))
    with torch.no_grad():
        loss = model(tokens[None], labels=tokens[None]).loss
    for chunk in (1, 16, 69, 500):
        assert perplexity(model, tokens.tolist(), chunk=chunk) == pytest.approx(math.exp(loss), rel=1e-4)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(model, [1])


def test_bytes_are_those_of_the_tensors_held(model) -> None:
    tokens = torch.randint(2, 300, (100,)).tolist()
    row = 2 * 8 * 4
    held, prefill, decode = memory_and_speed(model, tokens, chunk=32, decode_tokens=2)
    assert held == row * 4 * 100
    assert prefill > 0 < decode
    retrieval = torch.tensor([[True, False], [False, False]])
    with DuoAttention(retrieval, sinks=4, recent=16)(model):
        assert memory_and_speed(model, tokens, chunk=32, decode_tokens=2)[0] == row * (100 + 3 * 20)


def test_measuring_tells_of_every_piece(model, tokenizer) -> None:
    told = []
    result = measure(
        model, tokenizer, lengths=[130, 200], depths=[0.0, 100.0], perplexity_tokens=64, decode_tokens=2,
        advance=told.append,
    )  # fmt: skip
    assert len(told) == pieces([130, 200], [0.0, 100.0]) == 6
    assert [len(row) for row in result.needle] == [2, 2]
    assert result.cache_tokens == 200
    assert result.perplexity > 1


def test_patterns_are_rows_of_weights(model, tokenizer) -> None:
    tokens, patterns = attention_patterns(model, tokenizer)
    rows = torch.tensor(patterns)
    assert rows.shape == (2, 4, len(tokens), len(tokens))
    assert rows.min() >= 0
    assert ((rows.sum(-1) - 255).abs() <= len(tokens)).all()
    assert (rows.triu(1) == 0).all()
    assert model.config._attn_implementation == "sdpa"


def test_trying_with_a_folder_of_gates(model, tokenizer, tmp_path) -> None:
    gates = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    save_pattern(tmp_path, gates, sinks=4, recent=16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trial = try_method(
        "duo_attention", model, tokenizer, model_name="tiny", sinks=4, recent=16, lengths=[160], depths=[50.0],
        heads=tmp_path, progress=False, chunk=32,
    )  # fmt: skip
    assert trial.retrieval == [[True, False], [False, True]]
    assert len(trial.head_scores[0]) == 4
    row = 2 * 8 * 4
    assert (trial.before.cache_bytes, trial.after.cache_bytes) == (row * 4 * 160, row * (2 * 160 + 2 * 20))
    assert trial.before.perplexity != trial.after.perplexity
    assert json.loads(json.dumps(trial.to_dict()))["settings"]["retrieval_heads_kept"] == 2
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_trying_with_a_score_file_and_nothing_streaming_changes_nothing(model, tokenizer, tmp_path) -> None:
    scores = {f"{layer}-{head}": [0.1 * head] for layer in range(2) for head in range(4)}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    trial = try_method(
        "duo_attention", model, tokenizer, sparsity=0.0, lengths=[160], depths=[50.0], progress=False,
        heads=tmp_path / "scores.json",
    )  # fmt: skip
    assert trial.before.perplexity == pytest.approx(trial.after.perplexity, rel=1e-5)
    assert trial.before.needle == trial.after.needle
    assert trial.before.cache_bytes == trial.after.cache_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "duo_atention"}, "did you mean 'duo_attention'"),
        ({"lengths": [5000]}, "length 5000"),
        ({"lengths": []}, "at least one"),
        ({"depths": [120.0]}, "between 0 and 100"),
        ({"sparsity": 1.5}, "sparsity=1.5"),
        ({"recent": 0}, "recent=0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_settings(model, tokenizer, change: dict, message: str) -> None:
    options = {"lengths": [160], "depths": [50.0], "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        try_method(options.pop("system", "duo_attention"), model, tokenizer, **options)


def test_bad_head_files(model, tokenizer, tmp_path) -> None:
    options = {"lengths": [160], "depths": [50.0], "progress": False}
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        try_method("duo_attention", model, tokenizer, heads=tmp_path / "nothing", **options)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="neither"):
        try_method("duo_attention", model, tokenizer, heads=tmp_path / "bad.json", **options)
    save_pattern(tmp_path, torch.ones(3, 2), sinks=4, recent=16)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        try_method("duo_attention", model, tokenizer, heads=tmp_path, **options)


@pytest.mark.slow
def test_the_real_model_keeps_its_needles_with_half_of_its_heads_streaming() -> None:
    from manyheads.data.language_models import load_language_model

    model, tokenizer = load_language_model("smollm2", dtype="float32")
    trial = try_method("duo_attention", model, tokenizer, lengths=[512], depths=[0.0, 100.0], progress=False)
    assert trial.after.cache_bytes < 0.7 * trial.before.cache_bytes
    assert trial.after.perplexity < 1.2 * trial.before.perplexity
    assert sum(map(sum, trial.before.needle)) > 1


def test_trying_a_mixture_of_heads(model, tokenizer) -> None:
    trial = try_method(
        "moh", model, tokenizer, shared=1, active=1, lengths=[160], depths=[50.0], progress=False, chunk=32
    )
    use = torch.tensor(trial.head_scores)
    assert use[:, 0].eq(1).all()
    torch.testing.assert_close(use.sum(1), torch.full((2,), 2.0))
    assert trial.retrieval == [[True, False, False, False]] * 2
    assert trial.before.perplexity != trial.after.perplexity
    assert trial.before.cache_bytes == trial.after.cache_bytes
    assert trial.sentence.startswith("In each of 2 layers every token uses 1 shared heads and chooses 1 of the other 3")
    with pytest.raises(ValueError, match="sinks is an option of duo_attention; moh has shared, active"):
        try_method("moh", model, tokenizer, sinks=4, lengths=[160], depths=[50.0], progress=False)
    with pytest.raises(ValueError, match="active=4 heads"):
        try_method("moh", model, tokenizer, shared=1, active=4, lengths=[160], depths=[50.0], progress=False)
