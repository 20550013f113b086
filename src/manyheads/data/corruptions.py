"""The fifteen corruptions of ImageNet-C, at five strengths, and the mean corruption error.

    mCE = mean over corruptions c of ( sum_s error[c, s] / sum_s AlexNet's error[c, s] )

The images are made by the package ``imagecorruptions`` (``pip install 'manyheads[corruptions]'``), which was written
for older releases of numpy, scikit-image and setuptools: what it misses is put in its own namespace here, and nowhere
else.

Source: "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", arXiv 1903.12261.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Mean top-1 errors of AlexNet on ImageNet-C, the yardstick of the mean corruption error.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CORRUPTIONS = tuple(ALEXNET)
FURTHER = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32


def corrupt(image: Image.Image, name: str, severity: int = 3, *, seed: int = 0) -> Image.Image:
    """The image with one corruption.

    Args:
        image: at least 32 pixels a side; taken as RGB.
        name: one of ``CORRUPTIONS``, or of ``FURTHER``, the four that are set aside for choosing settings.
        severity: 1 (slight) to 5.
        seed: of the noise; the same seed gives the same image.

    Raises:
        ValueError: an unknown name or severity, an image that is too small.
        ModuleNotFoundError: ``imagecorruptions`` is not installed.

    >>> corrupt(Image.new("RGB", (48, 32), "grey"), "contrast").size
    (48, 32)
    """
    check_corruption(name, severity)
    if min(image.size) < SMALLEST:
        raise ValueError(f"corruptions need at least {SMALLEST} pixels a side, got {image.width} x {image.height}")
    functions = _package()
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            corrupted = getattr(functions, name)(image.convert("RGB"), severity)
    finally:
        np.random.set_state(before)
    return Image.fromarray(np.uint8(corrupted))


def check_corruption(name: str, severity: int = 1) -> None:
    """Raise ValueError unless there is such a corruption and severity."""
    if name not in CORRUPTIONS + FURTHER:
        raise ValueError(f"corruption {name!r} is not one of {', '.join(CORRUPTIONS + FURTHER)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity={severity} must be 1 to 5")


def mean_corruption_error(errors: Mapping[str, float], baseline: Mapping[str, float] = ALEXNET) -> float:
    """Errors by corruption, each relative to a baseline's, on average; 1 is as good as the baseline.

    Args:
        errors: top-1 error in [0, 1] of each corruption, the mean over its severities.
        baseline: likewise of the baseline; AlexNet's, which belong to ImageNet.

    Raises:
        ValueError: no errors, or a corruption that the baseline lacks.

    >>> round(mean_corruption_error({"snow": 0.4334, "fog": 0.8193}), 2)
    0.75
    """
    missing = [name for name in errors if name not in baseline]
    if missing or not errors:
        raise ValueError(f"errors of {list(errors)}, but the baseline has {', '.join(baseline)}")
    return float(np.mean([error / baseline[name] for name, error in errors.items()]))


def parse_corruptions(text: str | Iterable[str]) -> tuple[str, ...]:
    """Names from "all" (the fifteen), a comma-separated list or a sequence.

    >>> parse_corruptions("snow, fog"), len(parse_corruptions("all"))
    (('snow', 'fog'), 15)
    """
    names = tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else tuple(text)
    names = CORRUPTIONS if names == ("all",) else names
    for name in names:
        check_corruption(name)
    return names


@functools.cache
def _package() -> Any:
    """``imagecorruptions.corruptions``, with what newer libraries no longer have."""
    spec = importlib.util.find_spec("imagecorruptions")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("corruptions need the package imagecorruptions: pip install 'manyheads[corruptions]'")
    root = Path(spec.origin).parent
    # It asks setuptools where its pictures lie and an old place of scipy for an interpolation.
    resources = types.ModuleType("pkg_resources")
    vars(resources)["resource_filename"] = lambda package, name: str(root / name)
    import scipy.ndimage

    interpolation = types.ModuleType("scipy.ndimage.interpolation")
    vars(interpolation)["map_coordinates"] = scipy.ndimage.map_coordinates
    standing = {"pkg_resources": resources, "scipy.ndimage.interpolation": interpolation}
    before = {name: sys.modules.get(name) for name in standing}
    sys.modules.update(standing)
    try:
        functions: Any = importlib.import_module("imagecorruptions.corruptions")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    functions.np = types.SimpleNamespace(**{**vars(np), "float_": np.float64})
    functions.gaussian = _gaussian
    functions.sk = types.SimpleNamespace(
        color=importlib.import_module("skimage.color"), util=types.SimpleNamespace(random_noise=_random_noise)
    )
    return functions


def _gaussian(image: Any, *args: Any, multichannel: bool = False, **options: Any) -> Any:
    from skimage.filters import gaussian

    return gaussian(image, *args, channel_axis=-1 if multichannel else None, **options)


def _random_noise(image: Any, **options: Any) -> Any:
    from skimage.util import random_noise

    # scikit-image draws from a generator of its own, which the seed would not reach.
    return random_noise(image, rng=np.random.randint(2**31), **options)
