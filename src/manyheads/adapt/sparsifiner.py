"""Sparsifiner's training: a dense vision transformer becomes one that computes only the pairs its predictors choose.

    dense      only where no weights are given: the backbone itself, by DeiT's recipe
    phase 1    predictors alone learn to reconstruct the dense model's attention
    phase 2    the backbone learns to live with the masks, against the dense model as teacher; predictors stand still

Source: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.models.image_data import EMBEDDED
from manyheads.models.recipes import Recipe, recipe_for
from manyheads.models.registry import create_model
from manyheads.models.runs import WEIGHTS
from manyheads.models.training import Objective, Training, train_vision
from manyheads.models.vision.sparsifiner import Sparsifiner
from manyheads.objectives.sparse_attention import score_reconstruction, teacher_losses


def train_sparsifiner(
    model: str,
    data: str,
    *,
    output: str | Path,
    checkpoint: str | Path | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    self_distillation: float = 0.0,
    model_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Training:
    """Both phases, after training the dense model where no weights of it are given.

    Args:
        model: "sparsifiner_deit_small" or "sparsifiner_lvvit_small".
        data: as in ``manyheads.models.image_data.load_images``.
        output: directory of phase 2 and its weights; phase 1 leaves its own in ``predictor``, the dense model in
            ``dense`` below it.
        checkpoint: weights of the dense model (DeiT-S, LV-ViT-S), which is also the teacher.
        epochs: of phase 2 (45), and of the dense model; phase 1 takes a ninth of them, as 5 of 50 are published.
        lr: peak learning rate of phase 2.
        self_distillation: weight of comparing scores with the model's own attention in phase 2 (0.002 in the paper's
            code, where it is off); predictors then go on learning.
        model_options: of ``create_model``.
        settings: the other arguments of ``manyheads.models.training.train_vision``.

    Returns:
        The record of phase 2.

    Raises:
        ValueError: as ``train_vision``; a model that is no Sparsifiner.

    Source: arXiv 2303.13755, section 4.
    """
    if not model.removeprefix("manyheads_").startswith("sparsifiner_"):
        raise ValueError(f"model={model!r} has no predictors to train; take sparsifiner_deit_small or ..._lvvit_small")
    output, options, small = Path(output), dict(model_options or {}), data in EMBEDDED
    run = partial(train_vision, model, data, **settings)
    if checkpoint is None:
        dense = {**options, "sparse": False}
        recipe = recipe_for("deit", small_images=small)
        trained = run(output=output / "dense", recipe=recipe, epochs=epochs, model_options=dense)
        checkpoint = output / "dense" / WEIGHTS
        # At the size of its weights, which would otherwise be resized on the way.
        options["img_size"] = trained.settings["image_size"]
    teacher = partial(_teacher, model, checkpoint, options)
    first, second = _recipes(model, small)
    trained = run(
        output=output / "predictor", recipe=first, checkpoint=checkpoint, model_options=options,
        epochs=None if epochs is None else max(1, epochs // 9), objective=lambda net: reconstruct(net, teacher(net)),
    )  # fmt: skip
    options["img_size"] = trained.settings["image_size"]
    return run(
        output=output, recipe=second, checkpoint=output / "predictor" / WEIGHTS, model_options=options, epochs=epochs,
        lr=lr, objective=lambda net: fine_tune(net, teacher(net), self_distillation=self_distillation),
    )  # fmt: skip


def reconstruct(network: nn.Module, teacher: nn.Module, *, weight: float = 0.01) -> Objective:
    """Phase 1: freeze all but the predictors of ``network``, and compare their scores with the teacher's attention.

    Returns:
        A function (images, targets, label_smoothing) to (loss, logits).
    """
    student = _phase(network, predictors=True)

    def objective(images: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        found, real = student.inspect(images), _look(teacher, images)
        scores = [layer.prediction.scores for layer in found.layers if layer.prediction is not None]
        return weight * score_reconstruction(scores, [layer.unmasked for layer in real.layers]), found.logits

    return objective


def fine_tune(
    network: nn.Module,
    teacher: nn.Module,
    *,
    classes: float = 0.5,
    tokens: float = 0.5,
    self_distillation: float = 0.0,
) -> Objective:
    """Phase 2: freeze the predictors of ``network``; cross entropy, the teacher's classes and tokens are the loss.

    Args:
        network: a Sparsifiner.
        teacher: the dense model.
        classes: weight of the divergence of classes.
        tokens: weight of the squared differences of patch tokens.
        self_distillation: weight of the predictors' comparison with the network's own attention; above 0 they learn.

    Returns:
        A function (images, targets, label_smoothing) to (loss, logits).
    """
    student = _phase(network, predictors=False)
    if self_distillation:
        student.requires_grad_(True)

    def objective(images: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        found, real = student.inspect(images), _look(teacher, images)
        loss = F.cross_entropy(found.logits.float(), targets, label_smoothing=smoothing)
        kept = found.layers[-1].token_mask
        divergence, error = teacher_losses(found.logits, real.logits, found.features, real.features, kept)
        loss = loss + classes * divergence + tokens * error
        if self_distillation:
            scores = [layer.prediction.scores for layer in found.layers if layer.prediction is not None]
            own = score_reconstruction(scores, [layer.unmasked for layer in found.layers])
            loss = loss + self_distillation * own
        return loss, found.logits

    return objective


def _recipes(model: str, small: bool) -> tuple[Recipe, Recipe]:
    second = recipe_for(model, small_images=small)
    if small:
        # Two dozen steps a pass: the rates of ImageNet would not move the predictors.
        return dataclasses.replace(second, epochs=2, lr=3e-3, min_lr=2e-3, linear_scaling=False), second
    return dataclasses.replace(second, epochs=5, lr=3e-4, min_lr=2e-4), second


def _phase(network: nn.Module, *, predictors: bool) -> Sparsifiner:
    if not isinstance(network, Sparsifiner) or not network.options["sparse"]:
        raise ValueError(f"{type(network).__name__} has no predictors to train")
    network.train_predictors(predictors)
    return network


def _teacher(model: str, checkpoint: str | Path, options: dict[str, Any], network: nn.Module) -> nn.Module:
    student = network if isinstance(network, Sparsifiner) else _phase(network, predictors=False)
    sized = {**options, "sparse": False, "num_classes": student.num_classes, "img_size": student.image}
    return create_model(model, checkpoint=checkpoint, **sized).eval().requires_grad_(False)


def _look(teacher: nn.Module, images: Tensor) -> Any:
    with torch.no_grad():
        return _dense(teacher.to(images.device)).inspect(images)


def _dense(teacher: nn.Module) -> Sparsifiner:
    if not isinstance(teacher, Sparsifiner) or teacher.options["sparse"]:
        raise ValueError("the teacher must be the dense model, made with sparse=False")
    return teacher
