"""Evaluating a model with early exits: each exit on its own, a sweep of budgets, and real inference within a budget.

Thresholds are set on images of the training part, seen as in evaluation; accuracies are those on the test part.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from manyheads.models.early_exit import (
    BUDGETS,
    EarlyExit,
    confidences,
    exit_fractions,
    find_thresholds,
    leaving,
)
from manyheads.models.evaluation import DTYPES, count_flops, prepare
from manyheads.models.image_data import ImageData

EXITS = 4
CALIBRATION = 5000
_CHEAPEST, _DEAREST, _HALVINGS = 1e-3, 1e3, 40


@dataclass(frozen=True)
class ExitPoint:
    """One exit, taken by all images (anytime prediction).

    Attributes:
        top1: accuracy in [0, 1].
        flops: floating-point operations of an image up to this exit, those of the exits before included.
    """

    top1: float
    flops: int


@dataclass(frozen=True)
class BudgetPoint:
    """Thresholds, and what they give (budgeted prediction of a batch).

    Attributes:
        p: the number that spans the budgets, see ``manyheads.models.early_exit.exit_fractions``.
        thresholds: confidence from which an image leaves, for each exit.
        shares: which share of the test images leaves where.
        flops: mean floating-point operations of a test image.
        top1: accuracy in [0, 1].
    """

    p: float
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    flops: float
    top1: float


@dataclass(frozen=True)
class ExitEvaluation:
    """What ``evaluate_exits`` measured.

    Attributes:
        model: registered name.
        images: test images.
        calibration_images: images that set the thresholds.
        image_size: side in pixels.
        exits: each exit on its own.
        curve: the authors' 33 budgets.
        chosen: the point for the budget asked for, from inference that really stops; None without a budget.
        images_per_second: of that inference, without loading; None without a budget.
        static_images_per_second: of the whole model on the same batches; None without a budget.
    """

    model: str
    images: int
    calibration_images: int
    image_size: int
    exits: tuple[ExitPoint, ...]
    curve: tuple[BudgetPoint, ...]
    chosen: BudgetPoint | None = None
    images_per_second: float | None = None
    static_images_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return dataclasses.asdict(self)


def evaluate_exits(
    model: str | nn.Module,
    data: str | ImageData,
    *,
    budget: int | float | None = None,
    checkpoint: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: int | None = None,
    limit: int | None = None,
    workers: int = 0,
    model_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> ExitEvaluation:
    """Measure a model with early exits on the test part of labelled images.

    Args:
        model: registered name, or a model with ``forward_exits`` and ``step``.
        data, checkpoint, batch_size, device, dtype, image_size, workers, model_options, progress: as in
            ``manyheads.models.evaluation.evaluate_vision``.
        budget: mean floating-point operations an image may take (a multiply-add counts two); the thresholds that come
            closest to it on the calibration images are then used in inference that really stops.
        limit: look at the first so many test images only.

    Raises:
        ValueError: a model without exits, data without a training part, a budget that even the lowest thresholds
            exceed.

    Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, section 4.2.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    name, model, images, size = prepare(
        model, data, checkpoint=checkpoint, device=device, dtype=dtype, image_size=image_size,
        model_options=model_options,
    )  # fmt: skip
    if not hasattr(model, "forward_exits"):
        raise ValueError(f"{name} has no early exits; the models called dyn_perceiver_... have them")
    if images.train is None:
        raise ValueError(f"data {data!r} has no training part, on which thresholds are set")
    images.train.transform = images.test.transform
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    calibration = Subset(images.train, order.tolist())
    test = images.test if limit is None else Subset(images.test, range(min(limit, len(images.test))))
    load = partial(_batches, batch_size=batch_size, workers=workers, device=device, dtype=DTYPES[dtype])

    blank = torch.zeros(1, 3, size, size, device=device, dtype=DTYPES[dtype])
    with torch.inference_mode():
        flops = exit_flops(model, blank)
        known, _ = _all_exits(model, load(calibration, "calibrating", progress))
        confidence, correct = _all_exits(model, load(test, f"evaluating {name}", progress))
    found = ExitEvaluation(
        model=name,
        images=len(cast(Any, test)),
        calibration_images=len(order),
        image_size=size,
        exits=tuple(ExitPoint(at_exit.float().mean().item(), cost) for at_exit, cost in zip(correct, flops)),
        curve=budget_curve(known, confidence, correct, flops),
    )
    if budget is None:
        return found
    p, thresholds = thresholds_for(budget, known, flops)
    exits, rights, adaptive, static = [], [], 0.0, 0.0
    stopping = EarlyExit(model, thresholds)
    with torch.inference_mode():
        for pixels, labels in load(test, f"within {budget:.3g} operations", progress):
            (logits, at), seconds = _timed(stopping, pixels)
            _, whole = _timed(model, pixels)
            adaptive, static = adaptive + seconds, static + whole
            exits.append(at)
            rights.append(logits.argmax(-1) == labels)
    chosen = _point(p, thresholds, torch.cat(exits), torch.cat(rights), flops)
    return dataclasses.replace(
        found,
        chosen=chosen,
        images_per_second=found.images / adaptive,
        static_images_per_second=found.images / static,
    )


