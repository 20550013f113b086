"""A classifier trained on handwritten digits for a minute: the miniature on which vision claims are judged."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.data.images import digits
from manyheads.reproduce.claims import Finding, Verdict


def accuracy_on_digits(build: Callable[[], nn.Module], seed: int, **options: Any) -> float:
    """Test accuracy of a model that ``train_on_digits`` makes with these options."""
    return accuracy(*train_on_digits(build, seed, **options))


def train_on_digits(
    build: Callable[[], nn.Module], seed: int, *, size: int = 32, epochs: int = 8, **options: Any
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model trained on digits, and the images and labels of the test part.

    Args:
        build: makes the model; called under ``seed``.
        seed: of the weights, of the split and of the order of the images.
        size: side of the images in pixels.
        epochs: passes over the 1,442 training images.
        options: of ``train_classifier``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images, labels, test_images, test_labels = digits(size, seed=seed)
        model = build()
        train_classifier(model, images, labels, epochs=epochs, **options)
    return model, test_images, test_labels


def train_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.05,
    constant_rate: bool = False,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Train a model by AdamW with clipped gradients, under the global seed; it is left in evaluation mode.

    Args:
        model: maps images to logits.
        images: (images, channels, height, width).
        labels: (images).
        epochs: passes over the images.
        batch: images a step.
        learning_rate: the peak of a one-cycle schedule.
        weight_decay: of AdamW.
        constant_rate: keep the rate at its peak throughout.
        loss: of model, images and labels; None is the cross entropy.
    """
    loss = loss or _cross_entropy
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * (len(labels) // batch)
    schedule = None
    if not constant_rate:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        if step % (len(labels) // batch) == 0:
            order = torch.randperm(len(labels)).split(batch)
        chosen = order[step % (len(labels) // batch)]
        loss(model, images[chosen], labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that a model names rightly."""
    with torch.inference_mode():
        guesses = torch.cat([model(part).argmax(-1) for part in images.split(128)])
    return (guesses == labels).float().mean().item()


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def margin_of(scores: dict[str, list[float]]) -> float:
    """Twice the standard error of a difference of two means over seeds, from the spread pooled over all models."""
    pooled = mean(stdev(values) ** 2 for values in scores.values()) ** 0.5
    return 2 * pooled * (2 / len(next(iter(scores.values())))) ** 0.5


def compare(scores: dict[str, list[float]], ours: str, rivals: tuple[str, ...]) -> Finding:
    """Whether ``ours`` keeps up with its rivals, judged by means over seeds and their standard errors.

    The margin is twice the standard error of a difference of two means, from the spread pooled over all models.
    Confirmed: ours is no more than the margin below the best rival. Refuted: ours is below *every* rival by more than
    the margin. Inconclusive otherwise.
    """
    means = {name: mean(values) for name, values in scores.items()}
    margin = margin_of(scores)
    best, worst = max(means[name] for name in rivals), min(means[name] for name in rivals)
    verdict = Verdict.INCONCLUSIVE
    if means[ours] >= best - margin:
        verdict = Verdict.CONFIRMED
    elif means[ours] < worst - margin:
        verdict = Verdict.REFUTED
    baseline = {name: round(means[name], 4) for name in rivals}
    return Finding(round(means[ours], 4), baseline, verdict, {"per_seed": scores, "margin": margin})
