"""The claims of "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.bench.speed import peak_bytes
from manyheads.models import create_model
from manyheads.models.vision.halonet import HaloNet
from manyheads.ops.halo import halo_attention
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

SIDE, BLOCK, HALO, HEADS, WIDTH = 64, 8, 3, 4, 16
PAPER = {"h0": 5.5, "h1": 8.1, "h2": 9.4, "h3": 11.8, "h4": 19.1, "h5": 30.7, "h6": 43.4, "h7": 67.4}


def as_small_as_efficientnets(seed: int) -> Finding:
    """Count the parameters of the whole family against the paper's table."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(f"halonet_{name}").parameters()) / 1e6 for name in PAPER}
    fits = all(abs(counts[name] - size) < 0.1 for name, size in PAPER.items())
    return Finding(counts, {name: float(size) for name, size in PAPER.items()},
                   Verdict.CONFIRMED if fits else Verdict.REFUTED)  # fmt: skip


def blocks_save_memory(seed: int) -> Finding:
    """Peak memory of the operator and of a window of the same size gathered for every position."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, HEADS, SIDE, SIDE, WIDTH, generator=generator)
    with torch.inference_mode():
        ours = peak_bytes(lambda: halo_attention(q, k, v, block=BLOCK, halo=HALO))
        theirs = peak_bytes(lambda: _gathered_for_every_position(q, k, v))
    ratio = theirs / ours
    verdict = Verdict.CONFIRMED if ratio >= 10 else Verdict.REFUTED if ratio <= 1 else Verdict.INCONCLUSIVE
    return Finding({"peak_bytes": float(ours)}, {"peak_bytes": float(theirs)}, verdict, {"ratio": ratio})


def attention_beats_convolution(seed: int) -> Finding:
    """Train nets of equal widths on digits, one with halo attention and one with 3 x 3 convolutions."""
    nets = {"attention": ("aa", "aa"), "convolution": ("bb", "bb")}
    scores = {
        name: [accuracy_on_digits(lambda patterns=patterns: _tiny(patterns), 3 * seed + run) for run in range(3)]
        for name, patterns in nets.items()
    }
    sizes = {name: sum(p.numel() for p in _tiny(patterns).parameters()) for name, patterns in nets.items()}
    finding = compare(scores, "attention", ("convolution",))
    if finding.verdict is Verdict.CONFIRMED and sizes["attention"] >= sizes["convolution"]:
        finding = dataclasses.replace(finding, verdict=Verdict.REFUTED)
    return dataclasses.replace(finding, details={**finding.details, "parameters": sizes})


def published_accuracy(seed: int) -> Finding:
    """Say that the accuracy needs ImageNet and training: the authors published no weights."""
    return Finding(
        {"top1": float("nan")},
        {"top1": 84.9},
        Verdict.INCONCLUSIVE,
        {"reason": "only training on ImageNet at 600 pixels tells; the authors published no weights"},
    )


def _gathered_for_every_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    window = BLOCK + 2 * HALO
    keys, values = (
        F.pad(x, (0, 0, window // 2, window - 1 - window // 2, window // 2, window - 1 - window // 2))
        .unfold(2, window, 1).unfold(3, window, 1).flatten(5).contiguous()
        for x in (k, v)
    )  # fmt: skip
    scores = torch.einsum("bhxyd,bhxydw->bhxyw", q * WIDTH**-0.5, keys)
    return torch.einsum("bhxyw,bhxydw->bhxyd", scores.softmax(-1), values)


def _tiny(patterns: tuple[str, str]) -> HaloNet:
    return HaloNet(
        num_classes=10, patterns=patterns, embed_dims=(32, 64), strides=(1, 2), ratios=(1, 1), heads=(4, 4), block=4,
        halo=1, stem_width=16,
    )  # fmt: skip


CLAIMS = (
    Claim(
        system="halonet",
        name="as_small_as_efficientnets",
        statement="H0 to H7 have the parameters of EfficientNet B0 to B7, whatever the window.",
        rule="Confirmed when all eight counts round to the paper's table (within 0.1 million), else refuted.",
        run=as_small_as_efficientnets,
    ),
    Claim(
        system="halonet",
        name="blocks_save_memory",
        statement="Sharing a window among a block's queries saves the memory of a window for every query.",
        rule="Peak bytes on a 64 x 64 map with block 8 and halo 3, against windows of the same size gathered for every "
        "position. Confirmed at ten times less or better, refuted when not less, else inconclusive.",
        run=blocks_save_memory,
    ),
    Claim(
        system="halonet",
        name="attention_beats_convolution",
        statement="Halo attention instead of 3 x 3 convolutions classifies at least as well with fewer parameters.",
        rule="Mean accuracy on digits over 3 seeds. Confirmed when attention is at most a margin (twice the standard "
        "error of a difference) below convolution and has fewer parameters; refuted when further below, or larger.",
        run=attention_beats_convolution,
        full_scale="manyheads train halonet_h1 --data imagenet",
    ),
    Claim(
        system="halonet",
        name="published_accuracy",
        statement="H7 reaches 84.9% top-1 on ImageNet.",
        rule="Inconclusive here: there are no published weights, and training needs ImageNet.",
        run=published_accuracy,
        full_scale="manyheads train halonet_h7 --data imagenet --image-size 640",
    ),
)
