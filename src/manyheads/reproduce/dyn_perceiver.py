"""The claims of "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, as miniatures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.data.images import digits
from manyheads.models import create_model
from manyheads.models.early_exit import confidences, find_thresholds, leaving
from manyheads.models.evaluation import count_flops
from manyheads.models.exit_evaluation import budget_curve, exit_flops
from manyheads.models.vision.dyn_perceiver import DynPerceiver
from manyheads.models.vision.dyn_perceiver_cnn import build_branch
from manyheads.objectives.self_distillation import self_distillation_loss
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import train_on_digits

SIZE, EPOCHS, SEEDS = 64, 5, 2
TAUGHT_SIZE, TAUGHT_EPOCHS = 32, 3
BRANCH = {"cnn": "mobilenet_v3", "width": 0.5}
SAVING, COMMON_POINTS = 0.8, 20
# (operations, accuracy), sorted by operations
Curve = list[tuple[float, float]]


class LinearExits(nn.Module):
    """The rival: the same convolutional network with a linear classifier after stages 3 and 4."""

    def __init__(self) -> None:
        super().__init__()
        branch = build_branch(BRANCH["cnn"], BRANCH["width"], 3, 0.0)
        self.early = nn.Sequential(branch.stem, *branch.stages[:3])
        self.late = branch.stages[3]
        self.classify = nn.ModuleList(nn.Linear(dim, 10) for dim in branch.widths[3:])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.early(image)
        return self.classify[0](x.mean((2, 3))), self.classify[1](self.late(x).mean((2, 3)))


@dataclass(frozen=True)
class Trained:
    """A trained net on the images of the training and of the test part."""

    calibration: Tensor  # (exits, n), confidence
    confidence: Tensor  # (exits, m)
    correct: Tensor  # (exits, m)
    flops: tuple[int, ...]

    @property
    def accuracy(self) -> list[float]:
        """Of each exit for all test images."""
        return self.correct.float().mean(dim=1).tolist()


def latent_exits_beat_linear_ones(seed: int) -> Finding:
    """Train the two-branch net and its convolutional branch with linear exits; compare their curves where both are."""
    gains, finals, details = [], {"ours": [], "linear": []}, []
    for run in range(SEEDS):
        ours, linear = _dynamic(SEEDS * seed + run), _linear(SEEDS * seed + run)
        ours_curve = sorted((point.flops, point.top1) for point in _budgets(ours))
        linear_curve = _two_exit_curve(linear)
        gains.append(_gain(ours_curve, linear_curve))
        finals["ours"].append(ours.accuracy[-1])
        finals["linear"].append(linear.accuracy[-1])
        details.append({"ours": ours_curve, "linear": linear_curve, "exits": [ours.accuracy, linear.accuracy]})
    final = {name: mean(values) for name, values in finals.items()}
    known = [gain for gain in gains if gain is not None]
    better, kept = len(known) == SEEDS and mean(known) > 0, final["ours"] >= final["linear"]
    verdict = Verdict.INCONCLUSIVE
    if better and kept:
        verdict = Verdict.CONFIRMED
    elif len(known) == SEEDS and not better and not kept:
        verdict = Verdict.REFUTED
    return Finding(
        {"curve_gain": mean(known) if known else float("nan"), "final": final["ours"]},
        {"final": final["linear"]},
        verdict,
        {"gains": gains, "runs": details},
    )


def early_exits_save_operations(seed: int) -> Finding:
    """Find the cheapest of the 33 budgets that is as accurate as the last exit for all."""
    ratios = []
    for run in range(SEEDS):
        ours = _dynamic(SEEDS * seed + run)
        enough = [point.flops for point in _budgets(ours) if point.top1 >= ours.accuracy[-1]]
        ratios.append(min(enough, default=float(ours.flops[-1])) / ours.flops[-1])
    share = mean(ratios)
    verdict = Verdict.CONFIRMED if share <= SAVING else Verdict.REFUTED if share >= 1 else Verdict.INCONCLUSIVE
    return Finding({"share_of_operations": share}, {"share_of_operations": 1.0}, verdict, {"per_seed": ratios})


def teaching_helps_early_exits(seed: int) -> Finding:
    """Train with both, without self-distillation, and without forward knowledge transfer; look at exits 1 and 2."""
    variants = {
        "both": {},
        "no distillation": {"distillation": 0.0},
        "no transfer": {"transfer": False},
    }
    scores: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(SEEDS):
        for name, options in variants.items():
            net = _train_dynamic(SEEDS * seed + run, TAUGHT_SIZE, TAUGHT_EPOCHS, **options)
            _, _, images, labels = digits(TAUGHT_SIZE, seed=SEEDS * seed + run)
            with torch.inference_mode():
                exits = [torch.stack(net.forward_exits(part, 2)).argmax(-1) for part in images.split(128)]
            scores[name].append((torch.cat(exits, dim=1) == labels).float().mean().item())
    means = {name: mean(values) for name, values in scores.items()}
    spread = mean(stdev(values) ** 2 for values in scores.values()) ** 0.5
    margin = 2 * spread * (2 / SEEDS) ** 0.5
    gains = [means["both"] - means[name] for name in scores if name != "both"]
    verdict = Verdict.INCONCLUSIVE
    if min(gains) > margin:
        verdict = Verdict.CONFIRMED
    elif max(gains) < -margin:
        verdict = Verdict.REFUTED
    return Finding(means.pop("both"), means, verdict, {"per_seed": scores, "margin": margin})


def published_sizes(seed: int) -> Finding:
    """Count parameters and operations of released variants; their accuracy needs ImageNet."""
    paper = {
        "dyn_perceiver_mobilenet_v3_0x75": (9.299, 0.266),
        "dyn_perceiver_regnet_y_800mf": (21.798, 1.298),
        "dyn_perceiver_resnet50_0x375": (20.283, None),
    }
    measured, fits = {}, True
    with torch.device("meta"):
        for name, (millions, giga) in paper.items():
            net = create_model(name).eval()
            measured[name] = sum(p.numel() for p in net.parameters()) / 1e6
            fits &= abs(measured[name] - millions) < 0.001
            if giga is not None:
                operations = exit_flops(net, torch.zeros(1, 3, 224, 224))[-1] / 2e9
                fits &= abs(operations - giga) < 0.01 * giga
    return Finding(
        measured,
        {name: millions for name, (millions, _) in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


@cache
def _dynamic(seed: int) -> Trained:
    net = _train_dynamic(seed)
    return _measure(net, seed, exit_flops(net, torch.zeros(1, 3, SIZE, SIZE)))


@cache
def _linear(seed: int) -> Trained:
    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return self_distillation_loss(net(images), labels, weights=(0.5, 1.0))

    net, _, _ = train_on_digits(
        lambda: _quick_statistics(LinearExits()), seed, size=SIZE, epochs=EPOCHS, loss=loss
    )  # fmt: skip
    assert isinstance(net, LinearExits)
    image = torch.zeros(1, 3, SIZE, SIZE)
    whole = count_flops(net, image)
    early = count_flops(nn.Sequential(net.early, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.classify[0]), image)
    return _measure(net, seed, (early, whole))


def _train_dynamic(seed: int, size: int = SIZE, epochs: int = EPOCHS, **options: Any) -> DynPerceiver:
    def build() -> nn.Module:
        return _quick_statistics(
            create_model(
                "dyn_perceiver_mobilenet_v3_0x5", num_classes=10, num_latents=16, mlp_ratio=1,
                depth_factor=(1, 1, 1, 1), drop_rate=0.0, **options,
            )
        )  # fmt: skip

    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(net, DynPerceiver)
        return net.training_loss(net(images), labels)

    net, _, _ = train_on_digits(build, seed, size=size, epochs=epochs, loss=loss)
    assert isinstance(net, DynPerceiver)
    return net


def _quick_statistics(net: nn.Module) -> nn.Module:
    """A hundred steps are too few for MobileNet's slow running means."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return net


