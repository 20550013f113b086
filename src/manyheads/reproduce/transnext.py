"""The claims of "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from manyheads.data.images import digits
from manyheads.layers.conv_ffn import ConvGLU
from manyheads.layers.transnext import TEMPERATURE
from manyheads.models import create_model
from manyheads.models.vision.transnext import TransNeXt
from manyheads.ops.aggregated import length_scaled_query
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

SIDES = (7, 14, 28, 56)
HEAD_DIM = 24
SEEDS = 3
TINY = {"num_classes": 10, "embed_dims": (24, 48), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (2, 1)}
COARSE = {**TINY, "sr_ratios": (4, 2)}
RATIO = 3
LEARNING_RATE = 5e-3


def entropy_stays(seed: int) -> Finding:
    """Attention of random unit vectors to 49 ... 3136 keys, with the log of the length in the scale and without."""
    generator = torch.Generator().manual_seed(seed)
    temperature = torch.full((1, 1, 1), TEMPERATURE)
    entropies: dict[str, list[float]] = {"length_scaled": [], "fixed_scale": []}
    for side in SIDES:
        keys = side * side
        query = F.normalize(torch.randn(1, 1, 256, HEAD_DIM, generator=generator), dim=-1)
        key = F.normalize(torch.randn(1, 1, keys, HEAD_DIM, generator=generator), dim=-1)
        for name, length in (("length_scaled", keys), ("fixed_scale", SIDES[0] ** 2)):
            weights = (length_scaled_query(query, temperature, length) @ key.mT).softmax(-1)
            entropies[name].append(torch.special.entr(weights).sum(-1).mean().item())
    keys = [side * side for side in SIDES]
    shares = {name: [h / math.log(n) for h, n in zip(values, keys)] for name, values in entropies.items()}
    drift = {name: max(values) - min(values) for name, values in shares.items()}
    verdict = Verdict.CONFIRMED if drift["length_scaled"] < drift["fixed_scale"] else Verdict.REFUTED
    details = {"keys": keys, "nats": entropies, "share_of_log": shares}
    return Finding(drift["length_scaled"], drift["fixed_scale"], verdict, details)


def extrapolates(seed: int) -> Finding:
    """Train on digits of 64 pixels, then read them at 96 and 128 with biases extrapolated and interpolated."""
    trained: list[TransNeXt] = []

    def build() -> TransNeXt:
        trained.append(TransNeXt(**COARSE, mlp_ratios=(RATIO, RATIO), img_size=64))
        return trained[0]

    at_64 = accuracy_on_digits(build, seed, size=64, epochs=10, learning_rate=LEARNING_RATE)
    found: dict[str, dict[str, float]] = {}
    for mode in ("extrapolate", "interpolate"):
        model = TransNeXt(**COARSE, mlp_ratios=(RATIO, RATIO), img_size=64, position_bias=mode).eval()
        model.load_state_dict(trained[0].state_dict())
        found[mode] = {str(size): _accuracy(model, size, seed) for size in (96, 128)}
    means = {mode: mean(scores.values()) for mode, scores in found.items()}
    verdict = Verdict.CONFIRMED if means["extrapolate"] >= means["interpolate"] else Verdict.REFUTED
    details = {"trained_at_64": at_64, "per_size": found}
    return Finding(means["extrapolate"], means["interpolate"], verdict, details)


def gating_by_convolution_helps(seed: int) -> Finding:
    """Train nets on digits whose channel mixers are convolutional GLUs, GLUs and MLPs of equal size."""
    mixers: dict[str, Callable[[int], nn.Module]] = {
        "conv_glu": lambda dim: ConvGLU(dim, 2 * RATIO * dim // 3),
        "glu": lambda dim: _GLU(dim, 2 * RATIO * dim // 3),
        "mlp": lambda dim: Mlp(dim, RATIO * dim),
    }
    scores = {
        name: [
            accuracy_on_digits(
                lambda mixer=mixer: _with_mixer(mixer), SEEDS * seed + run, epochs=6, learning_rate=LEARNING_RATE
            )
            for run in range(SEEDS)
        ]
        for name, mixer in mixers.items()
    }
    return compare(scores, "conv_glu", ("glu", "mlp"))


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the released variants; their accuracy needs ImageNet."""
    paper = {"transnext_micro": 12.8e6, "transnext_tiny": 28.2e6, "transnext_small": 49.7e6, "transnext_base": 89.7e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 1e5 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


class _GLU(nn.Module):
    """The convolutional GLU without its convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.gelu(gate) * value)


def _with_mixer(mixer: Callable[[int], nn.Module]) -> TransNeXt:
    model = TransNeXt(**TINY, mlp_ratios=(RATIO, RATIO), img_size=64, pretrain_size=64)
    for stage, dim in zip(model.stages, TINY["embed_dims"]):
        for block in stage.get_submodule("blocks").children():
            block.add_module("mlp", mixer(dim))
    return model


def _accuracy(model: TransNeXt, size: int, seed: int) -> float:
    _, _, images, labels = digits(size, seed=seed)
    with torch.inference_mode():
        guesses = torch.cat([model(part).argmax(-1) for part in images.split(64)])
    return (guesses == labels).float().mean().item()


CLAIMS = (
    Claim(
        system="transnext",
        name="entropy_stays",
        statement="Scaling cosine attention by the log of its length keeps its entropy stable across sizes.",
        rule="Random unit vectors of 24 channels, 49 to 3136 keys, temperature at its start value: the drift (largest "
        "minus smallest) of the entropy divided by the log of the number of keys. Confirmed when it is smaller with "
        "the log of the length than with the scale of 49 keys, else refuted.",
        run=entropy_stays,
    ),
    Claim(
        system="transnext",
        name="extrapolates",
        statement="Biases computed for the actual distances carry a model to larger images better than resized ones.",
        rule="A tiny net trained on digits of 64 pixels, tested at 96 and 128. Confirmed when the mean accuracy with "
        "extrapolated biases is at least that with interpolated ones, else refuted.",
        run=extrapolates,
        full_scale="manyheads evaluate transnext_tiny --data imagenet --image-size 640 --checkpoint "
        "DaiShiResearch/transnext-tiny-224-1k --option pretrain_size=224",
    ),
    Claim(
        system="transnext",
        name="gating_by_convolution_helps",
        statement="The convolutional GLU is a better channel mixer than the GLU and the MLP of equal size.",
        rule="Mean accuracy on digits over 3 seeds. Confirmed when it is at most a margin (twice the standard error of "
        "a difference) below the better of the two, refuted when it is further than that below both.",
        run=gating_by_convolution_helps,
        full_scale="manyheads train transnext_micro --data imagenet --batch-size 1024 --dtype bfloat16",
    ),
    Claim(
        system="transnext",
        name="published_accuracy",
        statement="82.5, 84.0, 84.7 and 84.8% top-1 on ImageNet with 12.8, 28.2, 49.7 and 89.7 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.1 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate transnext_base --data imagenet "
        "--checkpoint DaiShiResearch/transnext-base-224-1k",
    ),
)
