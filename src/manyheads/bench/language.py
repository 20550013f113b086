"""What a change of attention does to a language model: quality, memory, speed, measured alike before and after.

Every measurement feeds the prompt in chunks through the cache, because that is what a long prompt meets in use and
because a method may treat a first chunk leniently (DuoAttention attends to it in full). Bytes are those of the tensors
alive in the cache, never a formula.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from manyheads.adapt.duo_cache import live_bytes
from manyheads.bench.trial import Measurement
from manyheads.data.cache_names import returned_cache, with_cache
from manyheads.data.needles import Needle, needle_prompt
from manyheads.data.text import documentation_split
from manyheads.interpret.retrieval_scores import rouge_recall

# ``advance(what)`` is called after every finished piece of work.
Advance = Callable[[str], None]

# Other facts than data.needles.NEEDLES: heads that were chosen by those are not judged by them.
FACTS = (
    Needle(
        "The best way to spend an evening in Oslo is to row across the fjord and listen to jazz beside an open fire.",
        "What is the best way to spend an evening in Oslo?",
        "row across the fjord and listen to jazz beside an open fire",
    ),
    Needle(
        "The old clock maker of Prague repaired his famous clock with copper wire, green glass and a silver spoon.",
        "What did the old clock maker of Prague repair his famous clock with?",
        "copper wire, green glass and a silver spoon",
    ),
    Needle(
        "The hidden treasure of the island lies under a white stone behind the ruined chapel near the south beach.",
        "Where does the hidden treasure of the island lie?",
        "under a white stone behind the ruined chapel near the south beach",
    ),
)

# Tokens of a needle test that are kept free for chat markers, question and answer.
NEEDLE_BUFFER = 100


def measure(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    chunk: int = 128,
    perplexity_tokens: int = 2048,
    decode_tokens: int = 32,
    needles: Sequence[Needle] = FACTS,
    advance: Advance | None = None,
) -> Measurement:
    """All figures of one state of a model (a method that is attached stays attached).

    Args:
        model: a Hugging Face causal language model.
        tokenizer: its tokenizer.
        lengths: context lengths of the needle tests in tokens; the longest is also the prefill that is timed.
        depths: where in the context the needle stands, 0 to 100.
        chunk: tokens of one prefill call.
        perplexity_tokens: tokens of held-out text (Python's documentation) that are scored.
        decode_tokens: tokens decoded for the decoding speed.
        needles: the facts to hide; the tests take them in turn.
        advance: called with a description after every piece of work: see ``pieces``.

    Returns:
        The measurement. On a busy machine speeds vary by tens of per cent; the other figures repeat exactly.

    Raises:
        ValueError: no length or depth, lengths that do not fit the model, chunk < 1.
    """
    lengths, depths = list(lengths), list(depths)
    check_sizes(model, lengths, depths, chunk)
    advance = advance or (lambda what: None)
    hay, text = (tokenizer(part, verbose=False)["input_ids"] for part in documentation_split())
    value = perplexity(model, text[:perplexity_tokens], chunk=chunk)
    advance("perplexity")
    grid = []
    for row, depth in enumerate(depths):
        grid.append([])
        for column, length in enumerate(lengths):
            needle = needles[(row + column) % len(needles)]
            grid[-1].append(needle_recall(model, tokenizer, needle, length=length, depth=depth, chunk=chunk, text=hay))
            advance(f"needle, {length} tokens, depth {depth:g}")
    longest = _stretched(text, max(lengths))
    cache_bytes, prefill, decode = memory_and_speed(model, longest, chunk=chunk, decode_tokens=decode_tokens)
    advance("speed")
    return Measurement(value, grid, cache_bytes, len(longest), prefill, decode)


def faster(earlier: Measurement, model: Any, tokenizer: Any, *, chunk: int = 128) -> Measurement:
    """``earlier`` with the speeds measured again, the better of both times kept."""
    tokens = _stretched(tokenizer(documentation_split()[1], verbose=False)["input_ids"], earlier.cache_tokens)
    _, prefill, decode = memory_and_speed(model, tokens, chunk=chunk)
    return dataclasses.replace(
        earlier,
        prefill_tokens_per_second=max(prefill, earlier.prefill_tokens_per_second),
        decode_tokens_per_second=max(decode, earlier.decode_tokens_per_second),
    )


def pieces(lengths: Sequence[int], depths: Sequence[float]) -> int:
    """How often ``measure`` calls ``advance``."""
    return len(lengths) * len(depths) + 2


@torch.no_grad()
def perplexity(model: Any, tokens: Sequence[int], *, chunk: int = 128) -> float:
    """exp of the mean next-token loss over one running text, fed in chunks through the cache.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"perplexity needs at least two tokens, got {len(tokens)}")
    ids = torch.tensor([list(tokens)], device=model.device)
    cache, total = None, 0.0
    for start in range(0, ids.shape[1] - 1, chunk):
        piece = ids[:, start : min(start + chunk, ids.shape[1] - 1)]
        out = model(piece, **with_cache(model, cache), use_cache=True)
        cache = returned_cache(out)
        target = ids[0, start + 1 : start + 1 + piece.shape[1]]
        total += torch.nn.functional.cross_entropy(out.logits[0].float(), target, reduction="sum").item()
    return math.exp(total / (ids.shape[1] - 1))


