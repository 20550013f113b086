"""Spectral gating: positions are mixed by a learnt filter in the Fourier domain, one filter for each channel.

    Z = rfft2(x),    Y = irfft2(Z * W)          both with the norm 1 / sqrt(X Y), over the two axes of the map

which is a circular convolution of the whole map with a kernel of its own size, at a cost of N log N. With
``u, v`` the frequencies along X and Y and ``c_v = 1`` for v = 0 and (Y even) v = Y / 2, else 2::

    Y[i, j] = (X Y)^-1/2 sum_v c_v Re( e^{2 pi i j v / Y} sum_u Z[u, v] W[u, v] e^{2 pi i u i / X} )

W need not be the transform of a real kernel: what the two columns with c_v = 1 would leave imaginary is discarded.

Source: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446; the filter is
that of "Global Filter Networks for Image Classification", arXiv 2107.00645.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from manyheads.engines.common import FLOATS, accumulation_dtype, check_choice


def spectral_gating(
    x: Float[Tensor, "batch X Y channels"], weight: Tensor, *, backend: str = "auto"
) -> Float[Tensor, "batch X Y channels"]:
    """Multiply the Fourier transform of a map by a filter; global, the same for every image, linear in x.

    Args:
        x: (batch, X, Y, channels), real. Half precision is transformed in float32 and returned as it came.
        weight: W, (X, Y // 2 + 1, channels, 2), the last axis holding real and imaginary part.
        backend: "reference" (the formula above as products with cosines and sines), "fft" or "auto", which is "fft".

    Raises:
        TypeError: a complex or integer input or filter.
        ValueError: a filter that does not fit the map (``resize_filter`` makes one that does).

    Source: "SpectFormer", arXiv 2304.06446.

    >>> import torch
    >>> spectral_gating(torch.randn(2, 6, 5, 8), torch.randn(6, 3, 8, 2)).shape
    torch.Size([2, 6, 5, 8])
    """
    check_choice("backend", backend, ("auto", "reference", "fft"))
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}")
    if x.ndim != 4:
        raise ValueError(f"x must be (batch, X, Y, channels), got shape {tuple(x.shape)}")
    wanted = (x.shape[1], x.shape[2] // 2 + 1, x.shape[3], 2)
    if tuple(weight.shape) != wanted:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} does not fit a map of {x.shape[1]} x {x.shape[2]} with "
            f"{x.shape[3]} channels, which needs {wanted}; resize_filter makes a filter for another map"
        )
    if x.numel() == 0:
        return torch.zeros_like(x)
    wide = accumulation_dtype(x.dtype)
    filter = torch.view_as_complex(weight.to(wide).contiguous())
    return (_reference if backend == "reference" else _fft)(x.to(wide), filter).to(x.dtype)


def resize_filter(weight: Float[Tensor, "X Y2 channels 2"], grid: tuple[int, int]) -> Tensor:
    """A filter for a map of another size: real and imaginary parts interpolated bicubically, corners aligned.

    Args:
        weight: (X, Y // 2 + 1, channels, 2).
        grid: sides of the new map.

    Returns:
        (grid[0], grid[1] // 2 + 1, channels, 2).

    >>> import torch
    >>> resize_filter(torch.ones(14, 8, 4, 2), (24, 24)).shape
    torch.Size([24, 13, 4, 2])
    """
    size = (grid[0], grid[1] // 2 + 1)
    if tuple(weight.shape[:2]) == size:
        return weight
    image = weight.flatten(2).permute(2, 0, 1)[None].float()
    resized = F.interpolate(image, size=size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    return resized.unflatten(-1, weight.shape[2:]).to(weight.dtype).contiguous()


def _fft(x: Tensor, filter: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * filter
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def _reference(x: Tensor, filter: Tensor) -> Tensor:
    height, width = x.shape[1:3]
    columns = width // 2 + 1
    down, right = _waves(height, height, x), _waves(width, columns, x)
    spectrum = torch.einsum("bijc,ui,vj->buvc", x.to(filter.dtype), down.conj(), right.conj()) * filter
    twice = torch.full((columns,), 2.0, device=x.device, dtype=x.dtype)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    return torch.einsum("buvc,ui,vj->bijc", spectrum * twice[:, None], down, right).real / (height * width)


def _waves(positions: int, frequencies: int, like: Tensor) -> Tensor:
    """e^{2 pi i u n / positions} of every frequency u and position n."""
    position = torch.arange(positions, device=like.device)
    turns = torch.arange(frequencies, device=like.device)[:, None] * position % positions
    angle = 2 * math.pi * turns.to(like.dtype) / positions
    return torch.complex(angle.cos(), angle.sin())
