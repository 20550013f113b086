"""``manyheads cost``: what a system should cost on paper."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any

import typer

from manyheads.cli.output import Dtype, Json, human_bytes, human_count, print_json, print_table, resolve_dtype

ROWS = (
    ("operations, forward", "forward_flops", human_count),
    ("operations, backward", "backward_flops", human_count),
    ("memory traffic, forward", "traffic_bytes", human_bytes),
    ("held between tokens", "state_bytes", human_bytes),
    ("operations per new token", "decode_flops", human_count),
)


def cost(
    slug: Annotated[str, typer.Argument(help="A working system, for instance lightning_attention.")],
    length: Annotated[int, typer.Option(help="Number of tokens.")] = 16384,
    batch: Annotated[int, typer.Option(help="Sequences in the batch.")] = 1,
    heads: Annotated[int, typer.Option(help="Number of query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Number of key/value heads; as many as heads if omitted.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    dtype: Dtype = "bfloat16",
    setting: Annotated[list[str] | None, typer.Option("--set", help="The system's own size: --set window=81.")] = None,
    json: Json = False,
) -> None:
    """Say what a system should cost, next to dense attention.

    Operations, memory traffic and what decoding holds, by the closed formulas of its paper.
    """
    from manyheads import catalog
    from manyheads.cost import FORMULAS
    from manyheads.cost import cost as formula

    system = "dense" if slug == "dense" else catalog.get(slug).slug
    if system not in FORMULAS:
        raise ValueError(f"{system} has no cost formulas; these have: {', '.join(FORMULAS)}")
    sizes: dict[str, Any] = dict(
        batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, element_bytes=resolve_dtype(dtype).itemsize
    )
    ours = formula(system, length, **sizes, **_settings(setting or []))
    dense = formula("dense", length, **sizes, causal=ours.causal)
    if json:
        print_json({"system": system, "length": length, **sizes, "cost": ours.to_dict(), "dense": dense.to_dict()})
        return
    rows = []
    for label, field, show in ROWS:
        mine, other = getattr(ours, field), getattr(dense, field)
        if mine is not None:
            rows.append([label, show(mine), show(other), _ratio(other / mine)])
    beside = "causal dense" if ours.causal else "dense"
    title = f"{system}, {length} tokens, {heads} heads of {head_dim}: {ours.settings}"
    print_table(title, ["", system, beside, "ratio"], rows, right=(system, beside, "ratio"))
    typer.echo(textwrap.fill(ours.formula, 79))


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            settings[name] = int(value) if value.lstrip("-").isdigit() else float(value)
        except ValueError:
            raise ValueError(f"--set {pair!r} must be a name and a number, like --set window=81") from None
    return settings


def _ratio(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.3g}x"
