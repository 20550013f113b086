"""Training a language model on long sequences: transformers' Trainer with the sequence sharded over ranks.

Under ``torchrun`` the processes form a mesh of data-parallel replicas and, inside each, the ranks that share a
sequence; Trainer's own data parallelism averages gradients over all of them. A run can be killed at any moment: started
again with the same output directory it goes on from the last complete checkpoint, with the same loss curve. When a
process dies or stalls the others end with an error that names it.

Source: "Sequence Parallelism: Long Sequence Training from System Perspective", arXiv 2105.13120.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, set_seed

from manyheads.data.language_models import load_language_model
from manyheads.data.text import documentation_split
from manyheads.engines.common import check_choice
from manyheads.models.runs import (
    HISTORY,
    KeepSettings,
    checkpoint_to_resume,
    common_arguments,
    logged_losses,
    on_cpu,
    write_record,
)
from manyheads.parallel.context_parallel import METHODS, context_parallel
from manyheads.parallel.wire import TIMEOUT, RankError, Wire, connect

_TEST_SEQUENCES = 8
_GRACE = 3.0  # seconds that processes have to say that they are alive when a launcher ends them all


@dataclass
class LanguageTraining:
    """What a training left behind.

    Attributes:
        model: name of the model that it began with.
        output: directory with the model (``save_pretrained``), ``training.json`` and the checkpoints.
        losses: (step, mean training loss in nats per token), over resumptions.
        test_loss: nats per token on text that was not trained on.
        steps: optimiser steps made.
        resumed_from: the checkpoint that this call went on from, or None.
        settings: everything needed to repeat the run.
        is_main_process: False on the other processes under ``torchrun``, which write and print nothing.
    """

    model: str
    output: str
    losses: list[tuple[int, float]]
    test_loss: float
    steps: int
    resumed_from: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    is_main_process: bool = True

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return dataclasses.asdict(self)


def train_language(
    model: str,
    data: str = "documentation",
    *,
    output: str | Path,
    ranks: int = 1,
    method: str = "ring",
    length: int = 512,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 1,
    lr: float | None = None,
    seed: int = 0,
    resume: bool = True,
    device: str = "auto",
    dtype: str = "float32",
    save_steps: int | None = None,
    progress: bool = True,
    timeout: int | float = TIMEOUT,
    callbacks: Sequence[TrainerCallback] = (),
) -> LanguageTraining:
    """Train a causal language model on windows of a text.

    Args:
        model: "smollm2", a directory or a hub id, as :func:`manyheads.data.language_models.load_language_model` takes.
        data: "documentation" (the running Python's help topics), or a UTF-8 text file, whose last tenth is the test.
        output: directory for checkpoints, the trained model and the record of the run.
        ranks: how many processes share a sequence; divides the number of processes, and the rest is data parallel.
        method: "ring", "token_ring" or "lasp2h", see :func:`manyheads.parallel.context_parallel`.
        length: N, tokens of a sequence, all ranks together.
        epochs: passes over the text.
        steps: optimiser steps; None makes as many as the epochs need.
        batch_size: sequences of a step and replica.
        lr: peak learning rate of AdamW, with a warm-up of a twentieth and a cosine; None takes 1e-4.
        seed: of the order of the sequences.
        resume: go on from the last complete checkpoint in ``output``, if there is one. False starts anew and refuses
            a directory that holds checkpoints.
        device: "auto", "cpu" or "cuda".
        dtype: "float32", or "bfloat16" and "float16" for mixed precision.
        save_steps: steps between checkpoints; None saves ten times in a run.
        progress: show progress bars.
        timeout: seconds after which a process that does not answer is an error on the others.
        callbacks: transformers' callbacks to run along.

    Raises:
        ValueError: unknown names, ranks that do not divide the processes, tokens that do not divide over the ranks, too
            little text, an output directory that holds another run.
        RankError: another process died, stalls or failed; the message names it.

    Source: arXiv 2105.13120.
    """
    world, output = int(os.environ.get("WORLD_SIZE", "1")), Path(output)
    check_choice("method", method, tuple(METHODS))
    if ranks < 1 or world % ranks:
        raise ValueError(
            f"{ranks} ranks cannot share a sequence among {world} process(es): start them with "
            f"torchrun --nproc-per-node {ranks}, or a multiple"
        )
    if length < 2 or length % (2 * ranks):
        raise ValueError(f"length={length} must be a multiple of {2 * ranks}, two chunks for each rank")
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("steps", 1 if steps is None else steps)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    use_cpu = on_cpu(device)
    set_seed(seed)
    network, tokenizer = load_language_model(model, dtype="float32")
    train, test = (_windows(tokenizer, text, length) for text in _texts(data))
    replicas = world // ranks
    if len(train) < batch_size * replicas or not len(test):
        raise ValueError(
            f"data {data!r} has {len(train)} sequences of {length} tokens to train on and {len(test)} to test; a step "
            f"takes {batch_size * replicas}"
        )
    order = _order(len(train), epochs, steps, batch_size * replicas, seed)
    total = len(order) // (batch_size * replicas)
    rate = 1e-4 if lr is None else lr
    settings = {
        "model": model, "data": data, "processes": world, "ranks": ranks, "method": method, "length": length,
        "steps": total, "batch_size": batch_size, "lr": rate, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    last = checkpoint_to_resume(output, settings, resume=resume)
    if use_cpu and world > 1 and not dist.is_initialized():
        # TrainingArguments would leave gloo its own limit of half an hour: it passes ddp_timeout on for GPUs only.
        dist.init_process_group("gloo", timeout=timedelta(seconds=max(1.0, float(timeout))))
    arguments = common_arguments(
        output,
        batch_size=batch_size,
        lr=rate,
        seed=seed,
        dtype=dtype,
        use_cpu=use_cpu,
        processes=world,
        progress=progress,
        max_steps=total,
        lr_scheduler_type="cosine",
        warmup_steps=total // 20,
        ddp_timeout=max(1, math.ceil(timeout)),
        average_tokens_across_devices=False,
        logging_steps=max(1, total // 50),
        save_strategy="steps",
        save_steps=save_steps or max(1, total // 10),
    )
    windows: Any = train
    trainer = _Trainer(
        model=network, args=arguments, train_dataset=windows, callbacks=[KeepSettings(settings), *callbacks]
    )
    trainer.order, trainer.ranks = order, ranks
    # The loss is a mean over all labels of the mesh already.
    trainer.model_accepts_loss_kwargs = False
    with _told_by_name(world, timeout), _sharded(network, world, ranks, use_cpu, method, timeout):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        test_loss = _test(network, test[:_TEST_SEQUENCES], trainer.accelerator.device)

    history = trainer.state.log_history
    result = LanguageTraining(
        model=model,
        output=str(output),
        losses=logged_losses(history),
        test_loss=test_loss,
        steps=int(trainer.state.global_step),
        resumed_from=None if last is None else str(last),
        settings=settings,
        is_main_process=trainer.is_world_process_zero(),
    )
    if result.is_main_process:
        network.save_pretrained(output)
        tokenizer.save_pretrained(output)
        write_record(output / HISTORY, result.to_dict())
    return result


class _Trainer(Trainer):
    """Gives the processes that share a sequence the same sequences."""

    order: list[int]
    ranks: int

    def get_train_dataloader(self) -> DataLoader:
        size = self.args.per_device_train_batch_size
        batches = [self.order[start : start + size] for start in range(0, len(self.order), size)]
        # Process p is given batches p, p + processes, ...: every batch comes once for each process that shares it.
        repeated = [batch for batch in batches for _ in range(self.ranks)]
        dataset: Any = self.train_dataset
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=repeated, collate_fn=_collate))  # pyright: ignore[reportArgumentType]


def _texts(data: str) -> tuple[str, str]:
    if data == "documentation":
        return documentation_split()
    path = Path(data).expanduser()
    if not path.is_file():
        raise ValueError(f"data {data!r} must be 'documentation' or a text file")
    text = path.read_text(encoding="utf-8")
    border = len(text) * 9 // 10
    return text[:border], text[border:]


def _windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """The text as rows of ``length`` tokens; what is left over at its end is dropped."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
    rows = len(ids) // length
    return ids[: rows * length].view(rows, length)


def _order(count: int, epochs: int, steps: int | None, batch: int, seed: int) -> list[int]:
    """The sequences of all steps, in another order in each epoch."""
    per_epoch = count // batch
    wanted = (epochs * per_epoch if steps is None else steps) * batch
    chosen: list[int] = []
    for epoch in range(-(-wanted // (per_epoch * batch))):
        generator = torch.Generator().manual_seed(seed + epoch)
        chosen += torch.randperm(count, generator=generator)[: per_epoch * batch].tolist()
    return chosen[:wanted]


def _collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def _test(network: nn.Module, rows: Tensor, device: torch.device) -> float:
    network.eval()
    losses = [float(network(input_ids=row[None].to(device), labels=row[None].to(device)).loss) for row in rows]
    return sum(losses) / len(losses)


@contextmanager
def _sharded(
    network: PreTrainedModel, world: int, ranks: int, use_cpu: bool, method: str, timeout: int | float
) -> Iterator[None]:
    if ranks == 1:
        yield
        return
    mesh = init_device_mesh("cpu" if use_cpu else "cuda", (world // ranks, ranks), mesh_dim_names=("dp", "cp"))
    with context_parallel(network, mesh, method=method, gradients="averaged", timeout=timeout):
        yield


@contextmanager
def _told_by_name(world: int, timeout: int | float) -> Iterator[None]:
    """Errors of collectives that are not ours (Trainer's) also name the process that died; it has time to be said."""
    if world == 1:
        yield
        return
    wire, _ = connect("train", None, timeout, lambda _: ({}, None))
    others = [rank for rank in range(wire.world) if rank != wire.rank]
    with _told_of_the_end():
        try:
            # One inside the other: the launcher's signal often comes while an error of the network is looked into.
            with _traced(wire, others):
                yield
        except _Ended:
            raise _dead(wire, others) or SystemExit(128 + signal.SIGTERM) from None


@contextmanager
def _traced(wire: Wire, others: list[int]) -> Iterator[None]:
    """Tell the other processes of an error, and find out who died where the network failed."""
    try:
        yield
    except _Ended:
        raise
    except RankError:
        wire._post({"waiting": others})
        raise
    except RuntimeError as problem:
        if not _of_the_network(problem):
            wire._post({"error": f"{type(problem).__name__}: {problem}"})
            raise
        with wire._watching(None):
            raise
    except BaseException as problem:
        wire._post({"error": f"{type(problem).__name__}: {problem}"})
        raise


def _dead(wire: Wire, others: list[int]) -> RankError | None:
    """Which ranks say nothing, of those that a launcher ends together."""
    wire._post({"waiting": others})
    time.sleep(_GRACE)
    silent = [rank for rank in others if wire._note(rank) is None]
    if not silent:
        return None
    names = " and ".join(wire._name(rank) for rank in silent)
    return RankError(
        f"train: {names} died (seen from {wire._name(wire.rank)}, which the launcher ended for it); start again with "
        "the same output directory to go on from the last checkpoint",
        silent,
    )


def _of_the_network(problem: RuntimeError) -> bool:
    text = str(problem).lower()
    return isinstance(problem, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection", "peer"))


class _Ended(BaseException):
    """The launcher wants this process to end."""


@contextmanager
def _told_of_the_end() -> Iterator[None]:
    """A launcher ends all processes when one died: let SIGTERM end the training by an exception, not the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ended(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        raise _Ended

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
