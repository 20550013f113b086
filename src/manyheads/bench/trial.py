"""What `manyheads try` measures: the same model before and after a change of its attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Measurement:
    """One model state (before or after), measured.

    Attributes:
        perplexity: exp of the mean next-token loss on real text.
        needle: accuracy in [0, 1] (ROUGE-1 recall of the answer) by [depth][length].
        cache_bytes: bytes of the tensors alive in the KV cache after the prefill of ``cache_tokens`` tokens.
        cache_tokens: tokens held by that prefill.
        prefill_tokens_per_second: throughput of the prefill.
        decode_tokens_per_second: throughput of greedy decoding after that prefill.
    """

    perplexity: float
    needle: list[list[float]]
    cache_bytes: int
    cache_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Words:
    """How a method's heads are spoken of in the table and on the page.

    Attributes:
        score: what a head's score is called.
        high: what a high score says, after "the stronger its colour, ".
        frame: what a framed group of heads is.
        kept, other: the state of a head that is framed, and of one that is not.
    """

    score: str
    high: str
    frame: str
    kept: str
    other: str


WORDS = {
    "duo_attention": Words(
        score="retrieval score",
        high="the more it copies from far back in the context (retrieval score)",
        frame="A framed group shares a key/value head that keeps its whole cache; the others are streaming heads.",
        kept="keeps its whole cache",
        other="streaming",
    ),
    "moh": Words(
        score="share of tokens",
        high="the more tokens of a text use it (share of tokens)",
        frame="A framed head is shared: every token uses it. Among the others each token chooses.",
        kept="shared",
        other="chosen by some tokens",
    ),
}


@dataclass
class Trial:
    """A method tried on a model; what the table, the JSON and the report page are made from.

    Attributes:
        system: slug of the method, one of ``WORDS``.
        model: the name the user gave.
        settings: the method's options and the sizes of the measurements.
        head_scores: (layers x query heads) retrieval scores, or the shares of tokens that use a head.
        retrieval: (layers x key/value heads) True where the head keeps its whole cache, or (layers x query heads) True
            where it is shared by all tokens.
        depths: needle depths in percent (rows of Measurement.needle).
        lengths: context lengths in tokens (columns of Measurement.needle).
        tokens: text of each token of the example, for the attention patterns.
        patterns: uint8 attention rows of the example, nested lists [layer][head][query][key], 255 meaning weight 1.
        before: the untouched model.
        after: the model with the method attached.
    """

    system: str
    model: str
    settings: dict[str, Any]
    head_scores: list[list[float]]
    retrieval: list[list[bool]]
    depths: list[float]
    lengths: list[int]
    tokens: list[str]
    patterns: list[list[list[list[int]]]] = field(repr=False)
    before: Measurement
    after: Measurement

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self)

    @property
    def words(self) -> Words:
        """How this method's heads are spoken of."""
        return WORDS[self.system]

    @property
    def sentence(self) -> str:
        """What was changed."""
        if self.system == "moh":
            shared, active = self.settings["shared"], self.settings["active"]
            routed = len(self.head_scores[0]) - shared
            return (
                f"In each of {len(self.head_scores)} layers every token uses {shared} shared heads and chooses "
                f"{active} of the other {routed} by the norms of their queries."
            )
        kept, total = sum(map(sum, self.retrieval)), sum(map(len, self.retrieval))
        sinks, recent = self.settings.get("sinks"), self.settings.get("recent")
        window = f"the first {sinks} and the last {recent} tokens" if sinks is not None and recent else "a short window"
        return (
            f"{kept} of the model's {total} key/value heads keep their whole cache; "
            f"the other {total - kept} now keep only {window}."
        )
