"""Dependency trees: the best spanning tree against all trees, parts, masks of pruned models, drawing, files."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from manyheads.interpret.dependency_trees import (
    DependencyTree,
    dependency_trees,
    spanning_arborescence,
    tree_of,
)
from manyheads.models.vision.dependency import DependencyViT

CHAIN = DependencyTree([0, 0, 1, 0, 3, 4], 0, [0.0, 0.5, 0.4, 0.3, 0.2, 0.1], [1.0] * 5 + [0.0], (2, 3))


def _model(**options) -> DependencyViT:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 3}
    return DependencyViT(**sizes, init_values=1.0, **options).eval()


def _reaches_root(parents: tuple[int, ...] | list[int], root: int) -> bool:
    for token in range(len(parents)):
        for _ in parents:
            token = parents[token]
        if token != root:
            return False
    return True


@pytest.mark.parametrize("seed", range(12))
def test_no_other_tree_is_heavier(seed: int) -> None:
    weights, root, size = np.random.default_rng(seed).random((5, 5)) ** 3, seed % 5, 5
    parents = spanning_arborescence(weights, root)
    assert _reaches_root(parents.tolist(), root)
    best = max(
        sum(weights[parent, child] for child, parent in enumerate(tree) if child != root)
        for tree in itertools.product(range(size), repeat=size)
        if tree[root] == root and _reaches_root(tree, root)
    )
    ours = sum(weights[parents[child], child] for child in range(size) if child != root)
    assert ours == pytest.approx(best)


def test_large_masks_of_circles_become_trees() -> None:
    weights = np.random.default_rng(0).random((196, 196))
    for a, b, c in np.arange(195).reshape(-1, 3):
        weights[[a, b, c], [b, c, a]] += 5
    assert _reaches_root(spanning_arborescence(weights, 7).tolist(), 7)


def test_equal_weights_are_a_tree_too() -> None:
    assert _reaches_root(spanning_arborescence(np.ones((9, 9)), 4).tolist(), 4)
    assert spanning_arborescence(np.ones((1, 1)), 0).tolist() == [0]


def test_argmax_takes_the_strongest_other_token() -> None:
    mask = torch.rand(6, 6)
    tree = tree_of(mask, (2, 3), method="argmax")
    assert tree.root == mask.sum(1).argmax()
    for child, parent in enumerate(tree.parents):
        others = mask[:, child].clone()
        others[child] = -1
        assert parent == (child if child == tree.root else others.argmax())
        assert tree.strength[child] == pytest.approx(0 if child == tree.root else float(mask[parent, child]))


def test_parts_are_the_branches_below_the_root() -> None:
    assert CHAIN.parts() == [0, 1, 1, 3, 3, 3]
    assert CHAIN.ancestors(5) == [5, 4, 3, 0]
    assert CHAIN.depth() == 3
    circle = DependencyTree([0, 2, 1, 2], 0, [0.0] * 4, [1.0] * 4, (2, 2))
    assert circle.parts() == [0, 1, 1, 1]


def test_trees_of_a_model_average_its_layers() -> None:
    model, x = _model(), torch.randn(2, 3, 32, 32)
    record = model.dependencies(x)
    found = dependency_trees(model, x)
    torch.testing.assert_close(found.masks, torch.stack(record.masks).mean(0).detach())
    last = dependency_trees(model, x, layers=1, method="argmax")
    torch.testing.assert_close(last.masks, record.masks[-1].detach())
    torch.testing.assert_close(torch.tensor(last.trees[1].message), record.messages[-1][1].detach())
    assert all(_reaches_root(tree.parents, tree.root) for tree in found.trees)


def test_dropped_tokens_keep_the_parents_of_the_layers_they_saw() -> None:
    model, x = _model(prune_layers=(1,), prune_ratio=0.5), torch.randn(1, 3, 32, 32)
    record = model.dependencies(x)
    masks = dependency_trees(model, x).masks[0]
    dropped = sorted(set(range(16)) - set(record.places[2][0].tolist()))
    early = ((record.masks[0] + record.masks[1]) / 2)[0].detach()
    torch.testing.assert_close(masks[:, dropped], early[:, dropped])
    kept = record.places[2][0]
    average = (2 * early[kept][:, kept] + record.masks[2][0].detach()) / 3
    torch.testing.assert_close(masks[kept][:, kept], average)


def test_the_drawing_has_every_token_once_and_the_image() -> None:
    figure = CHAIN.plot(torch.rand(3, 16, 24), top=1)
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    assert [trace.name for trace in dots] == ["part 1", "1 smaller", "root"]
    places = [(x, y) for trace in dots for x, y in zip(trace.x, trace.y)]
    assert sorted(places) == sorted((token % 3, token // 3) for token in range(6))
    lines = next(trace for trace in figure.data if trace.mode == "lines")
    assert list(zip(lines.x, lines.y))[:2] == [(0, 1), (0, 0)]
    assert figure.layout.images[0].source.startswith("data:image/png;base64,")
    assert CHAIN.table().row_count == 2
    assert not CHAIN.plot().layout.images


def test_files_give_the_tree_back(tmp_path) -> None:
    CHAIN.save(tmp_path / "tree.json")
    assert DependencyTree.load(tmp_path / "tree.json") == CHAIN
    (tmp_path / "other.json").write_text('{"parents": []}')
    with pytest.raises(ValueError, match="not a file of a dependency tree"):
        DependencyTree.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tree_of(torch.rand(4, 5), (2, 2)), ValueError, r"= \(4, 4\) for grid=\(2, 2\)"),
        (lambda: tree_of(torch.full((4, 4), torch.nan), (2, 2)), ValueError, "finite"),
        (lambda: tree_of(torch.rand(4, 4), (2, 2), method="best"), ValueError, "method='best'"),
        (lambda: dependency_trees(_model(), torch.rand(1, 3, 32, 32), layers=4), ValueError, "indices=4"),
        (lambda: CHAIN.plot(torch.rand(4, 2, 2)), ValueError, "image must be"),
    ],
)
def test_bad_input(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
