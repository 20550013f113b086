"""What the backbones share about feature maps: which stages are asked for, and whether the image can be one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from manyheads.engines.common import both_sides


def stage_indices(stages: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which stages are meant: all for None, the last n for an int, those listed (negative from the end) otherwise.

    >>> stage_indices(4, 2), stage_indices(4, [0, -1])
    ([2, 3], [0, 3])
    """
    if indices is None or isinstance(indices, int):
        listed = list(range(stages))[-(stages if indices is None else indices) :] if indices != 0 else []
    else:
        listed = [index + stages if index < 0 else index for index in indices]
    if not listed or min(listed) < 0 or max(listed) >= stages or (isinstance(indices, int) and indices > stages):
        raise ValueError(f"indices={indices} do not name stages of a model that has {stages}")
    return listed


def check_image(image: Tensor, in_chans: int) -> None:
    """Raise ValueError unless ``image`` is (batch, in_chans, height, width) with at least one pixel."""
    if image.ndim != 4 or image.shape[1] != in_chans or not image.shape[2] * image.shape[3]:
        raise ValueError(f"image must be (batch, {in_chans}, height, width), got {tuple(image.shape)}")


def patch_grid(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of an image with ``img_size`` pixels a side, or (height, width) of them.

    Raises:
        ValueError: sides that are no multiples of ``patch_size``.

    >>> patch_grid((32, 48), 16)
    (2, 3)
    """
    sides = both_sides(img_size)
    if patch_size < 1 or any(side < patch_size or side % patch_size for side in sides):
        raise ValueError(f"img_size={img_size} must be a multiple of patch_size={patch_size}, or two of them")
    return sides[0] // patch_size, sides[1] // patch_size
