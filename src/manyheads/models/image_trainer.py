"""transformers' Trainer for images: an order of its own, judging by averaged weights and by every test image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from manyheads.models.image_data import LabelledImages
from manyheads.models.runs import common_arguments
from manyheads.models.weight_averaging import AveragedWeights


class ImageTrainer(Trainer):
    """Only training leaves an incomplete last batch out.

    Args:
        order: of the training images; None shuffles them.
        averaged: what the network is judged by, where it keeps an average.
        options: of transformers' Trainer.
    """

    def __init__(self, order: Sampler | None, averaged: AveragedWeights, **options: Any) -> None:
        super().__init__(data_collator=_collate, **options)
        self.order = order
        self.averaged = averaged

    def _get_train_sampler(self, *args: Any) -> Any:
        return super()._get_train_sampler(*args) if self.order is None else self.order

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with self.averaged.instead():
            return super().evaluate(*args, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True


class TellEpoch(TrainerCallback):
    """Tell the images which epoch it is, and let a model with ``frozen_parameters(epoch)`` keep those as they are."""

    def __init__(self, train: LabelledImages, network: nn.Module) -> None:
        self.train, self.network = train, network

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run counts in fractions of an epoch.
        self.train.epoch = int((state.epoch or 0) + 1e-6)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        frozen: Any = getattr(self.network, "frozen_parameters", None)
        for parameter in frozen(self.train.epoch) if frozen else ():
            parameter.grad = None


def image_arguments(
    output: Path, *, epochs: int, batch_size: int, seed: int, use_cpu: bool, steps: int, save_steps: int | None,
    workers: int, **more: Any,
) -> TrainingArguments:  # fmt: skip
    """The trainer's arguments for images: judged every epoch, about fifty losses logged in one."""
    return common_arguments(
        output,
        batch_size=batch_size,
        seed=seed,
        use_cpu=use_cpu,
        num_train_epochs=epochs,
        per_device_eval_batch_size=batch_size,
        data_seed=seed,
        dataloader_drop_last=True,
        dataloader_num_workers=workers,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=max(1, steps // (50 * epochs)),
        eval_strategy="epoch",
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        **more,
    )


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}
