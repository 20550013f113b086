"""Evaluating a vision model: accuracy, throughput, parameters, operations, memory."""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import Compose
from tqdm import tqdm

from manyheads.data.corruptions import SEVERITIES, check_corruption, corrupt
from manyheads.models.image_data import ImageData, load_images
from manyheads.models.recipes import recipe_for
from manyheads.models.registry import check_classifies, create_model
from manyheads.models.transforms import fit_to_size, suitable_size, test_transform

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Evaluation:
    """What ``evaluate_vision`` measured.

    Attributes:
        model: registered name.
        images: how many images were seen.
        top1, top5: accuracy in [0, 1]; with five classes or fewer, top5 is 1.
        images_per_second: of the model alone, without loading and resizing.
        parameters: numbers the model learns.
        flops: floating-point operations for one image (a multiply-add counts two).
        peak_memory_bytes: most memory held, by the GPU's allocator or else by the whole process.
        image_size: side in pixels.
        corruptions: top-1 error in [0, 1] under each corruption asked for, the mean over its severities.
    """

    model: str
    images: int
    top1: float
    top5: float
    images_per_second: float
    parameters: int
    flops: int
    peak_memory_bytes: int
    image_size: int
    corruptions: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return dataclasses.asdict(self)


def evaluate_vision(
    model: str | nn.Module,
    data: str | ImageData,
    *,
    checkpoint: str | Path | None = None,
    batch_size: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: int | None = None,
    limit: int | None = None,
    workers: int = 0,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = SEVERITIES,
    model_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a vision model on the test part of labelled images.

    Args:
        model: registered name, or a model.
        data: as in ``manyheads.models.image_data.load_images``.
        checkpoint: weights in any published layout, ours, or the output directory of ``train_vision``; None evaluates
            random weights.
        batch_size: images a step.
        device: torch's name of a device.
        dtype: of weights and images: "float32", "bfloat16" or "float16".
        image_size: side in pixels; None takes what suits the data, or the model.
        limit: look at the first so many images only.
        workers: processes that load images.
        corruptions: also measure under these corruptions of ``manyheads.data.corruptions``, which hit an image after
            resizing and cropping, as in ImageNet-C.
        severities: their strengths, 1 to 5.
        model_options: of ``create_model``.
        progress: show a progress bar.

    Raises:
        ValueError: unknown names, an unreadable checkpoint, a checkpoint of another model or number of classes.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size} and limit={limit} must be at least 1")
    for corruption in corruptions:
        for severity in severities:
            check_corruption(corruption, severity)
    if corruptions and not severities:
        raise ValueError("corruptions need at least one severity")
    name, model, images, size = prepare(
        model, data, checkpoint=checkpoint, device=device, dtype=dtype, image_size=image_size,
        model_options=model_options,
    )  # fmt: skip
    clean = images.test.transform
    seen = images.test if limit is None else Subset(images.test, range(min(limit, len(images.test))))

    classes = images.classes
    top1 = MulticlassAccuracy(classes, top_k=1, average="micro").to(device)
    top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro").to(device)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = 0.0

    def run(label: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Logits, labels and the model's own seconds of every batch."""
        loader = DataLoader(seen, batch_size=batch_size, num_workers=workers)  # pyright: ignore[reportArgumentType]
        for batch in tqdm(loader, desc=label, disable=not progress):
            pixels = batch["pixel_values"].to(device, DTYPES[dtype])
            _wait(device)
            start = time.perf_counter()
            logits = model(pixels)
            _wait(device)
            yield logits.float(), batch["labels"].to(device), time.perf_counter() - start

    errors = {}
    with torch.inference_mode():
        channels = getattr(model, "in_chans", 3)
        flops = count_flops(model, torch.zeros(1, channels, size, size, device=device, dtype=DTYPES[dtype]))
        for logits, labels, spent in run(f"evaluating {name}"):
            seconds += spent
            top1.update(logits, labels)
            top5.update(logits, labels)
        # Every image gets its own noise, the same one in every run.
        images.test.seed = 0
        for corruption in corruptions:
            right = 0
            for severity in severities:
                images.test.transform = _corrupted(clean, corruption, severity)
                for logits, labels, _ in run(f"{corruption} {severity}"):
                    right += int((logits.argmax(-1) == labels).sum())
            errors[corruption] = 1 - right / (len(seen) * len(severities))
    return Evaluation(
        model=name,
        images=len(seen),
        top1=float(top1.compute()),
        top5=float(top5.compute()),
        images_per_second=len(seen) / seconds,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=flops,
        peak_memory_bytes=_peak_memory(device),
        image_size=size,
        corruptions=errors,
    )


def prepare(
    model: str | nn.Module,
    data: str | ImageData,
    *,
    checkpoint: str | Path | None,
    device: str,
    dtype: str,
    image_size: int | None,
    model_options: dict[str, Any] | None,
) -> tuple[str, nn.Module, ImageData, int]:
    """The model's name, the model ready to be evaluated, the images as it wants to see them, and their side."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    images = load_images(data, image_size=image_size) if isinstance(data, str) else data
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        check_classifies(model)
        options = {"num_classes": images.classes, **(model_options or {})}
        model = create_model(model, checkpoint=checkpoint, **options)
    model = model.to(device, DTYPES[dtype]).eval()
    size = image_size or suitable_size(model, images.image_size)
    fit_to_size(model, size)
    images.read_channels(getattr(model, "in_chans", 3))
    recipe = recipe_for(name, small_images=images.image_size is not None)
    images.test.transform = test_transform(model, size, recipe)
    return name, model, images, size


def count_flops(model: nn.Module, image: torch.Tensor) -> int:
    """Floating-point operations of one forward pass, a multiply-add counting two.

    >>> import torch
    >>> count_flops(torch.nn.Linear(4, 8), torch.zeros(1, 4))
    64
    """
    # The counter knows matrix products and convolutions; attention must be made of them to be seen on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(image)
    return int(counter.get_total_flops())


def _corrupted(transform: Any, corruption: str, severity: int) -> Any:
    """timm's transform with the corruption between its cropping and what makes a tensor of the image."""
    steps = list(transform.transforms)
    tensor = next(index for index, step in enumerate(steps) if "Tensor" in type(step).__name__)
    hit = functools.partial(_corrupt, name=corruption, severity=severity)
    return Compose([*steps[:tensor], hit, *steps[tensor:]])


def _corrupt(image: Image.Image, name: str, severity: int) -> Image.Image:
    # The generator stands where the image's own seed has put it (``LabelledImages``).
    seed = int(np.random.randint(2**31))
    return corrupt(image.convert("RGB"), name, severity, seed=seed).convert(image.mode)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
