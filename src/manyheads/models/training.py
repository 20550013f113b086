"""Training a vision model: transformers' Trainer with timm's augmentations and the published recipe.

A run can be killed at any moment: started again with the same output directory it goes on from the last complete
checkpoint with the same random state, so that the loss curve is the one of an uninterrupted run. Under ``torchrun`` the
same call trains on several processes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from manyheads.engines.common import check_choice
from manyheads.layers.mixture_of_heads import collect_routing
from manyheads.models.balanced_classes import BalancedClasses
from manyheads.models.checkpoints import save_checkpoint
from manyheads.models.image_data import ImageData, load_images
from manyheads.models.image_trainer import ImageTrainer, TellEpoch, image_arguments
from manyheads.models.recipes import Recipe, recipe_for
from manyheads.models.registry import check_classifies, create_model
from manyheads.models.repeated_augmentation import RepeatedAugmentation
from manyheads.models.runs import (
    HISTORY,
    WEIGHTS,
    KeepSettings,
    checkpoint_to_resume,
    logged,
    logged_losses,
    on_cpu,
    plain,
    write_record,
)
from manyheads.models.schedule import cosine_schedule
from manyheads.models.transforms import fit_to_size, suitable_size, test_transform, train_transform
from manyheads.models.vision.token_robustness import attention_maps
from manyheads.models.weight_averaging import AVERAGED, AveragedWeights
from manyheads.objectives.diversification import attention_diversification_loss

# A loss of one's own: (images, targets, label smoothing) to (loss, logits).
Objective = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


@dataclass
class Training:
    """What a training left behind.

    Attributes:
        model: registered name.
        output: directory with ``model.safetensors`` (our layout; the averaged weights where the recipe has them),
            ``training.json`` and the checkpoints.
        losses: (step, training loss) in the order of the steps, over resumptions.
        accuracy: top-1 on the test part after each epoch, in [0, 1] (of the averaged weights, where there are any).
        steps: optimiser steps made.
        resumed_from: the checkpoint that this call went on from, or None.
        settings: everything needed to repeat the run.
        is_main_process: False on the other processes under ``torchrun``, which write and print nothing.
    """

    model: str
    output: str
    losses: list[tuple[int, float]]
    accuracy: list[float]
    steps: int
    resumed_from: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    is_main_process: bool = True

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return dataclasses.asdict(self)


def train_vision(
    model: str,
    data: str | ImageData,
    *,
    output: str | Path,
    epochs: int | None = None,
    batch_size: int = 64,
    lr: float | None = None,
    seed: int = 0,
    resume: bool = True,
    device: str = "auto",
    dtype: str = "float32",
    image_size: int | None = None,
    recipe: Recipe | None = None,
    save_steps: int | None = None,
    workers: int = 0,
    checkpoint: str | Path | None = None,
    diversification: float | None = None,
    model_options: dict[str, Any] | None = None,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    objective: Callable[[nn.Module], Objective] | None = None,
) -> Training:
    """Train a registered vision model as its paper does.

    Args:
        model: registered name ("davit_tiny").
        data: as in ``manyheads.models.image_data.load_images``.
        output: directory for checkpoints, final weights and the record of the run.
        epochs: passes over the training images; None takes the recipe's. Other lengths keep the recipe's share of
            epochs at the lowest rate.
        batch_size: images a step and process; even, because mixup pairs them.
        lr: peak learning rate as it is; None takes the recipe's, scaled to the images of a step over all processes.
        seed: of weights, order, augmentation and stochastic depth.
        resume: go on from the last complete checkpoint in ``output``, if there is one. False starts anew and refuses
            a directory that holds checkpoints.
        device: "auto", "cpu" or "cuda"; choose among several GPUs with CUDA_VISIBLE_DEVICES.
        dtype: "float32", or "bfloat16" and "float16" for mixed precision.
        image_size: side in pixels; None takes what suits the data, or the model.
        recipe: None takes ``recipe_for(model)``, softened for the embedded images.
        save_steps: steps between checkpoints; None saves one an epoch.
        workers: processes that load images; how many does not change the run.
        checkpoint: weights to start from.
        diversification: weight of the attention diversification loss (ADL); None takes the recipe's, 0 has none.
        model_options: of ``create_model``.
        progress: show progress bars.
        callbacks: transformers' callbacks to run along.
        objective: makes a loss for the network, and may freeze parts of it; None takes cross entropy.

    Raises:
        ValueError: unknown names, a model that classifies nothing, an odd batch, more images a step than there are, no
            training part, an output directory that holds another run, a negative weight of the ADL or a model that
            cannot show its attention.

    Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645; "BiFormer", arXiv 2303.08810.
    """
    check_classifies(model)
    output = Path(output)
    images = load_images(data, image_size=image_size) if isinstance(data, str) else data
    world = int(os.environ.get("WORLD_SIZE", "1"))
    train = images.train
    if train is None:
        raise ValueError(f"data {data!r} has no training part")
    if batch_size < 2 or batch_size % 2 or batch_size * world > len(train):
        raise ValueError(f"batch_size={batch_size} must be even, and {world} of them at most {len(train)} images")
    recipe = recipe or recipe_for(model, small_images=images.image_size is not None)
    if diversification is not None:
        recipe = dataclasses.replace(recipe, diversification=diversification)
    if recipe.diversification < 0:
        raise ValueError(f"diversification={recipe.diversification} must not be negative")
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    if lr is not None and lr <= 0:
        raise ValueError(f"lr={lr} must be positive")
    use_cpu = on_cpu(device)

    set_seed(seed)
    depth = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    options = {"num_classes": images.classes, **depth, **(model_options or {})}
    network = create_model(model, checkpoint=checkpoint, **options)
    size = image_size or suitable_size(network, images.image_size)
    fit_to_size(network, size)
    images.read_channels(getattr(network, "in_chans", 3))
    loss = objective(network) if objective is not None else None
    train.seed = seed
    train.transform, images.test.transform = (
        train_transform(network, size, recipe),
        test_transform(network, size, recipe),
    )

    settings = {
        "model": model, "data": data if isinstance(data, str) else "given", "epochs": epochs, "batch_size": batch_size,
        "processes": world, "seed": seed, "dtype": dtype, "image_size": size, "recipe": dataclasses.asdict(recipe),
        "lr": lr, "options": plain(options),
    }  # fmt: skip
    last = checkpoint_to_resume(output, settings, resume=resume, also=AVERAGED if recipe.ema else None)

    share = batch_size * world / 1024 if recipe.linear_scaling else 1.0
    rate = lr if lr is not None else recipe.lr * share
    per_epoch = len(train) // (batch_size * world)
    steps, cooldown = epochs * per_epoch, round(epochs * recipe.cooldown_epochs / recipe.epochs) * per_epoch
    arguments = image_arguments(
        output, epochs=epochs, batch_size=batch_size, lr=rate, max_grad_norm=recipe.clip_grad or math.inf, dtype=dtype,
        use_cpu=use_cpu, processes=world, seed=seed, steps=steps, save_steps=save_steps, workers=workers,
        progress=progress,
    )  # fmt: skip
    mix = None
    if recipe.mixup or recipe.cutmix:
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=images.classes)
    optimizer = make_optimizer(network, rate, recipe.weight_decay, recipe.optimizer)
    schedule = cosine_schedule(
        optimizer, steps=steps, cooldown=cooldown,
        warmup=min(recipe.warmup_epochs * per_epoch, (steps - cooldown) // 2),
        warmup_lr=min(recipe.warmup_lr / recipe.lr, 1.0), min_lr=min(recipe.min_lr * share / rate, 1.0),
    )  # fmt: skip
    order = None
    if recipe.balanced:
        order = BalancedClasses(train.labels(), steps=per_epoch, batch_size=batch_size * world, seed=seed)
    elif recipe.repeats > 1:
        order = RepeatedAugmentation(
            len(train), repeats=recipe.repeats, batch_size=batch_size, processes=world, seed=seed
        )
    averaged = AveragedWeights(network, recipe.ema, last)
    trainer = ImageTrainer(
        order,
        averaged,
        model=_Classifier(network, recipe, mix, loss),
        args=arguments,
        train_dataset=train,
        eval_dataset=images.test,
        compute_metrics=_accuracy,
        optimizers=(optimizer, schedule),
        callbacks=[
            KeepSettings(settings),
            TellEpoch(train, network),
            _AdaptiveClip(network, recipe.adaptive_clip),
            averaged,
            *callbacks,
        ],
    )
    trainer.train(resume_from_checkpoint=None if last is None else str(last))

    history = trainer.state.log_history
    result = Training(
        model=model,
        output=str(output),
        losses=logged_losses(history),
        accuracy=logged(history, "eval_accuracy"),
        steps=int(trainer.state.global_step),
        resumed_from=None if last is None else str(last),
        settings=settings,
        is_main_process=trainer.is_world_process_zero(),
    )
    if trainer.is_world_process_zero():
        with averaged.instead():
            save_checkpoint(network, output / WEIGHTS)
        write_record(output / HISTORY, result.to_dict())
    return result


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, optimizer: str = "adamw") -> torch.optim.Optimizer:
    """AdamW or SGD ("sgd") without decay on biases, norms and what ``model.no_weight_decay()`` names.

    Parameters that ``model.lr_scales()`` names learn at that share of the rate, through the whole schedule.
    """
    scales = getattr(model, "lr_scales", dict)()
    by_tensor = {id(parameter): scales.get(name, 1.0) for name, parameter in model.named_parameters()}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        kept = getattr(model, "no_weight_decay", set)()
        return [
            {**group, "params": chosen, "lr": lr * scale}
            for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=kept)
            for scale in sorted({1.0, *scales.values()}, reverse=True)
            if (chosen := [parameter for parameter in group["params"] if by_tensor[id(parameter)] == scale])
        ]

    check_choice("optimizer", optimizer, ("adamw", "sgd"))
    return create_optimizer_v2(model, optimizer, lr=lr, weight_decay=weight_decay, param_group_fn=groups)


class _Classifier(nn.Module):
    """A vision model that speaks the trainer's language; while it trains, it mixes images and targets."""

    def __init__(
        self, network: nn.Module, recipe: Recipe, mix: Mixup | None, objective: Objective | None = None
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.mix, self.objective = network, recipe, mix, objective

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        targets, smoothing = labels, self.recipe.label_smoothing if self.training else 0.0
        if self.training and self.mix is not None:
            # On a copy, because timm mixes in place; its targets are smooth already.
            pixel_values, targets = self.mix(pixel_values.clone(), labels)
            smoothing = 0.0
        if self.training and self.objective is not None:
            loss, logits = self.objective(pixel_values, targets, smoothing)
            return {"loss": loss, "logits": logits}
        if self.training and hasattr(self.network, "training_loss"):
            # Several outputs, and a loss of the model's own.
            outputs = self.network(pixel_values)
            loss = cast(Any, self.network).training_loss(outputs, targets, label_smoothing=smoothing)
            return {"loss": loss, "logits": outputs[-1]}
        diverse = self.training and self.recipe.diversification > 0
        with (
            attention_maps(self.network) if diverse else nullcontext([]) as maps,
            collect_routing(self.network) as routing,
        ):
            logits = self.network(pixel_values)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if diverse:
            loss = loss + self.recipe.diversification * attention_diversification_loss(maps)
        if self.training and routing:
            loss = loss + self.recipe.head_balance * routing.balance_loss()
        return {"loss": loss, "logits": logits}


class _AdaptiveClip(TrainerCallback):
    """Before a step, shorten the gradient's rows that are long beside their weights; not the classifier's."""

    def __init__(self, network: nn.Module, largest: float) -> None:
        last = {id(parameter) for parameter in cast(Any, network).get_classifier().parameters()} if largest else set()
        self.parameters = [parameter for parameter in network.parameters() if id(parameter) not in last]
        self.largest = largest

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.largest:
            adaptive_clip_grad(self.parameters, clip_factor=self.largest)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(-1) == prediction.label_ids).mean())}
