"""``manyheads reproduce``: the papers' claims, run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads.cli.output import Json, print_json, print_table


def reproduce(
    slug: Annotated[str | None, typer.Argument(help="A working system; omit it with --all.")] = None,
    all_systems: Annotated[bool, typer.Option("--all", help="Every claim of every working system.")] = False,
    claim: Annotated[str | None, typer.Option(help="Only the claim of this name.")] = None,
    seed: Annotated[int, typer.Option(help="Seed given to every claim.")] = 0,
    report: Annotated[Path | None, typer.Option(help="Folder for a page (index.html) and claims.json.")] = None,
    json: Json = False,
) -> None:
    """Run the claims of a paper and say whether they hold here.

    A refuted claim is a result, not a failure: the exit code is 0 unless a claim could not run to its end.
    """
    if (slug is None) == (not all_systems):
        raise ValueError("name one system, or give --all: `manyheads reproduce biformer`, `manyheads reproduce --all`")
    from manyheads.reproduce.runner import claims_of, reproducible, run_claims

    chosen = [found for name in ([slug] if slug else reproducible()) for found in claims_of(name, claim)]
    results = run_claims(chosen, seed=seed, progress=not json)
    if report is not None:
        from manyheads.report import write_claims_report

        written = write_claims_report(results, report)
        typer.echo(f"report: {written}", err=json)
    if json:
        print_json([result.to_dict() for result in results])
    else:
        _print(results)
    if any(result.error for result in results):
        raise typer.Exit(1)


def _print(results: list) -> None:
    rows = [
        [result.claim.system, result.claim.name, result.outcome, result.measured, f"{result.seconds:.0f} s"]
        for result in results
    ]
    print_table("", ["system", "claim", "verdict", "measured", "took"], rows, right=("took",))
    for result in results:
        if result.error:
            typer.echo(f"{result.claim.system} {result.claim.name}: {result.error}", err=True)
        if result.claim.full_scale:
            typer.echo(f"full scale of {result.claim.system} {result.claim.name}:\n  {result.claim.full_scale}")