def _measure(net: nn.Module, seed: int, flops: tuple[int, ...]) -> Trained:
    def exits(images: Tensor) -> Tensor:
        compute = net.forward_exits if isinstance(net, DynPerceiver) else net
        with torch.inference_mode():
            return torch.cat([torch.stack(compute(part)) for part in images.split(128)], dim=1)

    images, _, test_images, test_labels = digits(SIZE, seed=seed)
    found = exits(test_images)
    return Trained(confidences(exits(images)), confidences(found), found.argmax(-1) == test_labels, flops)


def _budgets(net: Trained):
    return budget_curve(net.calibration, net.confidence, net.correct, net.flops)


def _two_exit_curve(net: Trained) -> Curve:
    points = []
    for percent in range(0, 101, 3):
        exits = leaving(net.confidence, find_thresholds(net.calibration, (percent / 100, 1 - percent / 100)))
        right = net.correct.gather(0, exits[None]).float().mean().item()
        points.append((torch.tensor(net.flops, dtype=torch.double)[exits].mean().item(), right))
    return sorted(points)


def _gain(ours: Curve, rival: Curve) -> float | None:
    """Mean accuracy of ours less the rival's over the operations that both curves cover; None where there are none."""
    low, high = max(ours[0][0], rival[0][0]), min(ours[-1][0], rival[-1][0])
    if low >= high:
        return None
    costs = [low + (high - low) * i / (COMMON_POINTS - 1) for i in range(COMMON_POINTS)]
    return mean(_at(ours, cost) - _at(rival, cost) for cost in costs)


