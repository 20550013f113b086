"""The claims of DependencyViT: what they measure, and how their rules judge it."""

from __future__ import annotations

import pytest
import torch

from manyheads.interpret.dependency_trees import DependencyTree
from manyheads.reproduce import dependency_vit
from manyheads.reproduce.claims import Verdict


def test_sizes_alone_do_not_confirm_accuracies() -> None:
    assert dependency_vit.published_sizes(0).verdict is Verdict.INCONCLUSIVE


def test_pairs_of_a_part_count_when_they_share_a_branch() -> None:
    tree = DependencyTree([0, 0, 1, 0, 3, 3], 0, [0.0] * 6, [1.0] * 6, (2, 3))
    assert dependency_vit.share_below_root(tree, ([1, 2], [4, 5])) == 1
    assert dependency_vit.share_below_root(tree, ([1, 4], [3, 5])) == 0.5
    assert dependency_vit.share_below_root(tree, ([0, 1], [0, 2])) == 0


def test_images_have_their_parts_where_told() -> None:
    images, labels, places = dependency_vit.two_parts(6)
    assert images.shape == (6, 3, 32, 32)
    assert labels.max() < 16
    cells = images[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).std(-1).flatten(1)
    for spread, (square, bar) in zip(cells, places):
        assert (len(square), len(bar)) == (9, 10)
        assert set((spread > 0.3).nonzero().flatten().tolist()) == {*square, *bar}


def test_a_tree_in_random_places_is_the_same_tree() -> None:
    tree = DependencyTree([0, 0, 1, 0, 3, 3], 0, [0.0] * 6, [1.0] * 6, (2, 3))
    moved = dependency_vit._relabelled(tree)
    assert moved.depth() == tree.depth()
    sizes = [sorted(t.parts().count(part) for part in set(t.parts())) for t in (tree, moved)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("scores", "verdict"), [((0.93, 0.94), Verdict.CONFIRMED), ((0.93, 0.96), Verdict.REFUTED)])
def test_accuracies_are_judged_by_the_rule(monkeypatch: pytest.MonkeyPatch, scores, verdict) -> None:
    def trained(build, seed: int, epochs: int) -> float:
        model = build()
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
        return scores[hasattr(model.stages[0].blocks[0].attn, "heads") and not hasattr(
            model.stages[0].blocks[0].attn, "head_selector")]  # fmt: skip

    monkeypatch.setattr(dependency_vit, "accuracy_on_digits", trained)
    assert dependency_vit.as_accurate_as_attention(0).verdict is verdict


@pytest.mark.parametrize(("lost", "verdict"), [((0.1, 0.3), Verdict.CONFIRMED), ((0.3, 0.1), Verdict.REFUTED)])
def test_dropped_tokens_are_judged_by_the_rule(monkeypatch: pytest.MonkeyPatch, lost, verdict) -> None:
    model = dependency_vit._net(16, depth=5)
    trained = (model, torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(dependency_vit, "_trained_on_parts", lambda depth, epochs: trained)

    def judged(net, images, labels) -> float:
        keep = net.stages[0].blocks[4].keep
        return 1 - (lost[isinstance(keep, dependency_vit._KeepAny)] if keep else 0)

    monkeypatch.setattr(dependency_vit, "accuracy", judged)
    finding = dependency_vit.silent_tokens_can_go(0)
    assert finding.verdict is verdict
    assert (finding.measured, finding.baseline) == pytest.approx(lost)
