"""Repeated augmentation: a step sees several differently augmented copies of the same image.

Source: "Augment your batch: better training with larger batches", arXiv 1901.09335, in the form in which DeiT (arXiv
2012.12877) uses it: an epoch takes as many steps as without it, so it shows a ``1 / repeats`` of the images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RepeatedAugmentation(Sampler):
    """Pairs (index of an image, number of its copy), in the order in which accelerate deals batches to processes.

    The copies of an image go to different processes, as far as there are as many.

    Args:
        images: how many there are.
        repeats: copies of each.
        batch_size: images a step and process.
        processes: how many train together.
        seed: of the order, together with the epoch.

    >>> order = RepeatedAugmentation(4, repeats=2, batch_size=2, processes=2, seed=0)
    >>> batches = [[image for image, _ in list(order)[start : start + 2]] for start in (0, 2)]
    >>> batches[0] == batches[1], len(order)
    (True, 4)
    """

    def __init__(self, images: int, *, repeats: int, batch_size: int, processes: int, seed: int) -> None:
        if repeats < 1:
            raise ValueError(f"repeats={repeats} must be at least 1")
        self.images, self.repeats, self.batch_size, self.processes, self.seed = (
            images, repeats, batch_size, processes, seed,
        )  # fmt: skip
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images - self.images % (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.images, generator=generator).repeat_interleave(self.repeats)[: len(self)]
        copies = torch.arange(self.repeats).repeat(self.images)[: len(self)]
        pairs = torch.stack([order, copies], dim=1).view(-1, self.batch_size, self.processes, 2).transpose(1, 2)
        return iter([(image, copy) for image, copy in pairs.reshape(-1, 2).tolist()])