def exit_flops(model: nn.Module, image: Tensor) -> tuple[int, ...]:
    """Floating-point operations up to each exit for one image, a multiply-add counting two."""
    steps = _Steps(model)
    counts = [count_flops(steps, image)]
    for _ in range(1, EXITS):
        counts.append(counts[-1] + count_flops(steps, steps.x))
    return tuple(counts)


def budget_curve(
    calibration: Tensor, confidence: Tensor, correct: Tensor, flops: tuple[int, ...]
) -> tuple[BudgetPoint, ...]:
    """The 33 budgets.

    Args:
        calibration: (exits, n), confidence of the images that set the thresholds.
        confidence, correct: (exits, m), confidence of the test images and whether each exit is right.
        flops: operations up to each exit.
    """
    points = []
    for p in BUDGETS:
        thresholds = find_thresholds(calibration, exit_fractions(p))
        exits = leaving(confidence, thresholds)
        points.append(_point(p, thresholds, exits, correct.gather(0, exits[None])[0], flops))
    return tuple(points)


def thresholds_for(budget: int | float, calibration: Tensor, flops: tuple[int, ...]) -> tuple[float, tuple[float, ...]]:
    """p and thresholds whose mean cost on the calibration images (exits, n) comes closest to ``budget`` from below.

    Raises:
        ValueError: even the lowest thresholds cost more.
    """

    def cost(p: float) -> float:
        exits = leaving(calibration, find_thresholds(calibration, exit_fractions(p)))
        return torch.tensor(flops, dtype=torch.double)[exits.cpu()].mean().item()

    low, high = _CHEAPEST, _DEAREST
    if cost(low) > budget:
        raise ValueError(f"budget={budget:.4g} operations an image; the least that these exits take is {cost(low):.4g}")
    if cost(high) <= budget:
        low = high
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low, find_thresholds(calibration, exit_fractions(low))


class _Steps(nn.Module):
    """From exit to exit with each call, on what the call before left."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.index, self.x = model, 0, torch.empty(0)
        self.z: Tensor | None = None
        self.hint: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits, self.x, self.z, self.hint = cast(Any, self.model).step(self.index, x, self.z, self.hint)
        self.index += 1
        return logits


def _batches(
    data: Dataset, title: str, progress: bool, *, batch_size: int, workers: int, device: str, dtype: Any
) -> Any:
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers)
    for batch in tqdm(loader, desc=title, disable=not progress):
        yield batch["pixel_values"].to(device, dtype), batch["labels"].to(device)


def _all_exits(model: nn.Module, batches: Any) -> tuple[Tensor, Tensor]:
    """Confidence and correctness of every exit for every image, both (exits, images)."""
    confidence, correct = [], []
    for pixels, labels in batches:
        logits = torch.stack(cast(Any, model).forward_exits(pixels))
        confidence.append(confidences(logits))
        correct.append(logits.argmax(-1) == labels)
    return torch.cat(confidence, dim=1), torch.cat(correct, dim=1)


def _point(
    p: float, thresholds: tuple[float, ...], exits: Tensor, correct: Tensor, flops: tuple[int, ...]
) -> BudgetPoint:
    shares = tuple((torch.bincount(exits.cpu(), minlength=len(flops)) / len(exits)).tolist())
    mean = sum(share * cost for share, cost in zip(shares, flops))
    return BudgetPoint(p, thresholds, shares, mean, correct.float().mean().item())


def _timed(model: nn.Module, pixels: Tensor) -> tuple[Any, float]:
    wait = torch.cuda.synchronize if pixels.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    result = model(pixels)
    wait()
    return result, time.perf_counter() - start
