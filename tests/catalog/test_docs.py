from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_fresh(generate):
    readme = generate.README.read_text(encoding="utf-8")
    assert generate.with_table(readme) == readme, "run `make docs`: README.md is stale"
    systems = generate.SYSTEMS.read_text(encoding="utf-8")
    assert generate.systems_page() == systems, "run `make docs`: docs/systems.md is stale"


def test_a_readme_without_markers_is_refused(generate):
    with pytest.raises(ValueError, match="systems:begin"):
        generate.with_table("# manyheads\n")
