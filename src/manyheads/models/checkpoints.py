"""Reading published checkpoints: never unpickled, converted by plain functions, all or nothing.

A file is read (``read_state``), a model's own ``checkpoint_filter_fn(state, model)`` renames its keys to ours, and
``load_checkpoint`` compares names and shapes before it touches a single parameter.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Convert = Callable[[State, nn.Module], State]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")  # the last one for .pth.tar
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
# The dicts of settings that Swin's program and its descendants (LITv2) store: read as plain ones, then dropped.
_SETTINGS = [(OrderedDict, "yacs.config.CfgNode"), (OrderedDict, "fvcore.common.config.CfgNode")]
_HUB_ID = re.compile(r"(?:hf-hub:)?([\w.-]+/[\w.-]+)")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "open_clip_pytorch_model.bin")
_SHOWN = 12


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not belong to the model.

    Attributes:
        missing: parameters of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model does not have.
    """

    def __init__(self, message: str, missing: Iterable[str] = (), unexpected: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)


def load_checkpoint(model: nn.Module, source: str | Path | Mapping[str, Any], convert: Convert | None = None) -> None:
    """Load a checkpoint into ``model``, or leave the model exactly as it was and say what does not fit.

    Args:
        model: receives the tensors.
        source: a file, a directory holding one, a Hugging Face hub id, or a state dict that is already in memory.
        convert: the model's ``checkpoint_filter_fn``, which renames keys of the layouts it knows; None takes the
            keys as they are.

    Raises:
        CheckpointError: the source cannot be read, or keys or shapes differ (all of them are listed).

    >>> import torch
    >>> layer = torch.nn.Linear(2, 3)
    >>> load_checkpoint(layer, {"weight": torch.zeros(3, 2), "bias": torch.ones(3)})
    >>> layer(torch.ones(2)).tolist()
    [1.0, 1.0, 1.0]
    """
    label = "the state dict" if isinstance(source, Mapping) else str(source)
    state = _tensors(unwrap(source), label) if isinstance(source, Mapping) else read_state(source)
    converted = convert(dict(state), model) if convert else state
    _check_fits(model, converted, state, label)
    model.load_state_dict(converted)


def read_state(source: str | Path) -> State:
    """The tensors of a checkpoint file, directory or hub id, free of wrappers; code in the file is never run.

    A file with several sets of weights gives those that were trained; "FILE#model_ema" names another set.

    Raises:
        CheckpointError: no such file or set of weights, an unknown kind of file, a truncated one, or a pickle that
            holds more than data.
    """
    source, wanted = _split(source)
    path = _locate(source)
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            # Training scripts store their parsed arguments beside the weights: plain data, safe to rebuild.
            with torch.serialization.safe_globals([argparse.Namespace, *_SETTINGS]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} is not a plain file of tensors; nothing in it was executed ({reason})"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, cut short or not a checkpoint ({_first_line(error)})") from error
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError, AssertionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint ({type(error).__name__}: {_first_line(error)})") from error
    if wanted:
        if not isinstance(content, Mapping) or not isinstance(content.get(wanted), Mapping):
            known = [str(key) for key, value in dict(content).items() if isinstance(value, Mapping)]
            raise CheckpointError(f"{path} holds no weights called {wanted!r}, only {known}")
        content = content[wanted]
    return _tensors(unwrap(content), str(path))


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write the model's tensors as safetensors; an interruption leaves the old file or none, never half of one."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as scratch:
        pass
    try:
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(state, scratch.name)
        os.replace(scratch.name, path)
    finally:
        Path(scratch.name).unlink(missing_ok=True)


def unwrap(content: Any) -> Any:
    """The state dict inside the usual wrappers ("state_dict", "model", ...) and without a leading "module."."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, Mapping) and content and all(str(key).startswith("module.") for key in content):
        content = {str(key).removeprefix("module."): value for key, value in content.items()}
    return content


def rename(state: State, rules: Iterable[tuple[str, str]]) -> State:
    """The state with every rule, a (regular expression, replacement) pair, applied to every key in order.

    >>> list(rename({"layers.0.fc": torch.ones(1)}, [(r"^layers\\.(\\d+)", r"stages.\\1")]))
    ['stages.0.fc']
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: State = {}
    for key, value in state.items():
        for pattern, replacement in compiled:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def _split(source: str | Path) -> tuple[str | Path, str]:
    """A source and the name behind its "#"; a path that exists is taken as it is."""
    before, mark, wanted = str(source).rpartition("#")
    return (before, wanted) if mark and wanted and not Path(source).expanduser().exists() else (source, "")


def _locate(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix in SUFFIXES)
        preferred = [entry for entry in found if entry.name in _HUB_FILES]
        if len(preferred or found) != 1:
            raise CheckpointError(f"{path} holds {len(found)} checkpoint files, name one: {[e.name for e in found]}")
        return (preferred or found)[0]
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise CheckpointError(f"{path} is not one of the known kinds of checkpoint: {', '.join(SUFFIXES)}")
        return path
    hub_id = _HUB_ID.fullmatch(str(source))
    if hub_id is None or path.suffix in SUFFIXES:
        raise CheckpointError(f"checkpoint {str(source)!r} is neither an existing file nor a hub id like 'user/model'")
    return _download(hub_id[1])


def _download(hub_id: str) -> Path:
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(hub_id)
        known = [name for name in _HUB_FILES if name in files] or [f for f in files if f.endswith(SUFFIXES)]
        if not known:
            raise CheckpointError(f"the hub repository {hub_id!r} holds no checkpoint file, only {files}")
        return Path(huggingface_hub.hf_hub_download(hub_id, known[0]))
    except CheckpointError:
        raise
    except Exception as error:
        # The hub client raises errors of several libraries; all of them mean that there is no such file to read.
        raise CheckpointError(
            f"checkpoint {hub_id!r} is no local file, and the hub did not give it ({_first_line(error)})"
        ) from error


def _tensors(content: Any, label: str) -> State:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{label} holds {type(content).__name__} instead of a dict of named tensors")
    strangers = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{label} holds more than tensors: {_some(strangers)}", unexpected=strangers)
    return {str(name): value for name, value in content.items()}


def _check_fits(model: nn.Module, converted: State, state: State, label: str) -> None:
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in converted]
    unexpected = [name for name in converted if name not in wanted]
    shapes = [
        f"{name} is {tuple(converted[name].shape)}, the model wants {tuple(wanted[name].shape)}"
        for name in wanted
        if name in converted and converted[name].shape != wanted[name].shape
    ]
    if not (missing or unexpected or shapes):
        return
    lines = [f"{label} does not fit {type(model).__name__}; the model is unchanged"]
    if missing or unexpected:
        lines.append(f"the file's keys start with {_prefixes(state)}, the model's with {_prefixes(wanted)}")
    if missing:
        lines.append(f"missing from the file: {_some(missing)}")
    if unexpected:
        lines.append(f"unknown to the model: {_some(unexpected)}")
    if shapes:
        lines.append(f"other shapes: {_some(shapes)}")
    raise CheckpointError("\n  ".join(lines), missing, unexpected)


def _prefixes(keys: Iterable[str]) -> str:
    return ", ".join(sorted({key.split(".")[0] for key in keys})[:_SHOWN])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
