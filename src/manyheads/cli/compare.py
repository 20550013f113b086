"""``manyheads compare``: every working operator that serves a pattern, timed on the user's shapes.

With ``--parallel``: where each scheme for sequences longer than one device should win, by the cost model.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from manyheads.cli.output import (
    Device,
    Dtype,
    Json,
    human_bytes,
    human_count,
    human_seconds,
    print_json,
    print_table,
    resolve_device,
    resolve_dtype,
)


def compare(
    pattern: Annotated[
        str | None, typer.Option(help="noncausal-self, causal-self, noncausal-cross or causal-cross")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens; default 4096, and 131072 with --parallel.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = 1,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Number of heads; default 8, and 32 with --parallel.")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(min=1, help="Channels of a head; default 64, and 128 with --parallel.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Calls of each operator; the median counts.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "float32",
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Predict schemes for sequences over many devices instead.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, max=4096, help="--parallel: devices that share a sequence.")] = 64,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="--parallel: key/value heads.")] = None,
    rate: Annotated[float, typer.Option(help="--parallel: operations a second that a device reaches.")] = 4e14,
    bandwidth: Annotated[float, typer.Option(help="--parallel: bytes a second of a link, in one direction.")] = 5e10,
    latency: Annotated[float, typer.Option(help="--parallel: seconds before a message's first byte.")] = 1e-5,
    links: Annotated[
        str, typer.Option(help="--parallel: switch (a link a device), mesh (a link a pair) or ring (neighbours).")
    ] = "switch",
    half_duplex: Annotated[
        bool, typer.Option("--half-duplex", help="--parallel: a link carries one direction at a time.")
    ] = False,
    json: Json = False,
) -> None:
    """Time the operators that serve a pattern, on your shapes.

    Dense attention runs beside them on the same inputs, forward and backward, in one process; medians count.
    With --parallel nothing runs: a cost model says where each scheme for long sequences wins.
    """
    if parallel:
        if pattern not in (None, "causal-self", "noncausal-self"):
            raise ValueError(f"--pattern {pattern!r}: --parallel compares causal-self or noncausal-self")
        from manyheads.cost.parallel import Mesh
        from manyheads.cost.schedules import Sequence

        layer = Sequence(
            length or 131072, devices, batch=batch, heads=heads or 32, kv_heads=kv_heads, head_dim=head_dim or 128,
            causal=pattern != "noncausal-self",
        )  # fmt: skip
        mesh = Mesh(rate=rate, bandwidth=bandwidth, latency=latency, duplex=not half_duplex, links=links)
        _compare_schemes(layer, mesh, json)
        return
    if pattern is None:
        raise ValueError("--pattern is needed: noncausal-self, causal-self, noncausal-cross or causal-cross")
    length, heads, head_dim = length or 4096, heads or 8, head_dim or 64
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


def _compare_schemes(layer, mesh, json: bool) -> None:
    import dataclasses

    from manyheads.cost.parallel import LINEAR, METHODS, SOFTMAX, Prediction
    from manyheads.cost.parallel import compare as predict

    methods = [name for name in METHODS if layer.causal or " " not in name]
    here = predict(layer, mesh, methods)
    maps = {kind: _winners(layer, mesh, names) for kind, names in (("softmax", SOFTMAX), ("linear", LINEAR))}
    if json:
        print_json(
            {
                "sequence": dataclasses.asdict(layer),
                "mesh": dataclasses.asdict(mesh),
                "methods": {n: p.to_dict() if isinstance(p, Prediction) else {"error": p} for n, p in here.items()},
                "fastest": {kind: {str(w): row for w, row in table.items()} for kind, table in maps.items()},
            }
        )
        return
    ring = here["ring"]
    rows, refused = [], []
    for name, found in here.items():
        if isinstance(found, str):
            refused.append(f"  {name}: {found}")
            continue
        speed = f"{ring.total / found.total:.2f}x" if isinstance(ring, Prediction) else ""
        times = [human_seconds(found.forward), human_seconds(found.backward)]
        rows.append([name, *times, human_bytes(found.received), found.bound, speed])
    what = "causal" if layer.causal else "noncausal"
    title = (
        f"{what}, {layer.length} tokens over {layer.world} devices, {layer.heads} heads ({layer.groups} key/value) of "
        f"{layer.head_dim}: one layer"
    )
    columns = ["", "forward", "backward", "received", "bound by", "speed"]
    print_table(title, columns, rows, right=("forward", "backward", "received", "speed"))
    for line in refused:
        typer.echo(line)
    for kind, table in maps.items():
        lengths = next(iter(table.values()))
        names = [human_count(int(n)) if int(n) < 1000 else f"{int(n) // 1024}K" for n in lengths]
        rows = [[str(world), *(name or "-" for name in row.values())] for world, row in table.items()]
        print_table(f"fastest {kind} attention, tokens across, devices down", ["", *names], rows)
    each = "each way" if mesh.duplex else "both ways together"
    typer.echo(
        f"assumed: {human_count(mesh.rate)} operations/s, {human_count(mesh.bandwidth)} bytes/s {each}, "
        f"{human_seconds(mesh.latency)} a message, {mesh.links} links"
    )


def _winners(layer, mesh, names: tuple[str, ...]) -> dict[int, dict[str, str | None]]:
    import dataclasses

    from manyheads.cost.parallel import winner

    table: dict[int, dict[str, str | None]] = {}
    for world in (2, 8, 32, 128, 512, 2048, 4096):
        table[world] = {}
        for length in (2**13, 2**15, 2**17, 2**19, 2**21):
            sharded = dataclasses.replace(layer, length=length, world=world)
            table[world][str(length)] = winner(sharded, mesh, names)
    return table
