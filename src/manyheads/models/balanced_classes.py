"""Batches in which every class is as frequent as any other, however rare it is among the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class BalancedClasses(Sampler):
    """Indices of images, one class after the other in turn, in every epoch in another order.

    An epoch is as long as without it: images of rare classes come several times, of frequent ones not all.

    Args:
        labels: class of every image.
        steps: of an epoch.
        batch_size: images a step, of all processes together; a multiple of the number of classes balances each step.
        seed: of the order, together with the epoch.

    >>> order = BalancedClasses([0, 0, 0, 0, 0, 1], steps=2, batch_size=4, seed=0)
    >>> [index == 5 for index in order]
    [False, True, False, True, False, True, False, True]
    """

    def __init__(self, labels: Sequence[int], *, steps: int, batch_size: int, seed: int) -> None:
        classes = torch.as_tensor(labels)
        self.members = [(classes == label).nonzero().flatten() for label in classes.unique()]
        self.images, self.seed, self.epoch = steps * batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        turns = -(-self.images // len(self.members))

        def shuffled(members: torch.Tensor) -> torch.Tensor:
            rounds = -(-turns // len(members))
            order = [members[torch.randperm(len(members), generator=generator)] for _ in range(rounds)]
            return torch.cat(order)[:turns]

        rows = torch.stack([shuffled(members) for members in self.members], dim=1)
        return iter(rows.flatten()[: self.images].tolist())
