"""The claims of "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function".

Source: arXiv 2403.02411.
"""

from __future__ import annotations

from functools import partial
from statistics import mean

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manyheads.bench.speed import measure
from manyheads.layers.mixer_gate import MixerGating
from manyheads.layers.spectral import FullAttention
from manyheads.models.vision.ninformer import MIXERS, NiNformer
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits

SEEDS = 3
EPOCHS = 30
LENGTHS = (16, 64, 256, 1024)
WIDTH, HIDDEN = 256, 512


def the_gate_helps(seed: int) -> Finding:
    """Train the gated net, its inner mixer alone, a ViT and a local ViT of the same width and depth on digits."""
    scores = {mixer: [_accuracy(mixer, SEEDS * seed + run) for run in range(SEEDS)] for mixer in MIXERS}
    means = {mixer: mean(values) for mixer, values in scores.items()}
    beats_both = means["gated"] > max(means["attention"], means["local"])
    verdict = Verdict.CONFIRMED if beats_both else Verdict.INCONCLUSIVE
    if means["gated"] < means["mlp"]:
        verdict = Verdict.REFUTED
    baseline = {mixer: round(means[mixer], 4) for mixer in MIXERS if mixer != "gated"}
    return Finding(round(means["gated"], 4), baseline, verdict, {"per_seed": scores})


def little_slower_than_a_mixer(seed: int) -> Finding:
    """Time one forward pass of the published size, batch 8, beside its baselines."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = torch.randn(8, 3, 32, 32)
        nets = {mixer: torch.inference_mode()(NiNformer(mixer=mixer).eval()) for mixer in MIXERS}
    times = measure(nets, [images], repeats=15, memory=False)
    seconds = {mixer: timing.seconds for mixer, timing in times.items()}
    ratio = seconds["gated"] / seconds["mlp"]
    verdict = Verdict.INCONCLUSIVE
    if ratio <= 1.25 or ratio > 2:
        verdict = Verdict.CONFIRMED if ratio <= 1.25 else Verdict.REFUTED
    beside = {mixer: round(seconds[mixer] / seconds["mlp"], 3) for mixer in ("attention", "local")}
    return Finding(round(ratio, 3), beside, verdict, {"seconds": seconds})


def linear_in_tokens(seed: int) -> Finding:
    """Count the unit's operations on growing numbers of tokens with hidden width fixed, beside attention's."""
    fixed = {n: _operations(MixerGating(WIDTH, n, HIDDEN), (1, n, WIDTH)) / n for n in LENGTHS}
    growing = {n: _operations(MixerGating(WIDTH, n, n, HIDDEN), (1, n, WIDTH)) / n for n in LENGTHS}
    attention = {n: _operations(FullAttention(WIDTH, 4, fused=True), (1, 1, n, WIDTH)) / n for n in LENGTHS}
    spread = max(fixed.values()) / min(fixed.values()) - 1
    last, first = LENGTHS[-1], LENGTHS[0]
    rises = attention[last] > attention[first]
    details = {"per_token": fixed, "per_token_attention": attention, "per_token_hidden_as_tokens": growing}
    confirmed = spread == 0 and rises
    return Finding(spread, attention[last] / attention[first] - 1, _verdict(confirmed), details)


def published_size(seed: int) -> Finding:
    """Count the parameters of the network trained on CIFAR-10; its accuracy needs the full data."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in NiNformer().parameters())
    fits = count == 2_652_170
    reason = "the size agrees; the accuracies need CIFAR" if fits else "the size differs"
    return Finding(float(count), 2_652_170.0, Verdict.INCONCLUSIVE if fits else Verdict.REFUTED, {"reason": reason})


def _accuracy(mixer: str, seed: int) -> float:
    build = partial(
        NiNformer, img_size=8, patch_size=2, embed_dim=32, depth=3, mlp_dim=64, mixer=mixer, num_heads=2, dropout=0.0
    )
    return accuracy_on_digits(
        build, seed, size=8, epochs=EPOCHS, learning_rate=1e-3, weight_decay=0.0, constant_rate=True
    )


def _operations(layer: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.to("meta").eval()(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def _verdict(holds: bool) -> Verdict:
    return Verdict.CONFIRMED if holds else Verdict.REFUTED


CLAIMS = (
    Claim(
        system="ninformer",
        name="the_gate_helps",
        statement="A net of gated blocks classifies better than an MLP-Mixer, a ViT and a LocalViT of the same width "
        "and depth.",
        rule="Mean accuracy on digits of 8 x 8 pixels over 3 seeds: patches of 2 x 2, 3 blocks, 32 channels, 64 hidden "
        "units, no dropout, 30 epochs of Adam at 1e-3. Confirmed when the gated net is at least the mixer and above "
        "both ViTs; refuted when it is below the mixer, so that the gate does not help; else inconclusive.",
        run=the_gate_helps,
        full_scale="manyheads train ninformer_cifar10 --data uoft-cs/cifar10 --batch-size 128",
    ),
    Claim(
        system="ninformer",
        name="little_slower_than_a_mixer",
        statement="It takes little more inference time than the MLP-Mixer.",
        rule="The CIFAR size, batch 8, medians of 15 in turn: the gated net's time by that of its inner mixers alone. "
        "Confirmed at 1.25 or less, refuted above 2, else inconclusive.",
        run=little_slower_than_a_mixer,
        full_scale="manyheads evaluate ninformer_cifar10 --data uoft-cs/cifar10",
    ),
    Claim(
        system="ninformer",
        name="linear_in_tokens",
        statement="The gate makes no N x N matrix: its cost is linear in the number of tokens at fixed hidden widths.",
        rule="Operations a token by torch's counter for 16 to 1024 tokens, 256 channels, 512 hidden units: confirmed "
        "when they do not depend on the number of tokens while attention's do, else refuted. (Where the hidden units "
        "grow with the tokens, the cost is quadratic; the details show it.)",
        run=linear_in_tokens,
    ),
    Claim(
        system="ninformer",
        name="published_accuracy",
        statement="Higher accuracy than ViT, MLP-Mixer and Local-ViT on MNIST, CIFAR-10 and CIFAR-100.",
        rule="Here only the size can be checked: refuted unless it is the published net's 2,652,170 parameters, else "
        "inconclusive.",
        run=published_size,
        full_scale="manyheads train ninformer_cifar100 --data uoft-cs/cifar100 --batch-size 128",
    ),
)
