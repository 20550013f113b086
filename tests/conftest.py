"""Shared test set-up: shapes checked at run time, Triton interpreted where there is no GPU, an honest last line."""

from __future__ import annotations

import os

# Triton reads this when it is imported, so it must be set before torch or anything else imports Triton.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import pytest

# Every function of manyheads that is annotated with shapes is checked by beartype on each call in the tests.
jaxtyping.install_import_hook("manyheads", "beartype.beartype")

_NOT_RUN: dict[str, set[str]] = {}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compiling():
    """For tests that call torch.compile or torch.export: Dynamo cannot trace the run-time shape checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and isinstance(report.longrepr, tuple):
        _NOT_RUN.setdefault(report.longrepr[2].removeprefix("Skipped: "), set()).add(item.nodeid)


def pytest_deselected(items) -> None:
    for item in items:
        reason = (
            "marked slow: run `make test-all`" if item.get_closest_marker("slow") else "deselected on the command line"
        )
        _NOT_RUN.setdefault(reason, set()).add(item.nodeid)


def pytest_terminal_summary(terminalreporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("GPU tests ran through Triton's interpreter: this machine has no GPU.")
    for reason, tests in sorted(_NOT_RUN.items()):
        terminalreporter.write_line(f"not run: {len(tests)} test(s): {reason}")
