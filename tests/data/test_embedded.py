"""The embedded model, texts and images; other models by name."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyheads.data import language_models
from manyheads.data.images import TEXTILE_CLASSES, digits, photos, textiles
from manyheads.data.language_models import load_language_model
from manyheads.data.text import documentation_split, python_documentation


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<eos>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_embedded_model_speaks() -> None:
    model, tokenizer = load_language_model("smollm2")
    assert not model.training
    assert model.dtype == torch.float32
    # Every digit is a token, also after blank lines, as the model was trained.
    assert tokenizer.tokenize("\n\n42") == ["ĊĊ", "4", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_a_folder_loads(folder) -> None:
    model, tokenizer = load_language_model(str(folder), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token == "<eos>"


def test_a_truncated_file_is_refused(folder) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot load model"):
        load_language_model(str(folder))


def test_missing_weights_are_named(folder) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"these weights: model\.norm\.weight"):
        load_language_model(str(folder))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smolm2", {}, "did you mean 'smollm2'"),
        ("", {}, "non-empty"),
        ("/no/such/folder", {}, "there is no directory"),
        ("smollm2", {"device": "gpu"}, "device='gpu'"),
        ("smollm2", {"device": "cuda:99"}, "CUDA devices"),
        ("smollm2", {"dtype": "int8"}, "dtype='int8'"),
        ("smollm2", {"dtype": "float99"}, "dtype='float99'"),
    ],
)
def test_bad_requests_are_refused(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_language_model(name, **options)


def test_the_nearest_folder_is_suggested(folder) -> None:
    with pytest.raises(ValueError, match=r"did you mean '.*/tiny'"):
        load_language_model(str(folder.parent / "tinny"))


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch) -> None:
    def stop(gguf, folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setenv("MANYHEADS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(language_models, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        load_language_model("smollm2")
    assert not list((tmp_path / "cache").iterdir())


def test_the_documentation_splits_without_overlap() -> None:
    train, test = documentation_split(0.2)
    assert set(train.split("\n\n")).isdisjoint(test.split("\n\n"))
    assert len(python_documentation()) > 300_000
    assert documentation_split(0.2) == (train, test)
    with pytest.raises(ValueError, match="test_share=1"):
        documentation_split(1)


def test_digits_are_divided_by_class_and_reproducible() -> None:
    train, labels, test, test_labels = digits(size=16, channels=1)
    assert train.shape == (1442, 1, 16, 16)
    assert len(train) == len(labels)
    assert len(test) == len(test_labels) == 355
    assert 0 <= train.min() < train.max() <= 1
    assert (test_labels.bincount() >= 34).all()
    assert torch.equal(digits(size=16, channels=1)[0], train)
    assert not torch.equal(digits(size=16, channels=1, seed=1)[1], labels)
    with pytest.raises(ValueError, match="size=0"):
        digits(size=0)


def test_photos_and_textiles_are_real() -> None:
    assert photos()["flower"].shape == (3, 427, 640)
    train, labels, test, test_labels = textiles(size=16, channels=1, limit=10)
    assert train.shape == (24, 1, 16, 16)
    assert test.shape == (6, 1, 16, 16)
    assert labels.bincount().tolist() == [8] * len(TEXTILE_CLASSES)
    assert test_labels.bincount().tolist() == [2, 2, 2]
    for options, message in (({"channels": 2}, "channels=2"), ({"limit": 0}, "limit=0")):
        with pytest.raises(ValueError, match=message):
            textiles(**options)
