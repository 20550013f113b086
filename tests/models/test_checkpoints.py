"""Checkpoint files: what is read, what is refused, and that nothing runs and nothing changes when it is refused."""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

from manyheads.models import CheckpointError, create_model, load_checkpoint, read_state, save_checkpoint

SMALL = {"depths": (1,), "embed_dims": (16,), "num_heads": (2,), "window_size": 4, "num_classes": 3}


def _model(**options) -> torch.nn.Module:
    return create_model("davit_tiny", **{**SMALL, **options})


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["plain.pth", "plain.pt", "plain.bin", "plain.safetensors"])
def test_every_kind_of_file_round_trips(tmp_path: Path, name: str) -> None:
    model = _model()
    if name.endswith("safetensors"):
        safetensors.torch.save_file(model.state_dict(), tmp_path / name)
    else:
        torch.save(model.state_dict(), tmp_path / name)
    assert _same(_model(checkpoint=tmp_path / name), model)
    assert _same(_model(checkpoint=tmp_path), model)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrappers_data_parallel_prefixes_and_arguments_are_peeled_off(tmp_path: Path, wrapper: str) -> None:
    model = _model()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=0.1), wrapper: state}, tmp_path / "last.pth")
    assert _same(_model(checkpoint=tmp_path / "last.pth"), model)


def test_settings_of_swins_program_are_read_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # LITv2's files hold such a dict beside the weights; its package need not be installed to read them.
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, content: dict) -> None:
            super().__init__(content)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set()})

    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = "yacs.config", "CfgNode", CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    model = _model()
    settings = CfgNode({"TRAIN": CfgNode({"EPOCHS": 300})})
    torch.save({"model": model.state_dict(), "config": settings}, tmp_path / "litv2_s.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert _same(_model(checkpoint=tmp_path / "litv2_s.pth"), model)


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {"stem.conv.weight": Bomb()}}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        read_state(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, name: str, kept: float) -> None:
    whole = tmp_path / name
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(_model().state_dict(), whole)
    content = whole.read_bytes()
    whole.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=name):
        read_state(whole)


@pytest.mark.parametrize("content", [b"not a checkpoint at all\n" * 9, b"{}", bytes(range(256))])
@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_files_of_another_kind_are_refused(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError):
        read_state(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(2), {"epoch": 3}])
def test_content_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "x.pth")


def test_another_models_checkpoint_lists_the_keys_and_changes_nothing(tmp_path: Path) -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="stem") as caught:
        load_checkpoint(model, torch.nn.Linear(2, 2).state_dict())
    assert "stem.conv.weight" in caught.value.missing
    assert caught.value.unexpected == ("weight", "bias")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_one_wrong_shape_changes_nothing() -> None:
    model, other = _model(), _model(num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head.fc.weight is \(4, 16\), the model wants \(3, 16\)"):
        load_checkpoint(model, other.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("source", ["nowhere.pth", "no/such/file.safetensors", "just a name"])
def test_missing_files_are_named(source: str) -> None:
    with pytest.raises(CheckpointError, match="neither an existing file nor a hub id"):
        read_state(source)


def test_a_directory_with_several_files_asks_which(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save(_model().state_dict(), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"a\.pth.*b\.pth"):
        read_state(tmp_path)


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    save_checkpoint(model, tmp_path / "model.safetensors")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md", "model.safetensors"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(tmp_path / name))
    assert _same(_model(checkpoint="somebody/davit"), model)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md"])
    with pytest.raises(CheckpointError, match=r"holds no checkpoint file, only \['README.md'\]"):
        read_state("somebody/davit")


def test_an_unreachable_hub_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo: str) -> list[str]:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(CheckpointError, match="no route"):
        read_state("somebody/davit")


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    save_checkpoint(model, tmp_path / "model.safetensors")
    old = (tmp_path / "model.safetensors").read_bytes()

    def interrupted(state: dict, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_one_of_several_sets_of_weights(tmp_path) -> None:
    file = tmp_path / "both.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "model_ema": {"module.weight": torch.ones(1)}, "epoch": 3}, file)
    assert read_state(file)["weight"] == 0
    assert read_state(f"{file}#model_ema")["weight"] == 1
    with pytest.raises(CheckpointError, match=r"no weights called 'ema', only \['model', 'model_ema'\]"):
        read_state(f"{file}#ema")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "odd#name.pth")
    assert read_state(tmp_path / "odd#name.pth")["weight"] == 0
