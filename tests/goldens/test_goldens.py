"""Every golden case of every system that works, from the project's own folder or from MANYHEADS_GOLDENS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.goldens.adapters import ADAPTERS
from tests.goldens.reader import find_cases, read_case

FOLDER = Path(os.environ.get("MANYHEADS_GOLDENS", Path(__file__).parent / "cases"))
CASES = find_cases(FOLDER)


def test_the_folder_has_cases() -> None:
    assert CASES, f"no golden case under {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_case(path: Path) -> None:
    case = read_case(path)
    if case.slug not in ADAPTERS:
        pytest.skip("golden cases of systems that are still planned")
    outputs = ADAPTERS[case.slug](case.config, case.state, case.inputs)
    assert not case.mismatches(outputs)
