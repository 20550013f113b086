"""Augmentation of single patches: every patch of an image is cropped, mirrored or made noisy for itself.

A robust vision transformer learns from such images too, in a pass of their own beside the one on the images as they
were; only patches change, so that the image as a whole stays what it was.

Source: "Towards Robust Vision Transformer", arXiv 2105.07926, section 3.3, with the numbers of "Robustifying Token
Attention for Vision Transformers", arXiv 2303.11126.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def augment_patches(
    images: Tensor,
    *,
    patch: int = 16,
    probability: int | float = 0.1,
    crop_scale: int | float = 0.85,
    noise: int | float = 0.01,
) -> Tensor:
    """Crop some patches, add noise to some and mirror some, each change for itself, under torch's global seed.

    Args:
        images: (batch, channels, height, width), normalised. Pixels beyond the last whole patch stay as they are.
        patch: side of a patch in pixels.
        probability: of each of the three changes, for each patch.
        crop_scale: smallest share of a patch's area that its crop, a square, keeps; it is scaled up to the patch.
        noise: standard deviation of the noise, in units of the normalised image.

    Returns:
        New images.

    Raises:
        ValueError: images that are not floating-point maps, or smaller than a patch; a probability or a share outside
            [0, 1]; negative noise.

    >>> import torch
    >>> images = torch.randn(2, 3, 32, 48)
    >>> mirrored = augment_patches(images, probability=1, crop_scale=1, noise=0)
    >>> torch.allclose(mirrored[:, :, :16, 16:32], images[:, :, :16, 16:32].flip(-1), atol=1e-4)
    True
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be floating-point (batch, channels, height, width), got {tuple(images.shape)}")
    rows, columns = images.shape[2] // patch if patch > 0 else 0, images.shape[3] // patch if patch > 0 else 0
    if not rows or not columns:
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels have no patch of patch={patch}")
    if not 0 <= probability <= 1 or not 0 < crop_scale <= 1 or noise < 0:
        raise ValueError(
            f"probability={probability} must be in [0, 1], crop_scale={crop_scale} in (0, 1], noise={noise} at least 0"
        )
    inner = images[:, :, : rows * patch, : columns * patch]
    tiles = inner.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    patches = tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).clone()

    def chosen() -> Tensor:
        return torch.rand(len(patches), device=images.device) < probability

    cropped, noisy, mirrored = chosen(), chosen(), chosen()
    if cropped.any():
        patches[cropped] = _random_crop(patches[cropped], crop_scale)
    patches[noisy] += noise * torch.randn_like(patches[noisy])
    patches[mirrored] = patches[mirrored].flip(-1)

    out = images.clone()
    tiles = patches.unflatten(0, (len(images), rows, columns)).permute(0, 3, 1, 4, 2, 5)
    out[:, :, : rows * patch, : columns * patch] = tiles.flatten(4, 5).flatten(2, 3)
    return out


def _random_crop(patches: Tensor, least: int | float) -> Tensor:
    """A square of ``least`` of the area or more, anywhere in each patch, scaled up to the patch."""
    share, x, y = torch.rand(3, len(patches), device=patches.device, dtype=patches.dtype)
    side = (least + (1 - least) * share).sqrt()
    # The centre of the crop may move by what its side leaves free; the patch reaches from -1 to 1.
    shift = (1 - side) * (2 * torch.stack([x, y]) - 1)
    zero = torch.zeros_like(side)
    transform = torch.stack([side, zero, shift[0], zero, side, shift[1]], dim=1).unflatten(1, (2, 3))
    grid = F.affine_grid(transform, list(patches.shape), align_corners=False)
    return F.grid_sample(patches, grid, padding_mode="border", align_corners=False)
