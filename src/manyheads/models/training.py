"""Training a vision model: transformers' Trainer with timm's augmentations and the published recipe.

A run can be killed at any moment: started again with the same output directory it goes on from the last complete
checkpoint with the same random state, so that the loss curve is the one of an uninterrupted run. Under ``torchrun`` the
same call trains on several processes.
"""

from __future__ import annotations

import dataclasses
import json
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
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torchvision import transforms
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from manyheads.engines.common import check_choice
from manyheads.layers.mixture_of_heads import collect_routing
from manyheads.models.checkpoints import save_checkpoint
from manyheads.models.image_data import ImageData, LabelledImages, load_images
from manyheads.models.patch_augmentation import augment_patches
from manyheads.models.recipes import Recipe, recipe_for
from manyheads.models.registry import check_classifies, create_model
from manyheads.models.repeated_augmentation import RepeatedAugmentation
from manyheads.models.schedule import cosine_schedule
from manyheads.models.vision.token_robustness import attention_inputs
from manyheads.models.weight_averaging import AVERAGED, AveragedWeights
from manyheads.objectives.diversification import attention_diversification_loss

# A loss of one's own: (images, targets, label smoothing) to (loss, logits).
Objective = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]

WEIGHTS, HISTORY = "model.safetensors", "training.json"


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
    if not 0 <= recipe.patch_augmentation <= 1:
        raise ValueError(f"patch_augmentation={recipe.patch_augmentation} must be a probability")
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    if lr is not None and lr <= 0:
        raise ValueError(f"lr={lr} must be positive")
    use_cpu = _on_cpu(device)

    set_seed(seed)
    depth = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    options = {"num_classes": images.classes, **depth, **(model_options or {})}
    network = create_model(model, checkpoint=checkpoint, **options)
    size = image_size or suitable_size(network, images.image_size)
    fit_to_size(network, size)
    loss = objective(network) if objective is not None else None
    train.seed = seed
    train.transform, images.test.transform = (
        train_transform(network, size, recipe),
        test_transform(network, size, recipe),
    )

    settings = {
        "model": model, "data": data if isinstance(data, str) else "given", "epochs": epochs, "batch_size": batch_size,
        "processes": world, "seed": seed, "dtype": dtype, "image_size": size, "recipe": dataclasses.asdict(recipe),
        "lr": lr, "options": {name: _plain(value) for name, value in options.items()},
    }  # fmt: skip
    last = _last_checkpoint(output, averaged=recipe.ema > 0)
    if last is not None and not resume:
        raise ValueError(f"{output} holds checkpoints of another run; choose another directory, or resume")
    if last is not None:
        _check_same_run(output, settings)

    share = batch_size * world / 1024 if recipe.linear_scaling else 1.0
    rate = lr if lr is not None else recipe.lr * share
    per_epoch = len(train) // (batch_size * world)
    steps, cooldown = epochs * per_epoch, round(epochs * recipe.cooldown_epochs / recipe.epochs) * per_epoch
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=rate,
        max_grad_norm=recipe.clip_grad or math.inf,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and world > 1 else None,
        ddp_find_unused_parameters=False,
        seed=seed,
        data_seed=seed,
        dataloader_drop_last=True,
        dataloader_num_workers=workers,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="steps",
        logging_steps=max(1, steps // (50 * epochs)),
        logging_nan_inf_filter=False,
        eval_strategy="epoch",
        save_strategy="epoch" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        save_total_limit=2,
        disable_tqdm=not progress,
        report_to="none",
    )
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
    if recipe.repeats > 1:
        order = RepeatedAugmentation(
            len(train), repeats=recipe.repeats, batch_size=batch_size, processes=world, seed=seed
        )
    averaged = AveragedWeights(network, recipe.ema, last)
    trainer = _Trainer(
        order,
        averaged,
        model=_Classifier(network, recipe, mix, loss),
        args=arguments,
        data_collator=_collate,
        train_dataset=train,
        eval_dataset=images.test,
        compute_metrics=_accuracy,
        optimizers=(optimizer, schedule),
        callbacks=[
            _Record(settings, train, network),
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
        losses=[(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry],
        accuracy=[float(entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry],
        steps=int(trainer.state.global_step),
        resumed_from=None if last is None else str(last),
        settings=settings,
        is_main_process=trainer.is_world_process_zero(),
    )
    if trainer.is_world_process_zero():
        with averaged.instead():
            save_checkpoint(network, output / WEIGHTS)
        _write(output / HISTORY, result.to_dict())
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


def train_transform(model: nn.Module, size: int, recipe: Recipe) -> Callable:
    """timm's random crop, flip, RandAugment and erasing, with the model's mean and deviation.

    A recipe with ``crop_padding`` has a shifted crop and a flip instead, which timm does not offer.
    """
    config = getattr(model, "pretrained_cfg", {})
    if recipe.crop_padding:
        return transforms.Compose(
            [
                transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC),
                transforms.RandomCrop(size, recipe.crop_padding),
                transforms.RandomHorizontalFlip(recipe.hflip),
                transforms.ToTensor(),
                transforms.Normalize(
                    config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
                ),
            ]
        )
    return create_transform(  # pyright: ignore[reportReturnType]
        (3, size, size),
        is_training=True,
        scale=(recipe.crop_scale, 1.0),
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment or None,
        interpolation="bicubic",
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        **_statistics(config),
    )


def test_transform(model: nn.Module, size: int, recipe: Recipe) -> Callable:
    """timm's resizing (of the shorter side or of both, as the authors do) and central crop, mean and deviation."""
    config = getattr(model, "pretrained_cfg", {})
    return create_transform(  # pyright: ignore[reportReturnType]
        (3, size, size), interpolation="bicubic", crop_pct=recipe.crop_pct,
        crop_mode=config.get("crop_mode") or "center", **_statistics(config),
    )  # fmt: skip


class _Classifier(nn.Module):
    """A vision model that speaks the trainer's language; while it trains, it mixes images and targets."""

    def __init__(
        self, network: nn.Module, recipe: Recipe, mix: Mixup | None, objective: Objective | None = None
    ) -> None:
        super().__init__()
        self.network, self.recipe, self.mix, self.objective = network, recipe, mix, objective

    def mixed(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images and their targets (images, classes), which are smooth already; without a mix, both as given."""
        # On a copy, because timm mixes in place.
        return (pixel_values, labels) if self.mix is None else self.mix(pixel_values.clone(), labels)

    def forward(self, pixel_values: Tensor, labels: Tensor, diverse: bool = True) -> dict[str, Tensor]:
        """The loss, without the ADL where not ``diverse``, and the logits. Images with targets are mixed already."""
        targets = labels
        if self.training and labels.ndim == 1:
            pixel_values, targets = self.mixed(pixel_values, labels)
        smoothing = self.recipe.label_smoothing if self.training and targets.ndim == 1 else 0.0
        if self.training and self.objective is not None:
            loss, logits = self.objective(pixel_values, targets, smoothing)
            return {"loss": loss, "logits": logits}
        if self.training and hasattr(self.network, "training_loss"):
            # Several outputs, and a loss of the model's own.
            outputs = self.network(pixel_values)
            loss = cast(Any, self.network).training_loss(outputs, targets, label_smoothing=smoothing)
            return {"loss": loss, "logits": outputs[-1]}
        diverse = diverse and self.training and self.recipe.diversification > 0
        with (
            attention_inputs(self.network) if diverse else nullcontext([]) as attention,
            collect_routing(self.network) as routing,
        ):
            logits = self.network(pixel_values)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if diverse:
            loss = loss + self.recipe.diversification * attention_diversification_loss(attention)
        if self.training and routing:
            loss = loss + self.recipe.head_balance * routing.balance_loss()
        return {"loss": loss, "logits": logits}


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


class _Trainer(Trainer):
    """The trainer with an order of images of its own and, where they are kept, judging by the averaged weights.

    Where the recipe augments patches, a step has a second pass on images with augmented patches, mixed alike.
    It judges by every test image: only training leaves an incomplete last batch out.
    """

    def __init__(self, order: RepeatedAugmentation | None, averaged: AveragedWeights, **options: Any) -> None:
        super().__init__(**options)
        self.order, self.averaged = order, averaged

    def _get_train_sampler(self, *args: Any) -> Any:
        return super()._get_train_sampler(*args) if self.order is None else self.order

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        classifier = cast(_Classifier, self.model)
        probability = classifier.recipe.patch_augmentation
        if not probability:
            return super().training_step(model, inputs, *args, **options)
        pixels, targets = classifier.mixed(**self._prepare_inputs(inputs))
        loss = super().training_step(model, {"pixel_values": pixels, "labels": targets}, *args, **options)
        patches = augment_patches(pixels, probability=probability)
        second = {"pixel_values": patches, "labels": targets, "diverse": False}
        return loss + super().training_step(model, second, *args, **options)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with self.averaged.instead():
            return super().evaluate(*args, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True


class _AdaptiveClip(TrainerCallback):
    """Before a step, shorten the gradient's rows that are long beside their weights; not the classifier's."""

    def __init__(self, network: nn.Module, largest: float) -> None:
        last = {id(parameter) for parameter in cast(Any, network).get_classifier().parameters()} if largest else set()
        self.parameters = [parameter for parameter in network.parameters() if id(parameter) not in last]
        self.largest = largest

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.largest:
            adaptive_clip_grad(self.parameters, clip_factor=self.largest)


class _Record(TrainerCallback):
    """Keep the settings beside the checkpoints, to tell another run from a resumption; tell images and model the epoch.

    A model with ``frozen_parameters(epoch)`` says which of its parameters do not learn in an epoch.
    """

    def __init__(self, settings: dict[str, Any], train: LabelledImages, network: nn.Module) -> None:
        self.settings, self.train, self.network = settings, train, network

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        frozen: Any = getattr(self.network, "frozen_parameters", None)
        for parameter in frozen(self.train.epoch) if frozen else ():
            parameter.grad = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run counts in fractions of an epoch.
        self.train.epoch = int((state.epoch or 0) + 1e-6)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            _write(Path(args.output_dir) / "settings.json", self.settings)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(-1) == prediction.label_ids).mean())}


def _last_checkpoint(output: Path, *, averaged: bool) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state comes last, but for averaged weights."""
    found = []
    for path in output.glob("checkpoint-*"):
        try:
            step = int(json.loads((path / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        if not averaged or (path / AVERAGED).is_file():
            found.append((step, path))
    return max(found)[1] if found else None


def _check_same_run(output: Path, settings: dict[str, Any]) -> None:
    try:
        before = json.loads((output / "settings.json").read_text())
    except (OSError, ValueError):
        return
    changed = [name for name, value in settings.items() if before.get(name) != json.loads(json.dumps(value))]
    if changed:
        told = ", ".join(f"{name}: {before.get(name)} then, {settings[name]} now" for name in changed)
        raise ValueError(f"{output} holds a run with other settings ({told}); choose another output directory")


def _write(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1))
    os.replace(scratch, path)


def _on_cpu(device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={device!r} must be auto, cpu or cuda; choose a GPU with CUDA_VISIBLE_DEVICES")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no CUDA device")
    return device == "cpu" or not torch.cuda.is_available()


def fit_to_size(model: nn.Module, size: int) -> None:
    """Resize what belongs to one image size in models that take no other (position embeddings and the like)."""
    config = getattr(model, "pretrained_cfg", {})
    if config.get("fixed_input_size") and size != _model_size(model):
        cast(Any, model).set_input_size((size, size))


def suitable_size(model: nn.Module, image_size: int | None) -> int:
    """The side that suits the images, or the model's smallest if that is larger; None takes the model's own."""
    least = getattr(model, "pretrained_cfg", {}).get("min_input_size") or (0,)
    return _model_size(model) if image_size is None else max(image_size, least[-1])


def _model_size(model: nn.Module) -> int:
    return int(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1])


def _statistics(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config[name] for name in ("mean", "std") if name in config}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
