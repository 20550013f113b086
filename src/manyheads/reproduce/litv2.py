"""The claims of "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213, as miniatures."""

from __future__ import annotations

import time
from statistics import mean, median

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from manyheads.data.images import photos
from manyheads.layers.davit import WindowAttention
from manyheads.layers.hilo import HiLoAttention
from manyheads.models import create_model
from manyheads.models.evaluation import count_flops
from manyheads.models.vision.litv2 import Block, LITv2
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

DIM, HEADS = 384, 12
SIDES = (14, 28)
REPEATS = 10
SEEDS = 3


class SpatialReductionAttention(nn.Module):
    """The rival of the pyramid transformers: all queries read keys of a map that a strided convolution shrank."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        query = rearrange(self.q(x), "b x y (h d) -> b h (x y) d", h=self.heads)
        reduced = self.norm(self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        key, value = rearrange(self.kv(reduced), "b x y (two h d) -> two b h (x y) d", two=2, h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(out, "b h (x y) d -> b x y (h d)", x=x.shape[1]))


def fewer_operations(seed: int) -> Finding:
    """Count the multiply-adds of HiLo and its rivals at two map sizes, and time HiLo against full attention."""
    layers = _layers(seed)
    with torch.device("meta"):
        counted = {
            side: {
                name: count_flops(layer.to("meta"), torch.zeros(1, side, side, DIM)) / 2
                for name, layer in _layers(seed).items()
            }
            for side in (*SIDES, 56)
        }
    cheaper = all(
        counted[side][hilo] < counted[side][rival]
        for side in SIDES
        for hilo in ("hilo 0.9", "hilo 0.5")
        for rival in ("window 7", "reduction 2", "full")
    )
    seconds = _times({name: layers[name] for name in ("hilo 0.9", "full")}, SIDES[-1], seed)
    faster = seconds["hilo 0.9"] < seconds["full"]
    verdict = Verdict.CONFIRMED if cheaper and faster else Verdict.INCONCLUSIVE if cheaper else Verdict.REFUTED
    at_28 = {name: count / 1e6 for name, count in counted[28].items()}
    return Finding(
        {name: at_28[name] for name in ("hilo 0.9", "hilo 0.5")} | {"ms": 1e3 * seconds["hilo 0.9"]},
        {name: at_28[name] for name in ("window 7", "reduction 2", "full")} | {"full_ms": 1e3 * seconds["full"]},
        verdict,
        {
            "multiply_adds": {str(side): counts for side, counts in counted.items()},
            "note": "at 56 x 56 window attention is the cheaper one, because the pooled map grows with the image",
        },
    )


def faster_on_cpu(seed: int) -> Finding:
    """Time HiLo, window attention and spatial reduction in turn, batch 4, at two map sizes."""
    names = ("hilo 0.9", "window 7", "reduction 2")
    layers = _layers(seed)
    seconds = {side: _times({name: layers[name] for name in names}, side, seed) for side in SIDES}
    ratios = {f"{name} at {side}": s[name] / s["hilo 0.9"] for side, s in seconds.items() for name in names[1:]}
    verdict = Verdict.INCONCLUSIVE
    if all(ratio > 1 for ratio in ratios.values()):
        verdict = Verdict.CONFIRMED
    elif all(ratio < 1 for ratio in ratios.values()):
        verdict = Verdict.REFUTED
    details = {"seconds": {str(side): values for side, values in seconds.items()}}
    return Finding(ratios, {"window 7": 1.6, "reduction 2": 1.4}, verdict, details)


def groups_split_frequencies(seed: int) -> Finding:
    """Train tiny nets on digits and look at the spectra of both groups' outputs on photographs."""
    shares: dict[str, list[float]] = {"high": [], "low": []}
    for run in range(SEEDS):
        trained: list[LITv2] = []

        def build(trained: list[LITv2] = trained) -> LITv2:
            trained.append(_tiny(0.5))
            return trained[0]

        accuracy_on_digits(build, SEEDS * seed + run, epochs=6)
        for photo in photos().values():
            image = F.interpolate(photo[None].float() / 255, size=(128, 128), mode="bilinear", antialias=True)
            for name, energy in _energy_above_half(trained[0], image).items():
                shares[name].append(energy)
    high, low = mean(shares["high"]), mean(shares["low"])
    return Finding(high, low, Verdict.CONFIRMED if high > low else Verdict.REFUTED, {"per_photo_and_seed": shares})


