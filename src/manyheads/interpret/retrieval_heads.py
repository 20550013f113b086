"""Retrieval heads: the few attention heads of a language model that copy from a long context.

A needle is hidden in a text and asked for; a head scores whenever the position it attends to most is the needle token
that the model is just generating (``score_heads``). The answer is generated with the model's fast attention; then one
more pass over prompt and answer computes only the rows that predicted the answer, and of these keeps only the positions
of the largest entries. That is identical to watching every decode step, and needs layers * heads * steps integers.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from manyheads.data.files import write_atomically
from manyheads.data.needles import NEEDLES, Needle, NeedlePrompt, haystack_ids, needle_prompt
from manyheads.interpret.attach import AttentionCall, attention_function, decoder, geometry, visible_keys
from manyheads.interpret.mask_heads import mask_heads
from manyheads.interpret.retrieval_result import NeedleTest, RetrievalHeads
from manyheads.interpret.retrieval_scores import (
    aggregate,
    answer_span,
    find_needle,
    rouge_recall,
    score_heads,
    score_positions,
)

__all__ = [
    "NeedleTest",
    "RetrievalHeads",
    "aggregate",
    "answer_needles",
    "attended_positions",
    "find_needle",
    "mask_heads",
    "retrieval_heads",
    "score_heads",
]


def retrieval_heads(
    model: nn.Module,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (400, 800),
    depths: Sequence[int | float] = (10, 30, 50, 70, 90),
    needles: Sequence[Needle] = NEEDLES,
    text: str | None = None,
    offsets: Sequence[int] = (0,),
    buffer: int = 200,
    chat: bool | None = None,
    topk: int = 1,
    unique: bool = False,
    max_new_tokens: int = 50,
    recall_threshold: int | float = 50.0,
    batch_size: int = 1,
    progress: bool = True,
    resume: str | Path | None = None,
) -> RetrievalHeads:
    """Score every attention head of a language model by how much it copies from the context.

    One test is run for each needle, offset, length and depth. The model's attention implementation, weights and
    settings are left as they were.

    Args:
        model: any Hugging Face decoder (Llama, Qwen, Mistral, Gemma, Phi, GPT-2, ...), in evaluation mode.
        tokenizer: its tokenizer.
        lengths: context lengths in tokens (the paper: 20 from 0 to 50,000).
        depths: where the needle goes, 0 (start) to 100 (end) (the paper: 10 evenly spaced).
        needles: what is hidden and asked for.
        text: the haystack; None takes ``python_documentation()``.
        offsets: tokens of the haystack text to skip: other haystacks for the same grid.
        buffer: tokens of each length kept free for question and answer (paper: 200).
        chat: ask through the chat template; None does so where the tokenizer has one.
        topk: how many of a row's largest entries may hit; 1 in the paper.
        unique: score different tokens instead of steps (see ``score_heads``).
        max_new_tokens: decoding is greedy and ends here, at a token that holds a newline, or at the end token.
        recall_threshold: a test counts when the ROUGE-1 recall of its answer, in percent, is greater.
        batch_size: tests that run together, left-padded.
        progress: show a progress bar on standard error.
        resume: a folder for the results of single tests; tests found there are not run again, so an interrupted run
            continues. Settings or a model other than those of the folder are an error.

    Returns:
        A ``RetrievalHeads`` with scores per test, their mean over accepted tests, and the ranking. Tests whose answer
        cannot be located in the prompt are dropped and counted.

    Raises:
        ValueError: an empty grid, a needle longer than the budget, a context longer than the model's limit, a
            ``resume`` folder of another run, a model without discoverable attention layers.

    Source: arXiv 2404.15574, section 2 and the authors' ``retrieval_head_detection.py``.
    """
    sizes = geometry(model)
    _check_grid(lengths, depths, needles, offsets, topk, max_new_tokens, batch_size)
    hay = haystack_ids(tokenizer, text, max(offsets) + max(lengths))
    prompts = [
        needle_prompt(tokenizer, needle, length=length, depth=depth, text=hay, offset=offset, buffer=buffer, chat=chat)
        for length in lengths
        for needle in needles
        for offset in offsets
        for depth in depths
    ]
    _check_limit(model, prompts, max_new_tokens)
    settings = {
        "model": str(getattr(model.config, "_name_or_path", "")) or type(model).__name__,
        "geometry": [sizes.layers, sizes.heads, sizes.kv_heads, sizes.head_dim],
        "topk": topk,
        "unique": unique,
        "max_new_tokens": max_new_tokens,
        "buffer": buffer,
    }
    store = None if resume is None else _Store(Path(resume), settings)
    done: dict[int, NeedleTest] = {}
    if store is not None:
        done = {i: test for i, prompt in enumerate(prompts) if (test := store.read(prompt)) is not None}
    waiting = [i for i in range(len(prompts)) if i not in done]

    ends = _end_tokens(model, tokenizer)
    with _bar(progress, len(prompts), len(done)) as advance:
        for low in range(0, len(waiting), batch_size):
            chosen = waiting[low : low + batch_size]
            tests = _run(model, tokenizer, ends, [prompts[i] for i in chosen], topk, unique, max_new_tokens)
            for i, test in zip(chosen, tests):
                if store is not None:
                    store.write(prompts[i], test)
                done[i] = test
            advance(len(chosen))
    tests = [done[i] for i in range(len(prompts))]
    return RetrievalHeads(settings["model"], sizes, tests, recall_threshold=recall_threshold)


def answer_needles(
    model: nn.Module, tokenizer: Any, prompts: Sequence[NeedlePrompt], *, max_new_tokens: int = 50, batch_size: int = 1
) -> list[tuple[str, float]]:
    """(answer, ROUGE-1 recall in percent) of the model to each prompt, decoded greedily as in ``retrieval_heads``.

    Raises:
        ValueError: prompts longer than the model's limit.
    """
    _check_limit(model, prompts, max_new_tokens)
    ends, answers = _end_tokens(model, tokenizer), []
    for low in range(0, len(prompts), batch_size):
        batch = list(prompts[low : low + batch_size])
        for prompt, ids in zip(batch, _generate(model, tokenizer, ends, [p.ids for p in batch], max_new_tokens)):
            answer = tokenizer.decode(ids, skip_special_tokens=True)
            answers.append((answer, rouge_recall(prompt.needle.answer, answer)))
    return answers


@torch.no_grad()
def attended_positions(
    model: nn.Module, prompts: Sequence[Sequence[int]], generated: Sequence[Sequence[int]], *, topk: int = 1
) -> list[Tensor]:
    """For every generated token, the positions that each head attended to most when it was predicted.

    Args:
        model: a Hugging Face decoder.
        prompts: token ids of each prompt, none empty.
        generated: what followed each prompt.
        topk: how many positions, by descending attention.

    Returns:
        For each prompt an integer tensor (steps, layers, heads, topk) of positions in prompt + generated, -1 where a
        row has fewer keys than ``topk``. Memory: one key/value head's rows at a time, steps * group * keys numbers.

    Raises:
        ValueError: an empty prompt or as many continuations as prompts are needed.
    """
    if len(prompts) != len(generated) or not all(len(prompt) for prompt in prompts):
        raise ValueError("need one continuation for each prompt, and no empty prompt")
    sizes = geometry(model)
    # The last generated token predicts nothing that is kept.
    sequences = [[*prompt, *more[:-1]] for prompt, more in zip(prompts, generated)]
    steps = [len(more) for more in generated]
    ids, padding = _left_padded(sequences, 0, _device(model))
    # Row of step s of sequence b: its prompt's last token, then the generated ones; steps it lacks repeat the last row.
    last = torch.tensor(steps, device=ids.device).clamp(min=1)[:, None]
    step = torch.minimum(torch.arange(max([1, *steps]), device=ids.device)[None], last - 1)
    rows = ids.shape[1] - last + step
    top = torch.full((len(prompts), max([1, *steps]), sizes.layers, sizes.heads, topk), -1, dtype=torch.long)

    def watch(
        call: AttentionCall, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        seen = visible_keys(mask, query.shape[2], key.shape[2], rows)
        top[:, :, call.layer] = _top_keys(query, key, rows, seen, topk, options).cpu()
        return call.original(module, query, key, value, mask, **options)

    body = decoder(model)[0]
    with attention_function(model, watch):
        body(**_inputs(body, ids, padding), use_cache=False)
    start = (~padding).sum(1).cpu()[:, None, None, None, None]
    top = torch.where(top < start, -1, top - start)
    return [top[b, : steps[b]] for b in range(len(prompts))]


def _top_keys(query: Tensor, key: Tensor, rows: Tensor, seen: Tensor | None, topk: int, options: dict) -> Tensor:
    batch, heads = query.shape[:2]
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    chosen = query[torch.arange(batch, device=query.device)[:, None], :, rows].transpose(1, 2)
    width = min(topk, keys)
    found = torch.full((batch, rows.shape[1], heads, topk), -1, dtype=torch.long, device=query.device)
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        # Softmax and soft-capping keep the order, so the products themselves are ranked.
        scores = chosen[:, mine].float() @ key[:, head : head + 1].float().transpose(-1, -2) * options["scaling"]
        if seen is not None:
            visible = seen if seen.shape[1] == 1 else seen[:, mine]
            scores = scores.masked_fill(~visible, -torch.inf)
        best = scores.topk(width, dim=-1) if width > 1 else scores.max(dim=-1, keepdim=True)
        index = best.indices.masked_fill(best.values == -torch.inf, -1)
        found[:, :, mine, :width] = index.transpose(1, 2)
    return found


def _run(
    model: Any,
    tokenizer: Any,
    ends: list[int],
    prompts: list[NeedlePrompt],
    topk: int,
    unique: bool,
    max_new_tokens: int,
) -> list[NeedleTest]:
    generated = _generate(model, tokenizer, ends, [prompt.ids for prompt in prompts], max_new_tokens)
    positions = attended_positions(model, [prompt.ids for prompt in prompts], generated, topk=topk)
    tests = []
    for prompt, ids, top in zip(prompts, generated, positions):
        start, end = answer_span(tokenizer, prompt.ids, prompt.needle.answer)
        scores, _ = score_positions(top, prompt.ids, ids, start, end, unique=unique)
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        tests.append(
            NeedleTest(
                question=prompt.needle.question,
                length=prompt.length,
                depth=float(prompt.depth),
                offset=prompt.offset,
                prompt_tokens=len(prompt.ids),
                answer=answer,
                recall=rouge_recall(prompt.needle.answer, answer),
                found=start >= 0,
                scores=scores,
            )
        )
    return tests


@torch.no_grad()
def _generate(
    model: Any, tokenizer: Any, ends: list[int], prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else 0)
    ids, padding = _left_padded(prompts, pad, _device(model))
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    out = model.generate(input_ids=ids, attention_mask=padding.long(), generation_config=greedy)
    stops, continuations = set(ends), []
    for row in out[:, ids.shape[1] :].tolist():
        stop = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        continuations.append(row[: stop + 1])
    return continuations


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = {token for token, text in enumerate(texts) if "\n" in text}
    for source in (tokenizer.eos_token_id, model.generation_config.eos_token_id, model.config.eos_token_id):
        ends.update(source if isinstance(source, list) else [] if source is None else [source])
    return sorted(ends)


def _left_padded(sequences: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in sequences], device=device)
    real = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in sequences], device=device)
    return ids, real


def _inputs(body: nn.Module, ids: Tensor, real: Tensor) -> dict[str, Tensor]:
    if bool(real.all()):
        return {"input_ids": ids}
    inputs = {"input_ids": ids, "attention_mask": real.long()}
    # Learned positions must not count the padding; some models (OPT) derive them from the mask alone.
    if "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    return inputs


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check_grid(
    lengths: Sequence, depths: Sequence, needles: Sequence, offsets: Sequence, topk: int, new: int, batch: int
) -> None:
    for name, values in {"lengths": lengths, "depths": depths, "needles": needles, "offsets": offsets}.items():
        if not len(values):
            raise ValueError(f"{name} is empty: there is no test to run")
    for name, value in {"topk": topk, "max_new_tokens": new, "batch_size": batch}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _check_limit(model: Any, prompts: Sequence[NeedlePrompt], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt.ids) for prompt in prompts), default=0) + max_new_tokens
    if limit and longest > limit:
        raise ValueError(
            f"the longest prompt and its answer need {longest} tokens, but this model takes {limit}; "
            "use smaller lengths"
        )


class _Store:
    """A folder with one file for each finished test and the settings that they share."""

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists() and (kept := json.loads(path.read_text())) != settings:
            raise ValueError(f"{folder} holds tests of another run: {kept}, but this one has {settings}")
        write_atomically(path, json.dumps(settings))

    def read(self, prompt: NeedlePrompt) -> NeedleTest | None:
        path = self._path(prompt)
        return NeedleTest.from_json(json.loads(path.read_text())) if path.exists() else None

    def write(self, prompt: NeedlePrompt, test: NeedleTest) -> None:
        write_atomically(self._path(prompt), json.dumps(test.to_json()))

    def _path(self, prompt: NeedlePrompt) -> Path:
        # The token ids say everything about a test: text, offset, needle, depth, template, tokenizer.
        return self.folder / f"{hashlib.sha256(repr(prompt.ids).encode()).hexdigest()[:24]}.json"


def _bar(show: bool, total: int, done: int) -> Any:
    if not show or os.environ.get("MANYHEADS_NO_PROGRESS"):
        return nullcontext(lambda count: None)
    return _RichBar(total, done)


class _RichBar:
    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("needle tests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda count: self.bar.advance(self.task, count)

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
