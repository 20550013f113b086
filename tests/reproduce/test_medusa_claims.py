"""MEDUSA's quick claim, and the pictures of the others."""

from __future__ import annotations

import torch

from manyheads.reproduce import medusa
from manyheads.reproduce.claims import Verdict


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    finding = medusa.published_size(0)
    assert finding.verdict is Verdict.INCONCLUSIVE
    assert finding.measured == 29.165795


def test_the_digit_is_in_the_middle_of_four_others() -> None:
    train, labels, test, _ = medusa.cluttered_digits(0)
    assert train.shape == (1442, 3, 64, 64)
    assert len(labels) == 1442
    middle = medusa._foreground().bool()
    assert 0.2 < middle.float().mean() < 0.3
    assert (test[:, :, :16, :16].sum((1, 2, 3)) > 0).all()
    corners = torch.zeros(64, 64, dtype=torch.bool)
    for rows in (slice(16), slice(48, 64)):
        corners[rows, :16] = corners[rows, 48:] = True
    assert torch.equal(test[:, :, ~middle & ~corners], torch.zeros_like(test[:, :, ~middle & ~corners]))
