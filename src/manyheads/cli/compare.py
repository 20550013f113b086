"""``manyheads compare``: every working operator that serves a pattern, timed on the user's shapes."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from manyheads.cli.output import (
    Device,
    Dtype,
    Json,
    human_bytes,
    human_seconds,
    print_json,
    print_table,
    resolve_device,
    resolve_dtype,
)


def compare(
    pattern: Annotated[str, typer.Option(help="noncausal-self, causal-self, noncausal-cross or causal-cross")],
    length: Annotated[int, typer.Option(min=1, help="Number of tokens.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each operator; the median counts.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Time the operators that serve a pattern, on your shapes.

    Dense attention runs beside them on the same inputs, forward and backward, in one process; medians count.
    """
    # The profiler that measures peak memory would otherwise log to the terminal; torch reads this when it is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from manyheads.bench.contest import Shape, run_contest

    shape = Shape(pattern=pattern, length=length, batch=batch, heads=heads, head_dim=head_dim)
    rows = run_contest(shape, device=resolve_device(device), dtype=resolve_dtype(dtype), repeats=repeats)
    if json:
        print_json([row.to_dict() for row in rows])
        return
    cells = []
    for row in rows:
        forward = [human_seconds(row.forward), f"{row.forward_ratio:.2f}x"]
        training = [human_seconds(row.training), f"{row.training_ratio:.2f}x"]
        cells.append([row.name, *forward, *training, human_bytes(row.peak_bytes)])
    columns = ["", "forward", "speed", "+ backward", "speed ", "peak"]
    title = f"{pattern}, {length} tokens, batch {batch}, {heads} heads of {head_dim}, {dtype}"
    print_table(title, columns, cells, right=tuple(columns[1:]))
    typer.echo("speed: times as fast as dense SDPA; peak: most bytes held, forward and backward")
    for row in rows:
        typer.echo(f"  {row.name}: {row.settings}")
