"""The claims of "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282.

The authors published no code: what is measured here is this library's DependencyViT, see its docstring.
"""

from __future__ import annotations

from statistics import mean, stdev

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from manyheads.interpret.dependency_trees import DependencyTree, dependency_trees
from manyheads.models import create_model
from manyheads.models.vision.dependency import DependencyViT, KeepTokens
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy, accuracy_on_digits, train_classifier

SEEDS = 3
PATCH, SIDE = 4, 32
KINDS = 4  # of parts, in the images of two parts


def as_accurate_as_attention(seed: int) -> Finding:
    """Train the same small net on digits with reversed and with ordinary attention."""
    scores = {
        name: [accuracy_on_digits(lambda plain=plain: _net(plain=plain), 2 * seed + run, epochs=10) for run in range(2)]
        for name, plain in (("reversed", False), ("plain", True))
    }  # fmt: skip
    ours, theirs = mean(scores["reversed"]), mean(scores["plain"])
    return Finding(
        round(ours, 4), round(theirs, 4), Verdict.CONFIRMED if ours >= theirs - 0.02 else Verdict.REFUTED,
        {"per_seed": scores},
    )  # fmt: skip


def trees_find_parts(seed: int) -> Finding:
    """Train on images of two parts, read the trees of new ones, and see whether parts hang together in them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, *test = _trained_on_parts()
        images, _, places = two_parts(32)
        found, chance = [], []
        for tree, (first, second) in zip(dependency_trees(model, images).trees, places):
            parts = (first, second)
            found.append(share_below_root(tree, parts))
            chance.append(mean(share_below_root(_relabelled(tree), parts) for _ in range(4)))
    differences = [a - b for a, b in zip(found, chance)]
    error = stdev(differences) / len(differences) ** 0.5
    difference = mean(differences)
    verdict = Verdict.INCONCLUSIVE
    if abs(difference) > 2 * error:
        verdict = Verdict.CONFIRMED if difference > 0 else Verdict.REFUTED
    return Finding(
        mean(found), mean(chance), verdict, {"standard_error": error, "test_accuracy": accuracy(model, *test)}
    )


def silent_tokens_can_go(seed: int) -> Finding:
    """Train on images of two parts, then drop tokens at four blocks: those with the smallest messages, or any."""
    drops: dict[str, list[float]] = {"message": [], "random": []}
    whole = []
    for run in range(SEEDS):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEEDS * seed + run)
            model, images, labels = _trained_on_parts(depth=5, epochs=6)
            whole.append(accuracy(model, images, labels))
            for name in drops:
                pruned = _net(KINDS**2, depth=5, prune_layers=(1, 2, 3, 4), prune_ratio=0.16).eval()
                pruned.load_state_dict(model.state_dict())
                if name == "random":
                    for block in pruned.stages[0].blocks:  # pyright: ignore[reportGeneralTypeIssues]
                        block.keep = block.keep and _KeepAny(block.keep.share)
                drops[name].append(whole[-1] - accuracy(pruned, images, labels))
    spread = mean(stdev(values) ** 2 for values in drops.values()) ** 0.5
    margin = 2 * spread * (2 / SEEDS) ** 0.5
    ours, theirs = mean(drops["message"]), mean(drops["random"])
    verdict = Verdict.INCONCLUSIVE
    if abs(theirs - ours) > margin:
        verdict = Verdict.CONFIRMED if ours < theirs else Verdict.REFUTED
    return Finding(round(ours, 4), round(theirs, 4), verdict, {"per_seed": drops, "whole": whole, "margin": margin})


def published_sizes(seed: int) -> Finding:
    """Count the parameters of both sizes; their accuracies need ImageNet."""
    paper = {"dependency_vit_tiny": 6.2e6, "dependency_vit_small": 24.0e6}
    with torch.device("meta"):
        counts = {name: float(sum(p.numel() for p in create_model(name).parameters())) for name in paper}
    fits = all(abs(counts[name] / size - 1) < 0.05 for name, size in paper.items())
    reason = "sizes within 5%; the accuracies need ImageNet" if fits else "the sizes differ by more than 5%"
    return Finding(counts, paper, Verdict.INCONCLUSIVE if fits else Verdict.REFUTED, {"reason": reason})


def two_parts(count: int) -> tuple[Tensor, Tensor, list[tuple[list[int], list[int]]]]:
    """Grey images with a square and a bar of patches in two of four textures, one in either half.

    Returns:
        (images (count, 3, SIDE, SIDE), labels KINDS * texture of the square + that of the bar, tokens of both parts).
    """
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    textures = torch.stack([rows % 2, columns % 2, (rows + columns) % 2, (rows // 2) % 2]).float()
    grid = SIDE // PATCH
    images, labels, places = [], [], []
    for _ in range(count):
        image = 0.5 + 0.05 * torch.randn(SIDE, SIDE)
        kinds = torch.randint(KINDS, (2,)).tolist()
        left = int(torch.randint(2, ()))  # the square is in the left or the right half
        parts = []
        for half, (height, width), kind in ((left, (3, 3), kinds[0]), (1 - left, (5, 2), kinds[1])):
            top = int(torch.randint(grid - height + 1, ()))
            start = half * grid // 2 + int(torch.randint(grid // 2 - width + 1, ()))
            box = (slice(top * PATCH, (top + height) * PATCH), slice(start * PATCH, (start + width) * PATCH))
            image[box] = textures[kind][box]
            parts.append([row * grid + column for row in range(top, top + height)
                          for column in range(start, start + width)])  # fmt: skip
        images.append(image.expand(3, -1, -1))
        labels.append(KINDS * kinds[0] + kinds[1])
        places.append((parts[0], parts[1]))
    return torch.stack(images), torch.tensor(labels), places


def share_below_root(tree: DependencyTree, parts: tuple[list[int], ...]) -> float:
    """Of all pairs of tokens of one part, the share that has a common ancestor before the root."""
    branch = tree.parts()
    pairs = [
        tree.root not in (a, b) and branch[a] == branch[b]
        for part in parts for index, a in enumerate(part) for b in part[index + 1 :]
    ]  # fmt: skip
    return sum(pairs) / len(pairs)


class _PlainAttention(nn.Module):
    """Ordinary attention in the place of the reversed one; every message stays one."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor]:
        query, key, value = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), x.new_ones(x.shape[:2])


