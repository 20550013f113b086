"""`python -m benchmarks`: time every case, write a table and a plot to benchmarks/results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.cases import CASES, OURS, SDPA, Case
from manyheads.bench.speed import measure, with_backward
from manyheads.data.files import write_atomically


def run_case(case: Case, device: str, dtype: torch.dtype, repeats: int, longest: int) -> list[dict]:
    """One row for each length, direction and contestant."""
    rows = []
    for length in (n for n in case.lengths if n <= longest):
        torch.manual_seed(0)
        contest = case.build(length, device, dtype)
        for direction in ("forward", "forward+backward") if case.backward else ("forward",):
            training = direction != "forward"
            functions = {
                name: with_backward(function) if training else function
                for name, function in contest.contestants.items()
                if not (training and name in contest.forward_only)
            }
            with torch.set_grad_enabled(training):
                timings = measure(functions, contest.inputs, repeats=repeats)
            for name, timing in timings.items():
                rows.append(
                    dict(case=case.name, engine=case.engine, tokens=length, direction=direction, contestant=name)
                    | dict(seconds=timing.seconds, peak_bytes=timing.peak_bytes)
                    | dict(ratio=timing.seconds / timings[OURS].seconds)
                )
    return rows


def table(rows: list[dict]) -> Table:
    """Milliseconds, peak memory and how many times longer than manyheads each contestant takes."""
    result = Table(title=f"{rows[0]['case']} ({rows[0]['engine']})", title_justify="left")
    for column in ("tokens", "direction", "contestant", "ms", "x ours", "peak MB"):
        result.add_column(column, justify="left" if column in ("direction", "contestant") else "right")
    for row in rows:
        cells = (f"{row['seconds'] * 1e3:.2f}", f"{row['ratio']:.2f}", f"{row['peak_bytes'] / 1e6:.1f}")
        result.add_row(str(row["tokens"]), row["direction"], row["contestant"], *cells)
    return result


def markdown(rows: list[dict]) -> str:
    """All rows as one Markdown table."""
    lines = ["| case | tokens | direction | contestant | ms | x ours | peak MB |", "|---|---:|---|---|---:|---:|---:|"]
    for row in rows:
        figures = f"{row['seconds'] * 1e3:.2f} | {row['ratio']:.2f} | {row['peak_bytes'] / 1e6:.1f}"
        lines.append(f"| {row['case']} | {row['tokens']} | {row['direction']} | {row['contestant']} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict]) -> str:
    """Time against tokens on logarithmic axes, one panel for each case and direction, as an HTML page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = sorted({(row["case"], row["direction"]) for row in rows})
    figure = make_subplots(rows=(len(panels) + 1) // 2, cols=2, subplot_titles=[", ".join(panel) for panel in panels])
    for place, panel in enumerate(panels):
        lines: dict[str, list[dict]] = {}
        for row in rows:
            if (row["case"], row["direction"]) == panel:
                lines.setdefault(row["contestant"], []).append(row)
        for name, points in lines.items():
            colour = {OURS: "#0b7285", SDPA: "#868e96"}.get(name)
            figure.add_trace(
                go.Scatter(
                    x=[point["tokens"] for point in points],
                    y=[point["seconds"] for point in points],
                    name=name,
                    line={"color": colour},
                ),
                row=place // 2 + 1,
                col=place % 2 + 1,
            )
    figure.update_xaxes(type="log", title="tokens").update_yaxes(type="log", title="seconds")
    figure.update_layout(height=360 * ((len(panels) + 1) // 2), template="plotly_white", title="manyheads benchmarks")
    return figure.to_html(include_plotlyjs=True)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, help="float32 (default on CPU), bfloat16 (default on a GPU), float16")
    parser.add_argument("--only", default="", help="run cases whose name or engine contains this")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on CPU")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--longest", type=int, default=1 << 20, help="skip lengths above this")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64
    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    cases = [case for case in CASES if options.only in case.name or options.only in case.engine]
    if not cases:
        parser.error(f"no case contains {options.only!r}; there are {', '.join(case.name for case in CASES)}")
    console, rows = Console(), []
    with Progress(console=console, transient=True) as progress:
        for case in progress.track(cases, description="benchmarks"):
            rows += (found := run_case(case, options.device, dtype, options.repeats, options.longest))
            console.print(table(found))
            # Written after every case, so that an interrupted run keeps what it measured.
            write_atomically(options.output / "results.json", json.dumps(rows, indent=1))
            write_atomically(options.output / "table.md", markdown(rows))
            write_atomically(options.output / "plot.html", plot(rows))
    console.print(f"Written to {options.output}")


if __name__ == "__main__":
    main()
