"""The claims of "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810, as miniatures."""

from __future__ import annotations

import math
import time
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from manyheads.data.images import digits
from manyheads.layers.biformer import BiLevelRoutingAttention
from manyheads.models.evaluation import count_flops
from manyheads.models.vision.biformer import VARIANTS, BiFormer
from manyheads.ops.bilevel_routing import Routing, bilevel_routing_attention, region_means
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

SEEDS = 3
TINY = {"depths": (1, 1), "embed_dims": (32, 64), "head_dim": 16}


def cost_grows_with_four_thirds(seed: int) -> Finding:
    """Count the operator's multiply-adds at the best region count for 2^8 ... 2^16 tokens and fit the exponent.

    The projections, 3 N C^2 and linear, are left out: the claim is about what grows faster.
    """
    topk, width = 4, 32
    tokens, counts, chosen = [], [], []
    for power in range(8, 17, 2):
        side = 2 ** (power // 2)
        # Regions per side must divide the side; the continuous optimum is R = (k N^2 / 2)^(1/3).
        best = min((_operations(side, 2**p, topk, width), 2**p) for p in range(1, power // 2))
        tokens.append(side * side)
        counts.append(best[0])
        chosen.append(best[1] ** 2)
    exponent = _slope(tokens, counts)
    continuous = [2 * r * r * width + 2 * n * topk * (n / r) * width
                  for n in (2.0**p for p in range(8, 17)) for r in [(topk * n * n / 2) ** (1 / 3)]]  # fmt: skip
    formula = _slope([2.0**p for p in range(8, 17)], continuous)

    generator = torch.Generator().manual_seed(seed)
    seconds = []
    for side in (56, 112):
        x = torch.randn(1, 2, side, side, 32, generator=generator)
        bilevel_routing_attention(x, x, x, regions=7, topk=1)
        start = time.perf_counter()
        bilevel_routing_attention(x, x, x, regions=7, topk=1)
        seconds.append(time.perf_counter() - start)
    holds = abs(formula - 4 / 3) <= 0.05 and abs(exponent - 4 / 3) <= 0.05
    details = {"tokens": tokens, "multiply_adds": counts, "regions": chosen, "seconds_at_56_and_112": seconds}
    return Finding(
        {"counted": exponent, "formula": formula}, 4 / 3, Verdict.CONFIRMED if holds else Verdict.REFUTED, details
    )


def routing_finds_the_twin(seed: int) -> Finding:
    """Train on mosaics in which one of three digits appears twice, with learnt routing and with random routing."""
    accuracy: dict[str, list[float]] = {"routed": [], "random": []}
    found, chance = [], []
    for offset in range(SEEDS):
        for name, random in (("routed", False), ("random", True)):
            score, twin, expected = _train_on_mosaics(seed + offset, random=random)
            accuracy[name].append(score)
            if not random:
                found.append(twin)
                chance.append(expected)
    routed, random_routed = mean(accuracy["routed"]), mean(accuracy["random"])
    verdict = Verdict.CONFIRMED if mean(found) > mean(chance) else Verdict.INCONCLUSIVE
    if routed < random_routed:
        verdict = Verdict.REFUTED
    return Finding(
        {"accuracy": routed, "twin_found": mean(found)},
        {"accuracy": random_routed, "twin_found": mean(chance)},
        verdict,
        {"per_seed": accuracy, "twin_found_per_seed": found},
    )


def better_than_other_patterns(seed: int) -> Finding:
    """Train the same net on digits with bi-level routing, with windows, and with rows and columns in turn."""
    scores = {
        kind: [
            accuracy_on_digits(
                lambda kind=kind: BiFormer(
                    num_classes=10, **TINY, regions=4, topks=(4, 4), stem="patch", pos_embed=False, attention=kind
                ),
                seed + offset,
                epochs=4,
            )
            for offset in range(SEEDS)
        ]
        for kind in ("bra", "window", "axial")
    }
    return compare(scores, "bra", ("window", "axial"))


def sizes_are_as_published(seed: int) -> Finding:
    """Count parameters and multiply-adds of the three models, which the published accuracies belong to."""
    published = {"tiny": (13.1e6, 2.2e9), "small": (25.5e6, 4.5e9), "base": (56.8e6, 9.8e9)}
    measured, errors = {}, []
    for name, (parameters, operations) in published.items():
        with torch.device("meta"):
            model = BiFormer(**VARIANTS[f"biformer_{name}"]).eval()
            counted = count_flops(model, torch.zeros(1, 3, 224, 224)) / 2
        size = sum(parameter.numel() for parameter in model.parameters())
        measured |= {f"{name}_parameters": float(size), f"{name}_multiply_adds": float(counted)}
        errors += [abs(size / parameters - 1), abs(counted / operations - 1)]
    baseline = {f"{name}_{what}": pair[i] for name, pair in published.items()
                for i, what in enumerate(("parameters", "multiply_adds"))}  # fmt: skip
    return Finding(measured, baseline, Verdict.CONFIRMED if max(errors) <= 0.03 else Verdict.REFUTED)


class _RandomRouting(BiLevelRoutingAttention):
    """The ablation: as many regions, drawn at random."""

    def descriptors(self, query: Tensor, key: Tensor, regions: tuple[int, int]) -> tuple[Tensor, Tensor]:
        query_means, key_means = region_means(query, regions), region_means(key, regions)
        return torch.randn_like(query_means), torch.randn_like(key_means)


def _train_on_mosaics(seed: int, *, random: bool) -> tuple[float, float, float]:
    regions, topk = 4, 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BiFormer(num_classes=10, **TINY, regions=regions, topks=(topk, -2))
        if random:
            for block in model.stages[0].blocks:  # pyright: ignore[reportGeneralTypeIssues]
                block.attn.__class__ = _RandomRouting
        images, labels, test_images, test_labels = digits(16, seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        steps = 240
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
        model.train()
        for _ in range(steps):
            mosaics, twice, _ = _mosaics(images, labels, 64)
            F.cross_entropy(model(mosaics), twice).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        model.eval()
        mosaics, twice, places = _mosaics(test_images, test_labels, 512)
        with torch.inference_mode():
            score = float((model(mosaics).argmax(-1) == twice).float().mean())
            twin = _twin_rate(model, mosaics, places, regions)
    return score, twin, topk / regions**2


def _mosaics(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mosaics, the label that appears twice, its two quadrants): the same picture twice, and two of other digits."""
    chosen = torch.randint(len(labels), (count, 3))
    for column in (1, 2):
        while (clash := labels[chosen[:, column]] == labels[chosen[:, 0]]).any():
            chosen[clash, column] = torch.randint(len(labels), (int(clash.sum()),))
    order = torch.rand(count, 4).argsort(1)
    pictures = images[chosen[:, [0, 0, 1, 2]]]
    pictures = torch.zeros_like(pictures).scatter_(1, order[:, :, None, None, None].expand_as(pictures), pictures)
    rows = [torch.cat((pictures[:, i], pictures[:, i + 1]), dim=-1) for i in (0, 2)]
    return torch.cat(rows, dim=-2), labels[chosen[:, 0]], order[:, :2]


def _twin_rate(model: BiFormer, mosaics: Tensor, places: Tensor, regions: int) -> float:
    """How often a region on one twin is routed to the region at the same place of the other twin."""
    stage: Any = model.stages[0]
    block: Any = stage.get_submodule("blocks").get_submodule("0")
    x = block.norm1(block.pos_embed(stage.downsample(mosaics).permute(0, 2, 3, 1)))
    query, key, _ = (
        part.unflatten(-1, (block.attn.heads, -1)).movedim(3, 1) for part in block.attn.qkv(x).chunk(3, -1)
    )
    found = bilevel_routing_attention(
        query, key, key, regions=regions, topk=block.attn.topk, return_routing=True, scale=1.0
    )
    chosen_regions = cast(Routing, found[1]).index
    half = regions // 2
    hits = []
    for a, b in ((0, 1), (1, 0)):
        for i in range(half):
            for j in range(half):
                here, there = ((places[:, t] // 2 * half + i) * regions + places[:, t] % 2 * half + j for t in (a, b))
                chosen = chosen_regions[torch.arange(len(mosaics)), here]
                hits.append((chosen == there[:, None]).any(-1).float().mean().item())
    return mean(hits)


def _operations(side: int, regions: int, topk: int, width: int) -> int:
    """Multiply-adds of routing and token attention, counted on the running operator without computing anything."""
    if topk > regions**2:
        return 10**18
    x = torch.empty(1, 1, side, side, width, device="meta")
    with FlopCounterMode(display=False) as counter:
        bilevel_routing_attention(x, x, x, regions=regions, topk=topk)
    return counter.get_total_flops() // 2


def _slope(xs: list, ys: list) -> float:
    log_x, log_y = ([math.log(value) for value in values] for values in (xs, ys))
    centre_x, centre_y = mean(log_x), mean(log_y)
    top = sum((x - centre_x) * (y - centre_y) for x, y in zip(log_x, log_y))
    return top / sum((x - centre_x) ** 2 for x in log_x)


CLAIMS = [
    Claim(
        system="biformer",
        name="four_thirds_cost",
        statement="With the best number of regions, bi-level routing attention costs O(tokens^(4/3)).",
        rule="Confirmed if the exponents fitted to the formula at the optimal region count and to operations counted "
        "at the best power of two are both within 0.05 of 4/3; refuted otherwise.",
        run=cost_grows_with_four_thirds,
    ),
    Claim(
        system="biformer",
        name="routing_finds_relevant_regions",
        statement="A region is routed to the regions that matter for it, and that helps.",
        rule="On mosaics with a digit twice, over 3 seeds: refuted if random routing classifies better; otherwise "
        "confirmed if a region finds its twin more often than chance (k / regions), inconclusive if not.",
        run=routing_finds_the_twin,
        full_scale="manyheads train biformer_stl --data imagenet --attention bra",
    ),
    Claim(
        system="biformer",
        name="better_than_static_patterns",
        statement="At equal cost, bi-level routing classifies better than windows or axial attention (82.7 to 81.3).",
        rule="Means over 3 seeds, margin twice the standard error of a difference: confirmed if bi-level routing is "
        "no more than the margin below the best rival, refuted if more than that below both, else inconclusive.",
        run=better_than_other_patterns,
        full_scale="manyheads train biformer_stl --data imagenet --attention window",
    ),
    Claim(
        system="biformer",
        name="published_models",
        statement="The models of 13.1, 25.5 and 56.8 M parameters reach 81.4, 83.8 and 84.3 % on ImageNet-1k.",
        rule="Here only the sizes: confirmed if parameters and multiply-adds are within 3 % of the published ones.",
        run=sizes_are_as_published,
        full_scale="manyheads evaluate biformer_small --data imagenet --checkpoint biformer_small_best.pth",
    ),
]