def a_mixture_is_best(seed: int) -> Finding:
    """Train nets of equal shape on digits with half of the heads low, with none and with all of them."""
    scores = {
        name: [accuracy_on_digits(lambda alpha=alpha: _tiny(alpha), SEEDS * seed + run, epochs=6) for run in range(3)]
        for name, alpha in (("mixed", 0.5), ("high", 0.0), ("low", 1.0))
    }
    return compare(scores, "mixed", ("high", "low"))


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the released variants; their accuracy needs ImageNet."""
    paper = {"litv2_small": 28e6, "litv2_medium": 49e6, "litv2_base": 87e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 0.5e6 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


def _layers(seed: int) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "hilo 0.9": HiLoAttention(DIM, HEADS, window=2, alpha=0.9).eval(),
            "hilo 0.5": HiLoAttention(DIM, HEADS, window=2, alpha=0.5).eval(),
            "window 7": WindowAttention(DIM, HEADS, window=7).eval(),
            "reduction 2": SpatialReductionAttention(DIM, HEADS, 2).eval(),
            "full": HiLoAttention(DIM, HEADS, window=1).eval(),
        }


def _times(layers: dict[str, nn.Module], side: int, seed: int) -> dict[str, float]:
    """Median seconds of a forward pass at batch 4; the layers take turns, so that noise hits all of them."""
    x = torch.randn(4, side, side, DIM, generator=torch.Generator().manual_seed(seed))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for repeat in range(REPEATS + 1):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x)
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def _tiny(alpha: float) -> LITv2:
    return LITv2(
        num_classes=10,
        embed_dim=32,
        depths=(1, 1),
        num_heads=(2, 4),
        attention=(True, True),
        windows=(2, 2),
        alpha=alpha,
        mlp_ratio=2,
    )


def _energy_above_half(model: LITv2, image: Tensor) -> dict[str, float]:
    """The high-frequency share of both groups' outputs, each the mean over the model's attention layers."""
    found: dict[str, list[float]] = {"high": [], "low": []}
    inputs: list[Tensor] = []
    layers = [block.attn for block in model.modules() if isinstance(block, Block) and block.attn is not None]
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    with torch.inference_mode():
        model.eval()(image)
        for layer, x in zip(layers, inputs, strict=True):
            for name, out in (("high", layer.high(x)), ("low", layer.low(x))):
                found[name].append(_share_above_half(out))
    for hook in hooks:
        hook.remove()
    return {name: mean(values) for name, values in found.items()}


def _share_above_half(maps: Tensor) -> float:
    """Share of the energy of (batch, X, Y, C), means removed, at frequencies above half of Nyquist's on either axis."""
    power = torch.fft.fft2(maps - maps.mean((1, 2), keepdim=True), dim=(1, 2)).abs().square().sum((0, 3))
    rows, columns = (torch.fft.fftfreq(side).abs() for side in power.shape)
    above = torch.maximum(rows[:, None], columns[None]) > 0.25
    return (power[above].sum() / power.sum()).item()


CLAIMS = (
    Claim(
        system="litv2",
        name="fewer_operations",
        statement="HiLo needs fewer operations than window attention, spatial reduction and full attention, and less "
        "time than full attention.",
        rule="One layer, 384 channels, 12 heads, windows of 2. Refuted when at 14 x 14 or 28 x 28 HiLo (alpha 0.9 or "
        "0.5) needs no fewer multiply-adds than any of the three; else confirmed when it is also faster than full "
        "attention at 28 x 28 (median of 10), inconclusive when not.",
        run=fewer_operations,
    ),
    Claim(
        system="litv2",
        name="faster_on_cpu",
        statement="On a CPU HiLo is 1.4 times as fast as spatial reduction and 1.6 times as fast as window attention.",
        rule="The same layers, batch 4, 14 x 14 and 28 x 28, medians of 10 rounds in turn; only the direction is "
        "judged. Confirmed when HiLo is faster than both at both sizes, refuted when slower than both at both.",
        run=faster_on_cpu,
    ),
    Claim(
        system="litv2",
        name="groups_split_frequencies",
        statement="The window heads capture high frequencies, the pooled heads low ones.",
        rule="Nets trained on digits (3 seeds), outputs of both groups on photographs of 128 x 128 pixels: the share "
        "of spectral energy above half the Nyquist frequency. Confirmed when the mean share of the window heads is "
        "larger, else refuted.",
        run=groups_split_frequencies,
    ),
    Claim(
        system="litv2",
        name="a_mixture_is_best",
        statement="Heads of both kinds classify at least as well as heads of one kind.",
        rule="Mean accuracy on digits over 3 seeds for alpha 0.5, 0 and 1. Confirmed when 0.5 is at most a margin "
        "(twice the standard error of a difference) below the better of the others, refuted when it is further than "
        "that below both.",
        run=a_mixture_is_best,
        full_scale="manyheads train litv2_small_alpha50 --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="litv2",
        name="published_accuracy",
        statement="82.0, 83.3 and 83.6% top-1 on ImageNet with 28, 49 and 87 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.5 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate litv2_small --data imagenet --checkpoint litv2_s.pth",
    ),
)
