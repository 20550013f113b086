"""``manyheads inspect``: what do the heads of my model do?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads.cli.output import Device, Dtype, Json, print_json, print_table, resolve_device, resolve_dtype


def inspect(
    model: Annotated[str, typer.Argument(help="smollm2, a directory, or a Hugging Face hub id.")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "400,800",
    depths: Annotated[str, typer.Option(help="Depths of the needle in percent.")] = "10,50,90",
    mask: Annotated[str, typer.Option(help="Also answer with so many of the best heads masked, e.g. 5,10.")] = "",
    top: Annotated[int, typer.Option(min=1, help="Heads to list.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Tests that run together.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; a run that was interrupted continues from it.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Score every attention head of MODEL by how much it copies from a long context (retrieval heads).

    The folder given by --output gets retrieval_heads.json (everything), scores.json (the format of the paper's authors)
    and heads.html (the map of all heads).
    """
    asked, deep = _numbers("--lengths", lengths), _numbers("--depths", depths)
    counts = _numbers("--mask", mask) if mask else []
    place, kind = resolve_device(device), resolve_dtype(dtype)
    from manyheads.data.language_models import load_language_model
    from manyheads.data.needles import NEEDLES, needle_prompt
    from manyheads.interpret.masking_recall import masking_recall
    from manyheads.interpret.retrieval_heads import retrieval_heads

    loaded, tokenizer = load_language_model(model, device=place, dtype=kind)
    resume = None if output is None else output / "tests"
    found = retrieval_heads(loaded, tokenizer, lengths=asked, depths=deep, batch_size=batch, resume=resume)
    prompts = [
        needle_prompt(tokenizer, needle, length=length, depth=depth)
        for length in asked
        for needle in NEEDLES
        for depth in deep
    ]
    masked = {
        count: masking_recall(loaded, tokenizer, found, prompts, count, batch_size=batch)
        if count
        else (found.recall, [])
        for count in counts
    }
    if output is not None:
        found.save(output / "retrieval_heads.json")
        found.write_scores(output / "scores.json")
        found.plot().write_html(output / "heads.html")
    if json:
        best = [{"layer": i, "head": j, "score": float(found.mean[i, j])} for i, j in found.top(top)]
        recalls = {count: {"best": best_, "others": others} for count, (best_, others) in masked.items()}
        print_json(found.summary() | {"top": best} | ({"masked_recall": recalls} if counts else {}))
        return
    from rich.console import Console

    Console().print(found.table(top))
    if counts:
        rows = [
            [str(count), f"{best_:.0f} %", " ".join(f"{other:.0f} %" for other in others) or "-"]
            for count, (best_, others) in masked.items()
        ]
        print_table("Recall with heads masked", ["heads", "the best", "others, three draws"], rows)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between, such as 10,50,90") from None
    if min(numbers) < 0:
        raise ValueError(f"{option} {text!r} must not be negative")
    return numbers
