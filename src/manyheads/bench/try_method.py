"""``manyheads try``: score a model's heads, change its attention, and measure before and after."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.adapt.duo_attention import DuoAttention, check_fits
from manyheads.adapt.duo_pattern import binarize, load_pattern
from manyheads.adapt.mixture_of_heads import MixtureOfHeads
from manyheads.bench.language import Advance, check_sizes, faster, measure, pieces
from manyheads.bench.trial import Trial
from manyheads.data.needles import NEEDLES
from manyheads.data.text import documentation_split
from manyheads.interpret.attach import geometry
from manyheads.interpret.retrieval_heads import RetrievalHeads, retrieval_heads
from manyheads.interpret.retrieval_result import read_scores

METHODS = ("duo_attention", "moh")
EXAMPLE_TOKENS = 48
# Tokens of real text over which the use of moh's heads is counted.
USE_TOKENS = 512


def try_method(
    system: str,
    model: Any,
    tokenizer: Any,
    *,
    model_name: str = "",
    sparsity: float | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    shared: int | None = None,
    active: int | None = None,
    lengths: Sequence[int] = (256, 512, 1024, 2048),
    depths: Sequence[float] = (0.0, 50.0, 100.0),
    chunk: int = 128,
    heads: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Trial:
    """Measure a model, attach a method, and measure again.

    DuoAttention's defaults suit a small model with a context of a few thousand tokens: the 16 + 128 tokens that
    streaming heads keep are 7 % of the longest context here. (The authors deploy 64 + 256 for contexts of 32,000 tokens
    and more.) Heads are scored on other needles and another part of the text than those that measure.

    Args:
        system: slug of a method that changes a pretrained language model: "duo_attention" or "moh".
        model: a Hugging Face causal language model, unchanged afterwards.
        tokenizer: its tokenizer.
        model_name: the name for the report.
        sparsity: duo_attention: share of key/value heads that stream; None means 0.5.
        sinks: duo_attention: first tokens that streaming heads keep; None means 16.
        recent: duo_attention: last tokens that streaming heads keep; None means 128.
        shared: moh: heads of each layer that every token uses; None means half of them, as published.
        active: moh: how many of the others each token uses; None means a quarter of all heads, as published.
        lengths: context lengths of the needle tests; the longest is also the timed prefill.
        depths: depths of the needle in percent.
        chunk: tokens of one prefill call.
        heads: duo_attention: where the heads' strengths come from instead of scoring them here: a folder of the
            authors (full_attention_heads.tsv), or a json file of retrieval scores.
        seed: chooses the stretch of text that the heads are scored on.
        progress: show progress bars on standard error.

    Raises:
        ValueError: an unknown system (the nearest name is suggested), an option of another one, options or files that
            do not fit the model.
    """
    if system not in METHODS:
        near = difflib.get_close_matches(system, METHODS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{system!r} cannot be tried on a language model{hint} (choose from: {', '.join(METHODS)})")
    options = {
        "duo_attention": {"sparsity": sparsity, "sinks": sinks, "recent": recent, "heads": heads},
        "moh": {"shared": shared, "active": active},
    }
    for other in METHODS:
        foreign = [name for name, value in options[other].items() if other != system and value is not None]
        if foreign:
            raise ValueError(f"{foreign[0]} is an option of {other}; {system} has {', '.join(options[system])}")
    check_sizes(model, lengths, depths, chunk)
    prepare = {"duo_attention": _duo_attention, "moh": _mixture_of_heads}[system]
    given = {name: value for name, value in options[system].items() if value is not None}
    attach, scores, kept, settings = prepare(model, tokenizer, seed=seed, progress=progress, **given)

    sized: dict[str, Any] = dict(lengths=lengths, depths=depths, chunk=chunk)
    with _bar("measuring before", pieces(lengths, depths), progress) as advance:
        before = measure(model, tokenizer, advance=advance, **sized)
    with _bar("measuring after", pieces(lengths, depths), progress) as advance, attach(model):
        after = measure(model, tokenizer, advance=advance, **sized)
    # A machine that was busy for a minute would otherwise make one of the two look slow: both get a second turn.
    with _bar("speed again", 2, progress) as advance:
        before = faster(before, model, tokenizer, chunk=chunk)
        advance("before")
        with attach(model):
            after = faster(after, model, tokenizer, chunk=chunk)
        advance("after")
    tokens, patterns = attention_patterns(model, tokenizer)
    settings |= {
        "prefill_chunk": chunk,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "seed": seed,
    }
    return Trial(
        system=system,
        model=model_name or str(getattr(model, "name_or_path", "")),
        settings=settings,
        head_scores=scores.tolist(),
        retrieval=kept.tolist(),
        depths=[float(depth) for depth in depths],
        lengths=[int(length) for length in lengths],
        tokens=tokens,
        patterns=patterns,
        before=before,
        after=after,
    )


# What attaches a method, the scores of all heads, which heads are framed, and the settings for the report.
_Prepared = tuple[Callable[[Any], AbstractContextManager], Tensor, Tensor, dict[str, Any]]


def _duo_attention(
    model: Any,
    tokenizer: Any,
    *,
    sparsity: float = 0.5,
    sinks: int = 16,
    recent: int = 128,
    heads: str | Path | None = None,
    seed: int,
    progress: bool,
) -> _Prepared:
    # Bad settings are told before minutes of scoring, and so is a model that the method cannot be attached to.
    sizes = geometry(model)
    everything = torch.ones(sizes.layers, sizes.kv_heads, dtype=torch.bool)
    DuoAttention(everything, sinks=sinks, recent=recent)
    check_fits(model, everything)
    binarize(torch.ones(1, 1), sparsity=sparsity)
    source, scores, retrieval = _strengths(model, tokenizer, heads, sparsity, seed, progress)
    duo = DuoAttention(retrieval, sinks=sinks, recent=recent)
    settings = {
        "sparsity": sparsity,
        "sinks": sinks,
        "recent": recent,
        "heads_from": source,
        "retrieval_heads_kept": int(duo.retrieval.sum()),
    }
    return duo, scores, duo.retrieval, settings


@torch.no_grad()
def _mixture_of_heads(
    model: Any, tokenizer: Any, *, shared: int | None = None, active: int | None = None, seed: int, progress: bool
) -> _Prepared:
    published = MixtureOfHeads.published(model)
    choice = MixtureOfHeads(
        published.shared if shared is None else shared, published.active if active is None else active
    )
    text = tokenizer(documentation_split()[0], verbose=False)["input_ids"][997 * seed :][:USE_TOKENS]
    with _bar("counting the use of heads", 1, progress), choice(model) as routing:
        model(torch.tensor([text], device=model.device), use_cache=False)
    use = routing.head_mask().float().mean((1, 2)).cpu()
    framed = (torch.arange(use.shape[1]) < choice.shared).expand(use.shape)
    return choice, use, framed, {"shared": choice.shared, "active": choice.active, "heads_from": "query norms"}


def _strengths(
    model: Any, tokenizer: Any, heads: str | Path | None, sparsity: float, seed: int, progress: bool
) -> tuple[str, Tensor, Tensor]:
    """Where the strengths come from, (layers, query heads) strengths, and the map of retrieval heads."""
    sizes = geometry(model)
    if heads is not None and Path(heads).is_dir():
        gates, _ = load_pattern(heads)
        check_fits(model, gates)
        return f"gates in {heads}", gates.repeat_interleave(sizes.group, dim=1), binarize(gates, sparsity=sparsity)
    if heads is not None:
        source, scores = f"scores in {heads}", _stored_scores(Path(heads), sizes)
    else:
        # A prompt of about 200 tokens: DuoAttention's own needles are hidden in longer and other text.
        found = retrieval_heads(
            model, tokenizer, lengths=(400,), depths=(20, 50, 90), offsets=(30_000 + 997 * seed,), needles=NEEDLES,
            max_new_tokens=24, progress=progress,
        )  # fmt: skip
        source, scores = f"needle tests ({found.accepted} of {len(found.tests)} accepted)", found.mean
    duo = DuoAttention.from_retrieval_scores(scores, sizes.kv_heads, sparsity=sparsity)
    return source, scores, duo.retrieval


def _stored_scores(path: Path, sizes: Any) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is neither a folder of gates nor a json file of retrieval scores: {error}") from None
    if not (isinstance(values, dict) and "tests" in values):
        return read_scores(path, sizes).mean(dim=0)
    result = RetrievalHeads.load(path)
    if result.geometry != sizes:
        raise ValueError(f"{path} has scores of {result.geometry}, the model is {sizes}")
    return result.mean


@torch.no_grad()
def attention_patterns(
    model: Any, tokenizer: Any, *, tokens: int = EXAMPLE_TOKENS
) -> tuple[list[str], list[list[list[list[int]]]]]:
    """What every head attends to in a short text that repeats itself, as (token texts, weights from 0 to 255).

    The weights are nested lists [layer][head][query][key]; 255 means weight 1.
    """
    needle = min(NEEDLES, key=lambda one: len(one.sentence))
    ids = tokenizer(f"{needle.sentence} {needle.question} It is {needle.answer}.")["input_ids"][:tokens]
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        weights = model(torch.tensor([ids], device=model.device), output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(attention)
    rows = [(255 * layer[0].float()).round().clamp(0, 255).to(torch.uint8).tolist() for layer in weights]
    return [tokenizer.decode([token]) for token in ids], rows


@contextmanager
def _bar(what: str, total: int, show: bool) -> Iterator[Advance]:
    if not show or os.environ.get("MANYHEADS_NO_PROGRESS"):
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<42.42}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, advance=1, description=f"{what}: {done}")
