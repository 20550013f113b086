"""The claims of "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor

from manyheads.layers.spectral import FullAttention, SpectralGating
from manyheads.models import create_model
from manyheads.models.vision.spectformer import SpectFormer
from manyheads.ops.spectral import spectral_gating
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

DEPTH, ALPHA = 6, 2
SEEDS = 3
WIDTH = 64
SIDES = (14, 28, 56, 112)


def a_mixture_is_best(seed: int) -> Finding:
    """Train nets of equal shape on digits: two of six blocks are spectral, none is, or all are."""
    alphas = {"mixed": ALPHA, "attention": 0, "spectral": DEPTH}
    scores = {name: [_accuracy(alpha, SEEDS * seed + run) for run in range(SEEDS)] for name, alpha in alphas.items()}
    return compare(scores, "mixed", ("attention", "spectral"))


def spectral_first_is_the_right_order(seed: int) -> Finding:
    """Train the mixed net on digits with the spectral blocks first and with them last."""
    scores = {
        order: [_accuracy(ALPHA, SEEDS * seed + run, order) for run in range(SEEDS)]
        for order in ("spectral_first", "attention_first")
    }
    return compare(scores, "spectral_first", ("attention_first",))


def the_filter_is_a_global_convolution(seed: int) -> Finding:
    """Compare the filter with a circular convolution written out position by position."""
    generator = torch.Generator().manual_seed(seed)
    x, kernel = (torch.randn(*shape, 4, generator=generator, dtype=torch.double) for shape in ((1, 8, 7), (8, 7)))
    expected = torch.zeros_like(x)
    for i in range(8):
        for j in range(7):
            expected += kernel[i, j] * x.roll((i, j), (1, 2))
    out = spectral_gating(x, torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1))))
    error = ((out - expected).abs().max() / expected.abs().max()).item()
    return Finding(error, 0.0, Verdict.CONFIRMED if error < 1e-10 else Verdict.REFUTED)


def cheaper_at_high_resolution(seed: int) -> Finding:
    """Time both mixers with their projections, in turn, on growing maps."""
    generator = torch.Generator().manual_seed(seed)
    ratios: dict[str, float] = {}
    seconds: dict[str, dict[str, float]] = {}
    for side in SIDES:
        x = torch.randn(1, side, side, WIDTH, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = {"spectral": SpectralGating(WIDTH, (side, side)), "attention": FullAttention(WIDTH, 2, fused=True)}
        seconds[str(side)] = _times(layers, x)
        ratios[str(side)] = seconds[str(side)]["attention"] / seconds[str(side)]["spectral"]
    values = list(ratios.values())
    holds = values[-1] > 1 and values[-1] > values[0]
    return Finding(ratios, None, Verdict.CONFIRMED if holds else Verdict.REFUTED, {"seconds": seconds})


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the released variants; their accuracy needs ImageNet."""
    paper = {"spectformer_s": 22.2e6, "spectformer_b": 33.1e6, "spectformer_l": 54.7e6}
    paper |= {"spectformer_vanilla_ti": 9e6, "spectformer_vanilla_s": 32e6, "spectformer_vanilla_b": 57e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 0.5e6 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


def _accuracy(alpha: int, seed: int, order: str = "spectral_first") -> float:
    def build() -> SpectFormer:
        shape: dict[str, Any] = {
            "img_size": 32,
            "patch_size": 4,
            "embed_dim": WIDTH,
            "depth": DEPTH,
            "num_heads": 2,
            "mlp_ratio": 2,
        }
        return SpectFormer(num_classes=10, alpha=alpha, order=order, **shape)

    return accuracy_on_digits(build, seed, epochs=4)


def _times(layers: dict[str, torch.nn.Module], x: Tensor) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for repeat in range(6):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x)
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


CLAIMS = (
    Claim(
        system="spectformer",
        name="a_mixture_is_best",
        statement="Spectral and attention blocks together classify better than either kind alone at equal size.",
        rule="Mean accuracy on digits over 3 seeds, 6 blocks of which 2, none or all are spectral. Confirmed when the "
        "mixture is at most a margin (twice the standard error of a difference) below the better of the others, "
        "refuted when it is further than that below both.",
        run=a_mixture_is_best,
        full_scale="manyheads train spectformer_s --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="spectformer",
        name="spectral_first_is_the_right_order",
        statement="Spectral blocks belong before the attention blocks, not behind them.",
        rule="The same nets, 3 seeds. Confirmed when the mean accuracy with spectral blocks first is at most a margin "
        "(as above) below that with them last, else refuted.",
        run=spectral_first_is_the_right_order,
        full_scale="manyheads train spectformer_vanilla_s --data imagenet --option order=attention_first",
    ),
    Claim(
        system="spectformer",
        name="the_filter_is_a_global_convolution",
        statement="A spectral block mixes all positions: its filter is a circular convolution of the size of the map.",
        rule="Confirmed when both differ by less than 1e-10 of the largest value in float64, else refuted.",
        run=the_filter_is_a_global_convolution,
    ),
    Claim(
        system="spectformer",
        name="cheaper_at_high_resolution",
        statement="The filter is cheaper than attention on large maps.",
        rule="Both mixers, 64 channels, maps of 14 to 112 a side, medians of 5 in turn: attention's time by the "
        "filter's. Confirmed when it is above 1 at 112 and larger there than at 14, else refuted.",
        run=cheaper_at_high_resolution,
    ),
    Claim(
        system="spectformer",
        name="published_accuracy",
        statement="84.3, 85.0 and 85.7% top-1 on ImageNet with 22.2, 33.1 and 54.7 million parameters (hierarchical).",
        rule="Here only the sizes can be counted: refuted when one is more than 0.5 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate spectformer_s --data imagenet --checkpoint spectformer_s.pth",
    ),
)
