"""Write what the catalog decides: docs/systems.md, and the table between the markers of README.md.

Run it with `make docs`; a test fails when either is stale.
"""

from __future__ import annotations

from pathlib import Path

from manyheads import catalog
from manyheads.data.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
README, SYSTEMS = ROOT / "README.md", ROOT / "docs" / "systems.md"
BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"


def main() -> None:
    write_atomically(SYSTEMS, systems_page())
    write_atomically(README, with_table(README.read_text(encoding="utf-8")))


def systems_page() -> str:
    """docs/systems.md: every system, by kind."""
    works = len(catalog.systems(state="works"))
    lines = [
        "# The systems",
        "",
        "Generated from the catalog by `make docs`; change `src/manyheads/catalog` instead of this file.",
        "",
        f"{len(catalog.SYSTEMS)} systems, of which {works} work. `manyheads list` filters them by kind, pattern, room",
        "and state; `manyheads show SLUG` says what to type. Patterns are those of CAB (arXiv 2210.07661): whether a",
        "token may see later ones (noncausal, causal), and whether keys come from the same sequence (self, cross).",
    ]
    for kind in catalog.KINDS:
        lines += ["", f"## {kind[0].upper()}{kind[1:]}", ""]
        lines += ["| system | paper | what for | patterns | rooms | state |", "|---|---|---|---|---|---|"]
        lines += [_long_row(system) for system in catalog.systems(kind=kind)]
    return "\n".join(lines) + "\n"


def readme_table() -> str:
    """The README's table: one line a system, those that work first."""
    found = catalog.systems(state="works") + catalog.systems(state="planned")
    lines = ["| system | kind | what for | state |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {_linked(s)} | {s.kind} | {_cell(s.why)} | {s.state} |" for s in found])


def with_table(readme: str) -> str:
    """The README with its table renewed."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


def _long_row(system: catalog.System) -> str:
    paper = f"{_cell(system.title)}, {system.year}"
    cells = [
        _linked(system),
        paper,
        _cell(system.why),
        ", ".join(system.patterns),
        ", ".join(system.rooms),
        system.state,
    ]
    return f"| {' | '.join(cells)} |"


def _linked(system: catalog.System) -> str:
    return f"[{system.slug}]({system.url})" if system.url else system.slug


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
