"""How images become what a vision model reads: its size, its mean and deviation, the recipe's augmentations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor, nn
from torchvision import transforms

from manyheads.models.recipes import Recipe

_LINEAR = transforms.InterpolationMode.BILINEAR


def train_transform(model: nn.Module, size: int, recipe: Recipe) -> Callable:
    """timm's random crop, flip, RandAugment and erasing, with the model's mean and deviation.

    A recipe with ``crop_padding`` or ``affine`` has these and a flip instead, which timm does not offer.
    """
    statistics = _statistics(model)
    if recipe.crop_padding or recipe.affine:
        moved: list[Callable] = [transforms.RandomCrop(size, recipe.crop_padding)] if recipe.crop_padding else []
        if recipe.affine:
            degrees, shift, shear = recipe.affine
            moved.append(transforms.RandomAffine(degrees, translate=(shift, shift), shear=shear, interpolation=_LINEAR))
        return transforms.Compose(
            [
                transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC),
                *moved,
                transforms.RandomHorizontalFlip(recipe.hflip),
                transforms.ToTensor(),
                RandomIntensity(*(recipe.intensity if recipe.affine else (0.0, 0.0))),
                transforms.Normalize(**statistics),
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
        **statistics,
    )


class RandomIntensity:
    """Scale all values of an image by up to 1 +- ``scale``, and shift them by up to +- ``shift``."""

    def __init__(self, scale: float, shift: float) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, image: Tensor) -> Tensor:
        if not self.scale and not self.shift:
            return image
        scale, shift = torch.empty(2).uniform_(-1, 1).tolist()
        return image * (1 + self.scale * scale) + self.shift * shift


def test_transform(model: nn.Module, size: int, recipe: Recipe) -> Callable:
    """timm's resizing (of the shorter side or of both, as the authors do) and central crop, mean and deviation."""
    config = getattr(model, "pretrained_cfg", {})
    return create_transform(  # pyright: ignore[reportReturnType]
        (3, size, size), interpolation="bicubic", crop_pct=recipe.crop_pct,
        crop_mode=config.get("crop_mode") or "center", **_statistics(model),
    )  # fmt: skip


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


def _statistics(model: nn.Module) -> dict[str, Any]:
    """Mean and deviation of the channels; a grey image has the average of the colours'."""
    config, usual = getattr(model, "pretrained_cfg", {}), {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    found = {name: tuple(config.get(name, default)) for name, default in usual.items()}
    if getattr(model, "in_chans", 3) == 1:
        found = {name: (sum(values) / len(values),) for name, values in found.items()}
    return found