class _KeepAny(KeepTokens):
    """Any tokens, as many."""

    def forward(self, message: Tensor) -> Tensor:
        return super().forward(torch.rand_like(message))


def _net(num_classes: int = 10, *, plain: bool = False, depth: int = 4, **options) -> DependencyViT:
    # 1e-6, where the published layer scales begin, needs more steps than a miniature has.
    model = DependencyViT(
        img_size=SIDE, patch_size=PATCH, embed_dim=48, depth=depth, num_heads=6, mlp_ratio=2, num_classes=num_classes,
        init_values=0, **options,
    )  # fmt: skip
    for block in model.stages[0].blocks if plain else ():  # pyright: ignore[reportGeneralTypeIssues]
        block.attn = _PlainAttention(48, 6)
    return model


def _trained_on_parts(depth: int = 4, epochs: int = 8) -> tuple[DependencyViT, Tensor, Tensor]:
    """A net that names the textures of two parts, and images and labels to test it on."""
    images, labels, _ = two_parts(1536)
    model = _net(KINDS**2, depth=depth)
    train_classifier(model, images, labels, epochs=epochs)
    test_images, test_labels, _ = two_parts(256)
    return model, test_images, test_labels


def _relabelled(tree: DependencyTree) -> DependencyTree:
    """The same tree with its tokens in random places."""
    place = torch.randperm(len(tree.parents)).tolist()
    parents = [0] * len(place)
    for child, parent in enumerate(tree.parents):
        parents[place[child]] = place[parent]
    return DependencyTree(parents, place[tree.root], tree.strength, tree.message, tree.grid)


CLAIMS = (
    Claim(
        system="dependency_vit",
        name="as_accurate_as_attention",
        statement="Reversed attention classifies as well as ordinary attention.",
        rule="Mean accuracy on digits over 2 seeds, 4 blocks of width 48, 10 epochs, equal but for the attention. "
        "Confirmed when reversed attention is at most 2 points below, else refuted.",
        run=as_accurate_as_attention,
        full_scale="manyheads train dependency_vit_tiny --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="dependency_vit",
        name="trees_find_parts",
        statement="Without labels of parts, trees emerge in which the tokens of a part belong together.",
        rule="A net trained to name the textures of two parts, 32 new images: the share of pairs of tokens of one part "
        "with a common ancestor before the root, against the same tree with its tokens in random places. Confirmed "
        "when larger by more than twice the standard error of the mean difference over images, refuted when smaller "
        "by as much, else inconclusive.",
        run=trees_find_parts,
        full_scale="manyheads train dependency_vit_small --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="dependency_vit",
        name="silent_tokens_can_go",
        statement="Tokens with small messages can be dropped at little loss, without training again.",
        rule="A net of 5 blocks trained on images of two parts, r = 0.16 at four of them, 3 seeds: the accuracy lost "
        "by dropping the smallest messages against dropping any tokens. Confirmed when less is lost by more than twice "
        "the standard error of the difference, refuted when more is lost by as much, else inconclusive.",
        run=silent_tokens_can_go,
        full_scale="manyheads train dependency_vit_lite_tiny --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="dependency_vit",
        name="published_accuracy",
        statement="75.4 and 82.1% top-1 on ImageNet with about 6.2 and 24.0 million parameters (tiny and small).",
        rule="Here only the sizes can be counted: refuted when one is more than 5% off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads train dependency_vit_small --data imagenet --dtype bfloat16",
    ),
)
