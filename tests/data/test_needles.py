"""Needle prompts and passkeys are exact on token ids."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.data.needles import NEEDLES, Needle, needle_prompt, passkey_example, period_ids


class Letters:
    """One token a character; a start token when special tokens are asked for."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


class Chatty(Letters):
    chat_template = "yes"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return f"[{messages[0]['content']}]>"


TEXT = "One two three. Four five six. Seven eight nine. Ten eleven twelve. " * 4
PIN = Needle("The pin is 42.", "What is the pin?", "42")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(30, 200), st.integers(0, 100), st.integers(0, 60))
def test_the_needle_lies_whole_at_a_sentence_end_and_the_budget_holds(length, depth, offset) -> None:
    tokenizer = Letters()
    made = needle_prompt(tokenizer, PIN, length=length, depth=depth, text=TEXT, offset=offset, buffer=10)
    start, end = made.inserted
    inserted = "\nThe pin is 42.\n"
    assert tokenizer.decode(made.ids[start:end]) == inserted
    tail = "\nBased on the content of the book, Question: What is the pin?\nAnswer:"
    hay = made.ids[1:start] + made.ids[end : len(made.ids) - len(tail)]
    assert tokenizer.decode(made.ids[-len(tail) :]) == tail
    assert len(hay) + len(inserted) == length - 10
    assert tokenizer.decode(hay) == (TEXT * 3)[offset : offset + len(hay)]
    aimed = int(len(hay) * depth / 100)
    if depth == 100:
        assert start - 1 == len(hay)
    else:
        # The nearest sentence end at or before the place aimed at.
        assert start - 1 == tokenizer.decode(hay[:aimed]).rfind(".") + 1
    assert made.ids[0] == 1


def test_a_chat_template_frames_the_book() -> None:
    tokenizer = Chatty()
    text = tokenizer.decode(needle_prompt(tokenizer, PIN, length=60, depth=0, text=TEXT, buffer=0).ids)
    assert text.startswith("[<book>\nThe pin is 42.\nOne two")
    assert text.endswith("</book>\nBased on the content of the book, Question: What is the pin?\nAnswer:]>")
    plain = needle_prompt(tokenizer, PIN, length=60, depth=0, text=TEXT, buffer=0, chat=False)
    assert tokenizer.decode(plain.ids[1:]).startswith("\nThe pin")


def test_full_stops_are_found() -> None:
    assert period_ids(Letters()) == {ord(".")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 101}, "depth=101"),
        ({"length": 20}, "too short"),
        ({"length": 0}, "length=0"),
        ({"offset": -1}, "offset=-1"),
        ({"text": ""}, "text is empty"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_prompts_are_refused(options, message) -> None:
    right = dict(length=60, depth=50, text=TEXT, buffer=10)
    with pytest.raises(ValueError, match=message):
        needle_prompt(Letters(), PIN, **(right | options))


def test_a_needle_holds_its_answer() -> None:
    assert all(needle.answer in needle.sentence for needle in NEEDLES)
    with pytest.raises(ValueError, match="does not occur"):
        Needle("a", "b", "c")
    with pytest.raises(ValueError, match="not empty"):
        Needle("a", " ", "a")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 300), st.sampled_from([1, 16]), st.integers(0, 99))
def test_passkeys_are_hidden_asked_for_and_supervised(count, words, length, multiple, seed) -> None:
    tokenizer = Letters()
    options = dict(length=length, passkeys=count, words=words, text=TEXT, multiple_of=multiple, seed=seed)
    made = passkey_example(tokenizer, **options)
    assert made == passkey_example(tokenizer, **options)
    assert len(made.ids) % multiple == 0
    assert len(made.ids) == len(made.supervised)
    split = made.supervised.index(True)
    assert not any(made.supervised[:split])
    assert all(made.supervised[split:])
    book, asked = tokenizer.decode(made.ids[:split]), tokenizer.decode(made.ids[split:])
    assert book.endswith("</book>\n\n")
    assert all(len(key.split()) == words and f" is: {key}.\n" in book for key in made.passkeys)
    assert [tokenizer.decode(made.ids[a:b]).strip() for a, b in made.answers] == made.passkeys
    assert asked.count("What is the") == count
    assert made.depths == sorted(set(made.depths))
    assert 0.05 <= made.depths[0] <= made.depths[-1] <= 0.95 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"passkeys": 0}, "passkeys=0"), ({"passkeys": 13}, "1 to 12"), ({"words": 0}, "words=0"),
     ({"depths": (0.9, 0.1)}, "depths=")],
)  # fmt: skip
def test_bad_passkeys_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        passkey_example(Letters(), length=50, text=TEXT, **options)