def needle_recall(
    model: Any,
    tokenizer: Any,
    needle: Needle,
    *,
    length: int,
    depth: float,
    chunk: int = 128,
    text: Sequence[int] | None = None,
    max_new_tokens: int = 20,
) -> float:
    """ROUGE-1 recall in [0, 1] of the answer in what the model says greedily when asked for the needle.

    ``text`` is the haystack as token ids; None takes the beginning of Python's documentation.
    """
    prompt = needle_prompt(tokenizer, needle, length=length, depth=depth, buffer=NEEDLE_BUFFER, text=text)
    ids = torch.tensor([prompt.ids], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        prefill_chunk_size=chunk,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return rouge_recall(needle.answer, said) / 100


@torch.no_grad()
def memory_and_speed(
    model: Any, tokens: Sequence[int], *, chunk: int = 128, decode_tokens: int = 32, repeats: int = 1
) -> tuple[int, float, float]:
    """(bytes alive in the cache after the prefill, prefill tokens per second, decode tokens per second).

    The prefill is the faster of ``repeats`` runs; decoding is greedy, at the median time of a step.
    """
    ids = torch.tensor([list(tokens)], device=model.device)
    prefill_seconds = []
    out = None
    for _ in range(repeats):
        cache: Cache | None = None
        _wait(model)
        start = time.perf_counter()
        for piece in ids.split(chunk, dim=1):
            out = model(piece, **with_cache(model, cache), use_cache=True, logits_to_keep=1)
            cache = returned_cache(out)
        _wait(model)
        prefill_seconds.append(time.perf_counter() - start)
    assert out is not None
    cache = returned_cache(out)
    held = live_bytes(cache if cache is not None else DynamicCache())
    steps, token = [], out.logits[:, -1:].argmax(-1)
    for _ in range(decode_tokens):
        start = time.perf_counter()
        token = model(token, **with_cache(model, cache), use_cache=True).logits[:, -1:].argmax(-1)
        _wait(model)
        steps.append(time.perf_counter() - start)
    return held, ids.shape[1] / min(prefill_seconds), 1 / statistics.median(steps)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _stretched(tokens: list[int], length: int) -> list[int]:
    return (tokens * -(-length // len(tokens)))[:length]


def check_sizes(model: Any, lengths: Sequence[int], depths: Sequence[float], chunk: int) -> None:
    """Raise ValueError unless the lengths fit the model, the depths are percentages and chunk is positive."""
    if not lengths or not depths:
        raise ValueError("lengths and depths need at least one value each")
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for length in lengths:
        if length <= NEEDLE_BUFFER or (most is not None and length > most):
            raise ValueError(f"length {length} must lie between {NEEDLE_BUFFER + 1} and the model's {most} tokens")
    if any(not 0 <= depth <= 100 for depth in depths):
        raise ValueError(f"depths {list(depths)} must lie between 0 and 100")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
