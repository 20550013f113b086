"""``manyheads try``: what happens to my model if I change its attention?"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from manyheads.cli.output import (
    Device,
    Dtype,
    Json,
    human_bytes,
    human_count,
    print_json,
    print_table,
    resolve_device,
    resolve_dtype,
)


def try_(
    system: Annotated[str, typer.Argument(help="A method that changes a pretrained model: duo_attention or moh.")],
    model: Annotated[str, typer.Option(help="smollm2, a directory, or a Hugging Face hub id.")] = "smollm2",
    sparsity: Annotated[
        float | None, typer.Option(help="DuoAttention: share of key/value heads that stream, 0 to 1 (0.5).")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="DuoAttention: first tokens that streaming heads keep (16).")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(help="DuoAttention: last tokens that streaming heads keep (128).")
    ] = None,
    shared: Annotated[
        int | None, typer.Option(help="MoH: heads of a layer that every token uses (half of them).")
    ] = None,
    active: Annotated[
        int | None, typer.Option(help="MoH: how many of the others a token uses (a quarter of all).")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Context lengths of the needle tests; the longest is timed.")
    ] = "256,512,1024,2048",
    depths: Annotated[str, typer.Option(help="Depths of the needle in percent.")] = "0,50,100",
    heads: Annotated[
        Path | None,
        typer.Option(help="DuoAttention: a folder of gates (tsv) or a json file of scores, instead of scoring here."),
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens of one prefill call.")] = 128,
    seed: Annotated[int, typer.Option(help="Chooses the text that heads are scored on.")] = 0,
    report: Annotated[Path, typer.Option(help="Folder for the page (index.html).")] = Path("report"),
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Measure a model, change its attention, measure again; and write a page about it.

    Perplexity, needle tests, bytes of the KV cache and speed, before and after. Prompts are fed in chunks, because
    DuoAttention attends to a first chunk in full. The defaults keep 16 + 128 tokens in streaming heads, which suits a
    small model and a few thousand tokens; the authors deploy 64 + 256 for long contexts. MoH scores nothing: a token's
    longest queries choose its heads. JSON leaves out the attention patterns, which are in the page.
    """
    asked, deep = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
    place, kind = resolve_device(device), resolve_dtype(dtype)
    from manyheads.bench.try_method import METHODS, try_method
    from manyheads.catalog import nearest
    from manyheads.data.language_models import load_language_model

    if system not in METHODS:
        raise ValueError(
            f"cannot try {system!r} on a model{nearest(system, METHODS)}; choose from {', '.join(METHODS)}"
        )
    loaded, tokenizer = load_language_model(model, device=place, dtype=kind)
    trial = try_method(
        system, loaded, tokenizer, model_name=model, sparsity=sparsity, sinks=sinks, recent=recent, shared=shared,
        active=active, lengths=asked, depths=deep, chunk=chunk, heads=heads, seed=seed,
    )  # fmt: skip
    from manyheads.report import write_trial_report

    written = write_trial_report(trial, report)
    if json:
        print_json({key: value for key, value in trial.to_dict().items() if key != "patterns"})
        typer.echo(f"report: {written}", err=True)
        return
    _print(trial)
    typer.echo(f"report: {written}")


def _print(trial) -> None:
    before, after = trial.before, trial.after
    told = f"{trial.system} on {trial.model}: {trial.sentence} Heads from {trial.settings['heads_from']}."
    typer.echo(textwrap.fill(told, 80))
    rows = [
        [
            "perplexity",
            f"{before.perplexity:.2f}",
            f"{after.perplexity:.2f}",
            _ratio(after.perplexity, before.perplexity),
        ],
        ["needle recall", _percent(before.needle), _percent(after.needle), ""],
        [
            f"KV cache at {before.cache_tokens} tokens",
            human_bytes(before.cache_bytes),
            human_bytes(after.cache_bytes),
            _ratio(after.cache_bytes, before.cache_bytes),
        ],
    ]
    for label, name in (("prefill", "prefill_tokens_per_second"), ("decode", "decode_tokens_per_second")):
        old, new = getattr(before, name), getattr(after, name)
        rows.append([f"{label}, tokens/s", human_count(old), human_count(new), _ratio(new, old)])
    print_table("", ["", "before", "after", "after/before"], rows, right=("before", "after", "after/before"))
    columns = [f"{length}" for length in trial.lengths]
    grid = [
        [f"{depth:g} %", *(f"{100 * old:.0f} > {100 * new:.0f}" for old, new in zip(was, now))]
        for depth, was, now in zip(trial.depths, before.needle, after.needle)
    ]
    # Many lengths do not fit a line of 80 columns: the table goes on below.
    for start in range(0, len(columns), 5):
        part = slice(start, start + 5)
        body = [[row[0], *row[1:][part]] for row in grid]
        # rich would fold a title to the width of the table.
        typer.echo("Needle recall in %, before > after, by depth and context length in tokens:")
        print_table("", ["depth", *columns[part]], body, right=tuple(columns[part]))


def _percent(grid: list[list[float]]) -> str:
    values = [value for row in grid for value in row]
    return f"{100 * sum(values) / len(values):.0f} %"


def _ratio(new: float, old: float) -> str:
    return f"{new / old:.2f}x" if old else ""


def _numbers(option: str, text: str, kind: type) -> list:
    try:
        values = [kind(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be numbers separated by commas") from None
    if not values:
        raise ValueError(f"{option} needs at least one number")
    return values
