"""``manyheads inspect`` on a vision model: the dependency tree of a photo, in the terminal, as json and drawn."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from manyheads.cli.main import app, run
from manyheads.models import create_model
from manyheads.models.checkpoints import save_checkpoint

SMALL = ["--image-size", "64", "--option", "embed_dim=24", "--option", "depth=2"]


def test_the_tree_of_a_photo(tmp_path) -> None:
    model = create_model("dependency_vit_tiny", embed_dim=24, depth=2, num_classes=5)
    save_checkpoint(model, tmp_path / "model.safetensors")
    given = [*SMALL, "--checkpoint", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["inspect", "dependency_vit_tiny", *given, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["grid"] == [4, 4]
    assert len(found["parents"]) == 16
    assert found["trained"]
    assert json.loads((tmp_path / "out" / "tree.json").read_text())["parents"] == found["parents"]
    page = (tmp_path / "out" / "tree.html").read_text(encoding="utf-8")
    assert "data:image" in page
    assert "Dependency tree" in page


def test_random_weights_are_told_and_wrong_files_refused(tmp_path, capsys) -> None:
    torch.manual_seed(0)
    result = CliRunner().invoke(app, ["inspect", "dependency_vit_tiny", *SMALL], catch_exceptions=False)
    assert "parts below the root" in result.stdout
    assert "weights are random" in result.stdout
    assert run(["inspect", "dependency_vit_tiny", "--image", str(tmp_path)]) == 2
    assert "is no image file" in capsys.readouterr().err
