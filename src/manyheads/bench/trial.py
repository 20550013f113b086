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


@dataclass
class Trial:
    """A method tried on a model; what the table, the JSON and the report page are made from.

    Attributes:
        system: slug of the method ("duo_attention").
        model: the name the user gave.
        settings: the method's options and the sizes of the measurements.
        head_scores: (layers x query heads) retrieval scores.
        retrieval: (layers x key/value heads) True where the head keeps its whole cache.
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
