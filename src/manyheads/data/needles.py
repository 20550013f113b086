"""Long-context tests on real text: a needle sentence in a haystack, and passkeys in a book.

Everything is built on token ids, so a length is exact. The papers' scripts cut, decode and encode again, which shifts
lengths by a few tokens.

Sources: "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574 (needles); "DuoAttention",
arXiv 2410.10819 (passkeys).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manyheads.data.text import python_documentation

QUESTION = "Based on the content of the book, Question: {question}\nAnswer:"

# The ICAO/NATO spelling alphabet.
_WORDS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
SPELLING = tuple(_WORDS.split())
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
ORDINALS = tuple(_ORDINALS.split())


@dataclass(frozen=True)
class Needle:
    """A fact that is put into a text and asked for.

    Attributes:
        sentence: what is inserted; it contains the answer word for word.
        question: what is asked after the text.
        answer: the part of the sentence that a right answer repeats.
    """

    sentence: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        if not (self.sentence.strip() and self.question.strip() and self.answer.strip()):
            raise ValueError("a needle needs a sentence, a question and an answer that are not empty")
        if self.answer not in self.sentence:
            raise ValueError(f"the answer {self.answer!r} does not occur in the sentence {self.sentence!r}")


NEEDLES = (
    Needle(
        "The best thing to do in Lisbon is to ride the old yellow tram up the hill and eat warm custard tarts.",
        "What is the best thing to do in Lisbon?",
        "ride the old yellow tram up the hill and eat warm custard tarts",
    ),
    Needle(
        "The best thing to do in Kyoto is to walk through the bamboo forest at dawn and drink green tea by the river.",
        "What is the best thing to do in Kyoto?",
        "walk through the bamboo forest at dawn and drink green tea by the river",
    ),
    Needle(
        "The secret password of the lighthouse keeper is purple elephants dancing under seven silver moons.",
        "What is the secret password of the lighthouse keeper?",
        "purple elephants dancing under seven silver moons",
    ),
)


@dataclass(frozen=True)
class NeedlePrompt:
    """Token ids of one test.

    Attributes:
        ids: the whole prompt.
        needle: what was hidden.
        length: tokens of the haystack asked for, the needle and the buffer included.
        depth: 0 (start of the text) to 100 (its end), as asked for; the insertion moved back to a sentence end.
        offset: where in the text the haystack starts, in tokens.
        inserted: [start, end) of the inserted needle sentence in ``ids``.
    """

    ids: list[int]
    needle: Needle
    length: int
    depth: int | float
    offset: int
    inserted: tuple[int, int]


def needle_prompt(
    tokenizer: Any,
    needle: Needle,
    *,
    length: int,
    depth: int | float,
    text: str | Sequence[int] | None = None,
    offset: int = 0,
    buffer: int = 200,
    chat: bool | None = None,
) -> NeedlePrompt:
    """The prompt of one needle-in-a-haystack test.

    The haystack is ``length`` tokens of the text from ``offset`` on; with the needle it must fit the budget
    ``length - buffer``, so its end is cut to ``length - buffer - len(needle)``. The needle goes in at
    ``int(tokens * depth / 100)``, moved back until the token before it is a full stop or until the start; at depth 100
    it is appended.

    Args:
        tokenizer: of the model under test.
        needle: what to hide and ask.
        length: context length in tokens.
        depth: 0 to 100.
        text: the haystack as text or as token ids (saves encoding it anew for every test); None takes
            ``python_documentation()``. Repeated where it is too short.
        offset: tokens of the text to skip.
        buffer: tokens kept free for the question and the answer.
        chat: ask through the tokenizer's chat template, the haystack between book tags; None does so where the
            tokenizer has one. Otherwise the question follows the haystack directly.

    Raises:
        ValueError: a depth outside 0 to 100, an empty text, a needle longer than the budget, ``chat=True`` without a
            chat template.

    Source: arXiv 2404.15574, section 2.1 and the authors' test script. Tokens that the tokenizer puts before a text
    stay first; in the script a needle at depth 0 comes before them.
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth={depth} is a percentage, 0 to 100")
    if length < 1 or offset < 0 or buffer < 0:
        raise ValueError(f"length={length}, offset={offset}, buffer={buffer}: need length >= 1, others >= 0")
    sentence = _encode(tokenizer, f"\n{needle.sentence}\n")
    room = length - buffer - len(sentence)
    if room < 0:
        raise ValueError(f"the needle has {len(sentence)} tokens; length={length} less buffer={buffer} is too short")
    hay = _stretch(text if text is None or isinstance(text, str) else list(text), tokenizer, offset, room)
    at = _sentence_end(hay, depth, period_ids(tokenizer))
    before, after = _frame(tokenizer, QUESTION.format(question=needle.question), chat)
    ids = before + hay[:at] + sentence + hay[at:] + after
    start = len(before) + at
    return NeedlePrompt(ids, needle, length, depth, offset, (start, start + len(sentence)))


def period_ids(tokenizer: Any) -> set[int]:
    """The token ids that are a full stop, alone or at the end of a word."""
    candidates = {_encode(tokenizer, text)[-1] for text in (".", "end.", " .")}
    return {token for token in candidates if tokenizer.decode([token]).strip() == "."}


