"""``manyheads list`` and ``manyheads show SLUG``: what there is."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

from manyheads import catalog
from manyheads.cli.output import Json, print_json, print_table


def list_systems(
    kind: Annotated[str | None, typer.Option(help="operator, adaptation, analysis, vision backbone, ...")] = None,
    pattern: Annotated[str | None, typer.Option(help=", ".join(catalog.PATTERNS))] = None,
    room: Annotated[str | None, typer.Option(help=", ".join(catalog.ROOMS))] = None,
    state: Annotated[str | None, typer.Option(help="works or planned")] = None,
    json: Json = False,
) -> None:
    """List the attention systems and what each is for."""
    found = catalog.systems(kind=kind, pattern=pattern, room=room, state=state)
    if json:
        print_json([system.to_dict() for system in found])
        return
    rows = [[system.slug, system.kind, system.state, system.why] for system in found]
    print_table(f"{len(found)} of {len(catalog.SYSTEMS)} systems", ["system", "kind", "state", "why"], rows)


def show(slug: Annotated[str, typer.Argument(help="A name from `manyheads list`.")], json: Json = False) -> None:
    """Show one system: its paper, its purpose, what to type."""
    system = catalog.get(slug)
    commands = _commands(system)
    if json:
        print_json(system.to_dict() | {"url": system.url, "commands": commands})
        return
    typer.echo("\n".join(textwrap.wrap(system.title, 79)))
    source = system.url or "no arXiv preprint"
    typer.echo(f"{system.year}, {source}\n")
    typer.echo("\n".join(textwrap.wrap(system.why, 79)) + "\n")
    typer.echo(f"kind      {system.kind}")
    typer.echo(f"patterns  {', '.join(system.patterns) or 'none'}")
    typer.echo(f"rooms     {', '.join(system.rooms)}")
    typer.echo(f"state     {system.state}")
    for label, lines in (("in code", system.public), ("to type", commands)):
        for place, line in enumerate(lines):
            typer.echo(f"{label if place == 0 else '':<10}{line}")


def _commands(system: catalog.System) -> list[str]:
    if system.state != "works":
        return []
    commands = [f"manyheads reproduce {system.slug}"]
    if system.kind == "adaptation":
        commands.insert(0, f"manyheads try {system.slug} --model smollm2")
    if system.kind == "analysis":
        commands.insert(0, "manyheads inspect smollm2")
    if "ops" in system.rooms:
        commands += [
            f"manyheads cost {system.slug} --length 16384",
            f"manyheads compare --pattern {system.patterns[0]}",
        ]
    return commands
