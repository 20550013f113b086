"""The corruptions of ImageNet-C: all of them work here, are repeatable, and leave numpy's generator alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from manyheads.data.corruptions import ALEXNET, CORRUPTIONS, FURTHER, corrupt, mean_corruption_error, parse_corruptions


def _image(size: tuple[int, int] = (40, 32)) -> Image.Image:
    ramp = np.add.outer(np.linspace(0, 120, size[1]), np.linspace(0, 120, size[0]))
    return Image.fromarray(np.stack([ramp, ramp.T.reshape(ramp.shape), 255 - ramp], -1).astype(np.uint8))


@pytest.mark.parametrize("name", CORRUPTIONS + FURTHER)
def test_every_corruption_works_and_is_repeatable(name: str) -> None:
    image = _image()
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    weak, strong = (np.array(corrupt(image, name, severity, seed=1)) for severity in (1, 5))
    assert weak.shape == (32, 40, 3)
    assert not np.array_equal(weak, strong)
    np.testing.assert_array_equal(strong, np.array(corrupt(image, name, 5, seed=1)))
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_seeds_differ_and_no_module_is_left_behind() -> None:
    noisy = [np.array(corrupt(_image(), "impulse_noise", 3, seed=seed)) for seed in (0, 1)]
    assert not np.array_equal(*noisy)
    stand_in = sys.modules.get("pkg_resources")
    assert stand_in is None or hasattr(stand_in, "__file__")


def test_mean_corruption_error_is_relative_to_alexnet() -> None:
    assert len(ALEXNET) == 15
    assert mean_corruption_error(ALEXNET) == pytest.approx(1)
    assert mean_corruption_error({name: error / 2 for name, error in ALEXNET.items()}) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="the baseline has"):
        mean_corruption_error({"spatter": 0.5})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(_image(), "rain"), "'rain' is not one of gaussian_noise"),
        (lambda: corrupt(_image(), "snow", 6), "severity=6 must be 1 to 5"),
        (lambda: corrupt(_image((31, 40)), "snow"), "at least 32 pixels a side, got 31 x 40"),
        (lambda: parse_corruptions("snow,hail"), "'hail' is not one of"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
