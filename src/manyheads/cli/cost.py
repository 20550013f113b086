"""``manyheads cost``: what a system should cost on paper."""

from __future__ import annotations

from typing import Annotated

import typer

from manyheads.cli.output import Json, human_bytes, human_count, print_json, print_table


def cost(
    slug: Annotated[str, typer.Argument(help="A working system that has an operator, or duo_attention.")],
    length: Annotated[int, typer.Option(min=1, help="Number of tokens.")] = 16384,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in the batch.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Number of query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 64,
    element_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one number: 2 for bfloat16.")] = 2,
    json: Json = False,
) -> None:
    """Operations, memory traffic and state of a system by its closed formulas, next to dense attention."""
    from manyheads.cost import cost as formula

    ours = formula(slug, length, batch=batch, heads=heads, head_dim=head_dim, element_bytes=element_bytes)
    dense = formula("dense", length, batch=batch, heads=heads, head_dim=head_dim, element_bytes=element_bytes)
    if json:
        print_json({"system": ours.to_dict(), "dense": dense.to_dict()})
        return
    rows = []
    for label, field, show in (
        ("operations, forward", "forward_flops", human_count),
        ("operations, backward", "backward_flops", human_count),
        ("memory traffic, forward", "traffic_bytes", human_bytes),
        ("held between tokens", "state_bytes", human_bytes),
        ("operations per new token", "decode_flops", human_count),
    ):
        mine, other = getattr(ours, field), getattr(dense, field)
        if mine is None:
            rows.append([label, "does not decode", show(other) if other is not None else "", ""])
        else:
            ratio = f"{other / mine:.3g}x" if other is not None and mine else ""
            rows.append([label, show(mine), show(other) if other is not None else "", ratio])
    print_table(f"{slug}: {ours.settings}", ["", slug, "dense", "less"], rows, right=(slug, "dense", "less"))
    typer.echo(ours.formula)
