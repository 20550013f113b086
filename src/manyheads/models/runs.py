"""What all trainings share: how a run is recorded, recognised and continued, and the trainer's common arguments.

A run's directory holds ``settings.json`` (to tell another run from a resumption), ``checkpoint-*`` and, at the end,
``model.safetensors`` and ``training.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from manyheads.data.files import write_atomically

WEIGHTS, HISTORY, SETTINGS = "model.safetensors", "training.json", "settings.json"


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, all or nothing."""
    write_atomically(path, json.dumps(content, indent=1))


class KeepSettings(TrainerCallback):
    """Write the settings beside the checkpoints when training begins."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_record(Path(args.output_dir) / SETTINGS, self.settings)


def checkpoint_to_resume(
    output: Path, settings: dict[str, Any], *, resume: bool, also: str | None = None
) -> Path | None:
    """The newest complete checkpoint in ``output``, or None to begin anew.

    Args:
        output: directory of the run.
        settings: those of the run that wants to go on.
        resume: False begins anew.
        also: a file that a complete checkpoint holds too; the trainer's state, which is written last but for callbacks'
            files, is asked for in any case.

    Raises:
        ValueError: checkpoints in spite of ``resume=False``, or of a run with other settings (they are named).
    """
    found = []
    for path in output.glob("checkpoint-*"):
        try:
            step = int(json.loads((path / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        if also is None or (path / also).is_file():
            found.append((step, path))
    if not found:
        return None
    if not resume:
        raise ValueError(f"{output} holds checkpoints of another run; choose another directory, or resume")
    try:
        before = json.loads((output / SETTINGS).read_text())
    except (OSError, ValueError):
        before = None
    if before is not None:
        changed = [name for name, value in settings.items() if before.get(name) != json.loads(json.dumps(value))]
        if changed:
            told = ", ".join(f"{name}: {before.get(name)} then, {settings[name]} now" for name in changed)
            raise ValueError(f"{output} holds a run with other settings ({told}); choose another output directory")
    return max(found)[1]


def common_arguments(
    output: Path, *, batch_size: int, lr: float, seed: int, dtype: str, use_cpu: bool, processes: int, progress: bool,
    **more: Any,
) -> TrainingArguments:  # fmt: skip
    """transformers' arguments that are the same for every kind of model."""
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        seed=seed,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        save_total_limit=2,
        disable_tqdm=not progress,
        report_to="none",
        **more,
    )


def logged(history: list[dict[str, Any]], name: str) -> list[float]:
    """The values that the trainer logged under a name, in order."""
    return [float(entry[name]) for entry in history if name in entry]


def logged_losses(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, training loss) in the order of the steps."""
    return [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]


def on_cpu(device: str) -> bool:
    """Whether to train on the CPU; ValueError for other devices than "auto", "cpu" and "cuda", or a missing one."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} must be auto, cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no CUDA device")
    return device == "cpu" or not torch.cuda.is_available()


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options with lists for tuples, as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
