"""Labelled images for training and evaluation: embedded digits, a folder of images, or a Hugging Face dataset."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

EMBEDDED = ("digits", "textiles")
ALIASES = {"imagenet": "ILSVRC/imagenet-1k"}
_TRAIN, _TEST = ("train", "training"), ("validation", "val", "valid", "test")

Transform = Callable[[Any], torch.Tensor]


class LabelledImages(Dataset):
    """What the trainer reads: ``{"pixel_values": tensor, "labels": int}`` for an index.

    A pair (index, copy) gives the image too, with another outcome of random transforms for every copy.

    With a ``seed``, what a random transform does to an image depends on seed, ``epoch`` and index alone: not on what
    was loaded before or ahead of time, by which process, or in the run that this one resumes. Images are read in
    colour, or in grey where ``mode`` is "L".
    """

    def __init__(
        self,
        length: int,
        read: Callable[[int], tuple[Image.Image, int]],
        labels: Callable[[], Sequence[int]] | None = None,
    ) -> None:
        self.length, self.read, self._labels = length, read, labels
        self.transform: Transform | None = None
        self.mode = "RGB"
        self.seed: int | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def labels(self) -> list[int]:
        """The class of every image, where the source knows it without reading the images."""
        if self._labels is None:
            return [int(self.read(index)[1]) for index in range(self.length)]
        return [int(label) for label in self._labels()][: self.length]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        which = (index,) if isinstance(index, int) else index
        image, label = self.read(which[0])
        pixels = image.convert(self.mode)
        if self.transform is not None:
            with _own_randomness(None if self.seed is None else (self.seed, self.epoch, *which)):
                pixels = self.transform(pixels)
        return {"pixel_values": pixels, "labels": int(label)}


@dataclass
class ImageData:
    """A training part, a test part and how many classes they have.

    Attributes:
        train: None where the source has only images for testing.
        test: images for evaluation.
        classes: number of classes.
        image_size: the side in pixels that suits the images; None leaves it to the model.
    """

    train: LabelledImages | None
    test: LabelledImages
    classes: int
    image_size: int | None = None

    def read_channels(self, channels: int) -> None:
        """Read colour (3) or grey images (1), whatever the files hold.

        Raises:
            ValueError: another number of channels.
        """
        if channels not in (1, 3):
            raise ValueError(f"in_chans={channels}: images are read with 3 channels or with 1")
        for part in (self.train, self.test):
            if part is not None:
                part.mode = "L" if channels == 1 else "RGB"


def load_images(source: str, *, image_size: int | None = None) -> ImageData:
    """Find labelled images.

    Args:
        source: "digits" or "textiles" (embedded); a directory with ``train`` and ``val`` (or ``validation``, ``test``)
            holding a folder of images for each class; a dataset saved by Hugging Face's ``datasets``; or the hub id of
            one ("imagenet" stands for "ILSVRC/imagenet-1k"), with an image and a label column.
        image_size: side of the embedded images in pixels (32 for digits, 64 for textiles).

    Raises:
        ValueError: no such source, a directory without a known layout, a dataset without images or labels.

    >>> data = load_images("digits")
    >>> len(data.train), len(data.test), data.classes
    (1442, 355, 10)
    """
    if source in EMBEDDED:
        return _embedded(source, image_size)
    path = Path(source).expanduser()
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists()
        return _hugging_face(source, saved=True) if saved else _folder(path)
    if path.is_absolute() or source.startswith(("./", "../", "~")):
        raise ValueError(f"--data {source!r}: no such directory")
    return _hugging_face(ALIASES.get(source, source), saved=False)


@contextlib.contextmanager
def _own_randomness(key: tuple[int, ...] | None) -> Iterator[None]:
    """Seed the three generators that transforms draw from, and put them back afterwards."""
    if key is None:
        yield
        return
    python, numpy, seed = random.getstate(), np.random.get_state(), np.random.SeedSequence(key).generate_state(1)[0]
    with torch.random.fork_rng(devices=[]):
        random.seed(int(seed))
        np.random.seed(seed)
        torch.manual_seed(int(seed))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _embedded(name: str, image_size: int | None) -> ImageData:
    from torchvision.transforms.functional import to_pil_image

    from manyheads.data import images

    size = image_size or {"digits": 32, "textiles": 64}[name]
    train_images, train_labels, test_images, test_labels = getattr(images, name)(size=size)

    def part(pixels: torch.Tensor, labels: torch.Tensor) -> LabelledImages:
        return LabelledImages(
            len(labels), lambda index: (to_pil_image(pixels[index]), int(labels[index])), labels.tolist
        )

    classes = int(train_labels.max()) + 1
    return ImageData(part(train_images, train_labels), part(test_images, test_labels), classes, size)


def _folder(path: Path) -> ImageData:
    from torchvision.datasets import ImageFolder

    parts: dict[str, Any] = {}
    for part, names in (("train", _TRAIN), ("test", _TEST)):
        found = next((path / name for name in names if (path / name).is_dir()), None)
        parts[part] = ImageFolder(found) if found else None
    train, test = parts["train"], parts["test"]
    if test is None:
        raise ValueError(f"{path} has none of the folders {', '.join(_TEST)}, with a folder of images for each class")
    if train is not None and train.classes != test.classes:
        raise ValueError(f"{path}: the classes of train {train.classes[:5]} and test {test.classes[:5]} differ")

    def read(folder: ImageFolder) -> LabelledImages:
        return LabelledImages(len(folder), lambda index: folder[index], lambda: folder.targets)

    return ImageData(None if train is None else read(train), read(test), len(test.classes))


def _hugging_face(source: str, *, saved: bool) -> ImageData:
    import datasets

    try:
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:
        # The hub client raises errors of several libraries; for the user all say: no such data.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--data {source!r} is neither {', '.join(EMBEDDED)}, nor a directory, nor a readable dataset ({reason})"
        ) from error
    splits = {
        part: next((name for name in names if name in loaded), None) for part, names in (("t", _TRAIN), ("e", _TEST))
    }
    if splits["e"] is None:
        raise ValueError(f"dataset {source!r} has the splits {list(loaded)}; none is called {', '.join(_TEST)}")
    features = loaded[splits["e"]].features  # pyright: ignore[reportAttributeAccessIssue]
    image = next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"dataset {source!r} needs an image and a class-label column, has {dict(features)}")

    def read(split: Any) -> LabelledImages:
        def one(index: int) -> tuple[Image.Image, int]:
            row = split[index]
            return row[image], row[label]

        return LabelledImages(len(split), one, lambda: split[label])

    train = None if splits["t"] is None else read(loaded[splits["t"]])
    return ImageData(train, read(loaded[splits["e"]]), features[label].num_classes)
