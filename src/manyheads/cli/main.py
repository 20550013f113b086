"""The command ``manyheads``: one line for each command, and what happens when one fails.

Nothing heavy is imported here or at the top of a command's file: ``manyheads --help`` must not wait for torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

import manyheads
from manyheads.cli.catalog import list_systems, show
from manyheads.cli.compare import compare
from manyheads.cli.cost import cost
from manyheads.cli.evaluate import evaluate
from manyheads.cli.inspect import inspect
from manyheads.cli.reproduce import reproduce
from manyheads.cli.train import train
from manyheads.cli.try_ import try_

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="manyheads",
    help="The attention systems of 59 papers: list, try, inspect, compare, reproduce, train, cost.",
    no_args_is_help=True,
    # Plain help and errors: rich would double the time that --help takes.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"manyheads {manyheads.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool | None = typer.Option(None, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None: ...


app.command("list")(list_systems)
app.command()(show)
app.command("try")(try_)
app.command()(inspect)
app.command()(compare)
app.command()(reproduce)
app.command()(train)
app.command()(evaluate)
app.command()(cost)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted.

    A person gets one clear line, not a traceback; ``MANYHEADS_TRACEBACK=1`` brings the traceback back.
    """
    try:
        app(args=None if arguments is None else list(arguments))
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("MANYHEADS_TRACEBACK"):
            raise
        print(f"manyheads: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, (ValueError, TypeError, LookupError, FileNotFoundError)) else FAILED
    return OK


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, LookupError):
        text = text.strip("'\"")
    known = isinstance(error, (ValueError, TypeError, LookupError, OSError))
    return text if known else f"{type(error).__name__}: {text}"


def main() -> None:
    """Entry point of the ``manyheads`` script."""
    sys.exit(run())
