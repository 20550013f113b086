"""Early exits: thresholds for a budget of operations, and inference that really stops.

An image leaves at the first exit k whose confidence (largest softmax probability) reaches T_k. For a share q_k of the
images that should leave at exit k, T_k is read off a calibration set: visit its images from the most confident on; the
floor(n q_k)-th that has not left before sets T_k. One number p spans all budgets::

    q_k ~ p^k, normalised;  then for k = 1, 2, 3:  q_k <- kappa_k q_k, and the later ones share the rest as before

Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, section 3.3 and its evaluation program;
the scheme is that of "Multi-Scale Dense Networks for Resource Efficient Image Classification", arXiv 1703.09844.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

KAPPA = (0.85, 1.0, 0.5)
NOBODY, EVERYBODY = 1e8, -1e8
# The authors' 33 budgets, from cheap to expensive.
BUDGETS = (*((i + 4) / 20 for i in range(17)), *(20 / (20 - i) for i in range(16)))


def exit_fractions(p: int | float) -> tuple[float, ...]:
    """Which share of the images should leave at each of four exits; a larger ``p`` sends more to the later ones.

    >>> [round(share, 3) for share in exit_fractions(1.0)]
    [0.212, 0.263, 0.131, 0.394]
    """
    if not 0 < p < math.inf:
        raise ValueError(f"p={p} must be positive and finite")
    # Relative to the largest power, so that none overflows.
    powers = [p ** (k - (4 if p > 1 else 1)) for k in range(1, 5)]
    shares = [power / sum(powers) for power in powers]
    for k, kappa in enumerate(KAPPA):
        shares[k] *= kappa
        left = (1 - sum(shares[: k + 1])) / sum(shares[k + 1 :])
        shares[k + 1 :] = [share * left for share in shares[k + 1 :]]
    return tuple(shares)


def find_thresholds(confidence: Tensor, fractions: Sequence[float]) -> tuple[float, ...]:
    """Thresholds that let ``fractions`` of a calibration set leave at each exit.

    Args:
        confidence: (exits, n), the confidence of n images at each exit.
        fractions: share of images for each exit.

    Returns:
        A threshold for each exit: 1e8 where nobody leaves (a share below one image, or more than are left), -1e8 for
        the last.

    Raises:
        ValueError: not one fraction for each exit, or no image.

    >>> import torch
    >>> find_thresholds(torch.tensor([[0.9, 0.5, 0.25, 0.75], [0.9, 0.5, 0.75, 0.75]]), (0.5, 0.5))
    (0.75, -100000000.0)
    """
    if confidence.ndim != 2 or not confidence.shape[1] or len(fractions) != confidence.shape[0]:
        raise ValueError(f"confidence must be ({len(fractions)} exits, images), got {tuple(confidence.shape)}")
    images = confidence.shape[1]
    gone = torch.zeros(images, dtype=torch.bool, device=confidence.device)
    thresholds = []
    for at_exit, fraction in zip(confidence[:-1], fractions[:-1], strict=True):
        order = at_exit.argsort(descending=True, stable=True)
        waiting = order[~gone[order]]
        count = math.floor(images * fraction)
        threshold = at_exit[waiting[count - 1]].item() if 0 < count <= len(waiting) else NOBODY
        gone |= at_exit >= threshold
        thresholds.append(threshold)
    return (*thresholds, EVERYBODY)


def leaving(confidence: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The exit (from 0) at which each of n images leaves, from its ``confidence`` (exits, n) at all of them.

    >>> import torch
    >>> leaving(torch.tensor([[0.9, 0.2], [0.9, 0.8]]), (0.5, -1e8))
    tensor([0, 1])
    """
    reached = confidence >= confidence.new_tensor(thresholds)[:, None]
    return reached.int().argmax(dim=0)


def confidences(logits: Tensor) -> Tensor:
    """The largest softmax probability of each row of (..., classes)."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


class EarlyExit(nn.Module):
    """A model with exits, stopped for every image as soon as an exit is confident.

    Between two exits the batch shrinks to the images that are undecided; when none is left, the rest of the model is
    not run.

    Args:
        model: has ``step(index, x, z, hint)``, as ``manyheads.models.vision.dyn_perceiver.DynPerceiver``, and
            classifiers.
        thresholds: confidence from which an image leaves, for each of the four exits; the last one lets all leave
            whatever its threshold.

    Shape: images to the pair of logits (batch, classes) and exits (batch,), counted from 0.

    Raises:
        ValueError: not four thresholds, or a model in training mode.

    >>> import torch
    >>> from manyheads.models import create_model
    >>> model = create_model("dyn_perceiver_mobilenet_v3_0x5", num_latents=8, num_classes=3).eval()
    >>> logits, exits = EarlyExit(model, (0.0, 0.0, 0.0, 0.0))(torch.randn(2, 3, 32, 32))
    >>> logits.shape, exits
    (torch.Size([2, 3]), tensor([0, 0]))
    """

    def __init__(self, model: nn.Module, thresholds: Sequence[float]) -> None:
        super().__init__()
        if len(thresholds) != 4:
            raise ValueError(f"thresholds={tuple(thresholds)} must be four, one for each exit")
        self.model, self.thresholds = model, tuple(thresholds)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model = cast(Any, self.model)
        if model.training:
            raise ValueError("early exits are for evaluation; call eval() on the model first")
        exits = torch.zeros(len(images), dtype=torch.long, device=images.device)
        undecided = torch.arange(len(images), device=images.device)
        result, x, z, hint = None, images, None, None
        for index, threshold in enumerate(self.thresholds):
            logits, x, z, hint = model.step(index, x, z, hint)
            if result is None:
                result = torch.empty_like(logits)
            leave = confidences(logits) >= threshold
            if index == len(self.thresholds) - 1:
                leave = torch.ones_like(leave)
            result[undecided[leave]] = logits[leave]
            exits[undecided[leave]] = index
            if leave.all():
                break
            if leave.any():
                stay = ~leave
                undecided, x, z, hint = undecided[stay], x[stay], z[stay], hint[stay]
        assert result is not None
        return result, exits