def _at(curve: Curve, cost: float) -> float:
    for (before, first), (after, second) in pairwise(curve):
        if before <= cost <= after:
            return first if after == before else first + (second - first) * (cost - before) / (after - before)
    return curve[0][1] if cost < curve[0][0] else curve[-1][1]


CLAIMS = (
    Claim(
        system="dyn_perceiver",
        name="latent_exits_beat_linear_ones",
        statement="Exits on a branch of latents beat linear exits on the convolutional maps at equal operations.",
        rule="MobileNetV3 0.5 on digits of 64 pixels, 16 latents, 5 epochs, 2 seeds; rival: the same network with "
        "linear exits after stages 3 and 4. Confirmed when the mean accuracy over the range of operations that both "
        "budgeted curves cover is higher and the last exit no worse; refuted when neither; inconclusive otherwise or "
        "without a common range.",
        run=latent_exits_beat_linear_ones,
        full_scale="manyheads train dyn_perceiver_mobilenet_v3_0x75 --data imagenet --batch-size 1024",
    ),
    Claim(
        system="dyn_perceiver",
        name="early_exits_save_operations",
        statement="Letting sure images leave early keeps the accuracy with fewer operations.",
        rule="The same nets, thresholds from training images, 33 budgets: the cheapest one that is at least as "
        "accurate on the test images as the last exit for all. Confirmed when it takes at most 80% of the operations "
        "(mean of 2 seeds), refuted when none takes fewer, inconclusive between.",
        run=early_exits_save_operations,
        full_scale="manyheads evaluate dyn_perceiver_mobilenet_v3_0x75 --data imagenet --exits --checkpoint "
        "mobilenetV3_0x75.pth#model_ema",
    ),
    Claim(
        system="dyn_perceiver",
        name="teaching_helps_early_exits",
        statement="Self-distillation and forward knowledge transfer help the early exits.",
        rule="The same net on digits of 32 pixels, 3 epochs, with both, without self-distillation and without "
        "transfer, 2 seeds, mean accuracy of exits 1 and 2. Confirmed when both together are above each of the others "
        "by more than a margin (twice the standard error of a difference), refuted when below each by more than that, "
        "else inconclusive.",
        run=teaching_helps_early_exits,
        full_scale="manyheads train dyn_perceiver_mobilenet_v3_0x75 --data imagenet --option distillation=0",
    ),
    Claim(
        system="dyn_perceiver",
        name="published_accuracy",
        statement="79.9, 77.7 and 74.6% top-1 on ImageNet at the last exit of RegNetY-800MF, ResNet-50 x 0.375 and "
        "MobileNetV3 x 0.75.",
        rule="Here only sizes and operations can be counted: refuted when a parameter count is more than 1,000 or the "
        "operations more than 1% off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate dyn_perceiver_regnet_y_800mf --data imagenet --checkpoint reg800m.pth#model_ema",
    ),
)
