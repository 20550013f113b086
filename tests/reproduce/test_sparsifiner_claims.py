"""Sparsifiner's quick claims, and the masks that the long one compares with."""

from __future__ import annotations

import torch

from manyheads.models.vision.sparsifiner import Sparsifiner
from manyheads.ops.sparse_connectivity import pair_index, pair_mask
from manyheads.reproduce import sparsifiner
from manyheads.reproduce.claims import Verdict


def test_fewer_operations_at_fewer_keys() -> None:
    finding = sparsifiner.fewer_operations(0)
    saved = list(finding.details["saved_by_keep_rate"].values())
    assert saved == sorted(saved)
    assert finding.measured == round(saved[0], 4)
    assert (finding.verdict is Verdict.CONFIRMED) == (saved[0] >= 0.48)


def test_every_way_is_timed_beside_dense_attention() -> None:
    finding = sparsifiner.masks_alone_save_no_time(0)
    assert set(finding.baseline) == {"gathered", "blocks"}
    assert set(finding.details["seconds"]) == {"dense", "masked", "gathered", "blocks"}


def test_the_window_is_of_near_patches_as_many_as_learned_ones() -> None:
    model = Sparsifiner(**sparsifiner.SHAPE)
    fixed = sparsifiner.FixedPairs(sparsifiner._near(model))
    mask = pair_mask(pair_index(fixed(*torch.zeros(2, 1, 3, 65, 16)).scores, fixed.rule), 65)
    assert (mask[0, 0, 1:].sum(-1) == 17).all()
    # The patch itself, its neighbours and the class token are among the nearest.
    assert mask[0, 0, 1 + 27, [0, 1 + 27, 1 + 26, 1 + 28, 1 + 19, 1 + 35]].all()