@dataclass(frozen=True)
class PasskeyExample:
    """Token ids of one multi-passkey example.

    Attributes:
        ids: the whole example: book, then question and passkey for each passkey.
        supervised: one bool for every token: True for all tokens after the book.
        passkeys: the passkeys, in order.
        depths: where in the book each stands, as a share of its tokens.
        answers: [start, end) in ``ids`` of each passkey after its question.
    """

    ids: list[int]
    supervised: list[bool]
    passkeys: list[str]
    depths: list[float]
    answers: list[tuple[int, int]]


def passkey_example(
    tokenizer: Any,
    *,
    length: int,
    passkeys: int = 10,
    words: int = 32,
    text: str | Sequence[int] | None = None,
    offset: int = 0,
    depths: tuple[int | float, int | float] = (0.05, 0.95),
    multiple_of: int = 16,
    seed: int = 0,
) -> PasskeyExample:
    """A book with passkeys hidden in it, then a question and the answer for each: what DuoAttention's gates learn from.

    Args:
        tokenizer: of the model.
        length: tokens of the book text, the passkeys not included.
        passkeys: how many, each introduced by its ordinal; 10 in the paper.
        words: of each passkey, drawn from the 26 words of the spelling alphabet; 32 in the paper.
        text: the book as text or as token ids; None takes ``python_documentation()``. Repeated where too short.
        offset: tokens of the text to skip.
        depths: the passkeys stand at shares of the book drawn without replacement from 1,000 equally spaced ones
            between these two.
        multiple_of: the number of tokens is raised to a multiple of this with more book text; an example that already
            is one stays (the authors' script adds 16 tokens then).
        seed: of the passkeys and their places.

    Raises:
        ValueError: no passkey, more than twelve, no words, or depths outside 0 to 1.

    Source: "DuoAttention", arXiv 2410.10819, section 2.2 and the authors' training data.
    """
    if not 1 <= passkeys <= len(ORDINALS):
        raise ValueError(f"passkeys={passkeys} must be 1 to {len(ORDINALS)}")
    if words < 1 or length < 1 or multiple_of < 1:
        raise ValueError(f"words={words}, length={length}, multiple_of={multiple_of} must be at least 1")
    if not 0 <= depths[0] < depths[1] <= 1:
        raise ValueError(f"depths={depths} must be two increasing shares between 0 and 1")
    draw = random.Random(seed)
    keys = [" ".join(draw.choices(SPELLING, k=words)) for _ in range(passkeys)]
    step = (depths[1] - depths[0]) / 999
    places = sorted(depths[0] + step * i for i in draw.sample(range(1000), passkeys))

    start = _encode(tokenizer, "Here is a book. Remember the passkeys hidden in it.\n\n<book>\n", special=True)
    end = _encode(tokenizer, "\n</book>\n\n")
    hidden = [
        _encode(tokenizer, f"\n\nThe {ordinal} passkey, which must not be forgotten, is: {key}.\n\n")
        for ordinal, key in zip(ORDINALS, keys)
    ]
    asked, spans = [], []
    for ordinal, key in zip(ORDINALS, keys):
        asked += _encode(tokenizer, f"What is the {ordinal} passkey? The {ordinal} passkey is:")
        answer = _encode(tokenizer, f" {key}")
        spans.append((len(asked), len(asked) + len(answer)))
        asked += answer + _encode(tokenizer, ".\n\n")

    total = len(start) + length + sum(map(len, hidden)) + len(end) + len(asked)
    trailing = -total % multiple_of
    source = text if text is None or isinstance(text, str) else list(text)
    page = _stretch(source, tokenizer, offset, length + trailing)
    book, last = [], 0
    for place, passage in zip(places, hidden):
        at = int(length * place)
        book += page[last:at] + passage
        last = at
    book += page[last:]
    context = start + book + end
    answers = [(len(context) + first, len(context) + stop) for first, stop in spans]
    return PasskeyExample(context + asked, [False] * len(context) + [True] * len(asked), keys, places, answers)


def haystack_ids(tokenizer: Any, text: str | None, tokens: int) -> list[int]:
    """Token ids of a text, or of ``python_documentation()`` for None: at least ``tokens``, where it has so many."""
    # Encoding a whole book for a page of it is slow; a token rarely spans more than sixteen characters.
    return _encode(tokenizer, (python_documentation() if text is None else text)[: 16 * tokens + 64])


def _encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _stretch(text: str | list[int] | None, tokenizer: Any, offset: int, length: int) -> list[int]:
    if text is None or isinstance(text, str):
        text = haystack_ids(tokenizer, text, offset + length)
    if not text:
        raise ValueError("the haystack text is empty")
    first = offset % len(text)
    stretch = text[first : first + length]
    while len(stretch) < length:
        stretch = stretch + text[: length - len(stretch)]
    return stretch


def _sentence_end(hay: list[int], depth: int | float, periods: set[int]) -> int:
    if depth == 100:
        return len(hay)
    at = int(len(hay) * depth / 100)
    while at > 0 and hay[at - 1] not in periods:
        at -= 1
    return at


def _frame(tokenizer: Any, question: str, chat: bool | None) -> tuple[list[int], list[int]]:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError("chat=True, but this tokenizer has no chat template")
    if not has_template or chat is False:
        return _encode(tokenizer, "", special=True), _encode(tokenizer, f"\n{question}")
    marker = "@@haystack@@"
    message = {"role": "user", "content": f"<book>{marker}</book>\n{question}"}
    rendered: str = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    head, _, tail = rendered.partition(marker)
    return _encode(tokenizer, head), _encode(tokenizer, tail)
