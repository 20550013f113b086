"""The claims of "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image
Analysis", arXiv 2110.06063, as miniatures: digits among smaller digits that distract from them."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from manyheads.data.images import digits
from manyheads.layers.medusa import GlobalAttention, MultiScaleHeads, legacy_resize, semantic_image
from manyheads.models import create_model
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy, margin_of, train_classifier

SIDE, DIGIT, CORNER = 64, 32, 16
SEMANTIC = (32, 32)
STAGES = ("layer1", "layer2", "layer3", "layer4")
IMAGES, EPOCHS = 720, 6


def unified_beats_isolated(seed: int) -> Finding:
    """Train small ResNets on digits in clutter: without attention, with squeeze-excitation in each block, MEDUSA."""
    builds = {"none": _resnet, "isolated": lambda: _resnet("se"), "medusa": lambda: _attended(STAGES)}
    return _judge(_scores(builds, seed), "medusa", "isolated")


def multi_scale_matters(seed: int) -> Finding:
    """Train the same body with heads at four scales, at one, and as a mask of the image."""
    builds = {"four": lambda: _attended(STAGES), "one": lambda: _attended(STAGES[3:]), "image": _Masked}
    scores = _scores(builds, seed)
    rival = max(("one", "image"), key=lambda name: mean(scores[name]))
    return _judge(scores, "four", rival)


def attention_finds_the_digit(seed: int) -> Finding:
    """Train MEDUSA, and see which share of the body's map lies on the digit that is asked for."""
    shares = []
    for run in range(3):
        model, images, _ = _trained(lambda: _attended(STAGES), 3 * seed + run)
        assert isinstance(model, MultiScaleHeads)
        with torch.inference_mode():
            weights = legacy_resize(model.body(semantic_image(images, SEMANTIC)), (SIDE, SIDE))
        shares.append((weights * _foreground()).sum().item() / weights.sum().item())
    area = _foreground().mean().item()
    margin = margin_of({"share": shares})
    verdict = Verdict.INCONCLUSIVE
    if abs(mean(shares) - area) > margin:
        verdict = Verdict.CONFIRMED if mean(shares) > area else Verdict.REFUTED
    return Finding(mean(shares), area, verdict, {"per_seed": shares, "margin": margin})


def published_size(seed: int) -> Finding:
    """Count MEDUSA's numbers as Keras counts them, with the statistics of batch norms; accuracy needs COVIDx."""
    with torch.device("meta"):
        model = create_model("medusa")
    learned = sum(p.numel() for p in model.parameters())
    statistics = sum(b.numel() for name, b in model.named_buffers() if "running" in name)
    fits = abs(learned + statistics - 29.2e6) < 5e4
    return Finding(
        (learned + statistics) / 1e6,
        29.2,
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need COVIDx" if fits else "the sizes differ"},
    )


def cluttered_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits of 32 x 32 in the middle of 64 x 64 pixels, and in every corner a random one of 16 x 16.

    Returns:
        Training images (images, 3, 64, 64) and labels, test images and labels.
    """
    train, train_labels, test, test_labels = digits(DIGIT, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def clutter(images: Tensor) -> Tensor:
        edge = (SIDE - DIGIT) // 2
        canvas = F.pad(images, (edge,) * 4)
        for rows in (slice(0, CORNER), slice(SIDE - CORNER, SIDE)):
            for columns in (slice(0, CORNER), slice(SIDE - CORNER, SIDE)):
                others = images[torch.randperm(len(images), generator=generator)]
                canvas[:, :, rows, columns] = F.interpolate(others, (CORNER, CORNER), mode="bilinear")
        return canvas

    return clutter(train), train_labels, clutter(test), test_labels


class _Masked(nn.Module):
    """The image weighted by the map before the network, x + x R."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.net = GlobalAttention(4), _resnet()

    def forward(self, image: Tensor) -> Tensor:
        weights = self.body(semantic_image(image, SEMANTIC))
        return self.net(image + image * legacy_resize(weights, (SIDE, SIDE), align_corners=True))


def _resnet(attention: str | None = None) -> ResNet:
    return ResNet(
        BasicBlock, [1, 1, 1, 1], num_classes=10, stem_width=12, channels=(12, 24, 48, 64),
        block_args={"attn_layer": attention},
    )  # fmt: skip


def _attended(stages: tuple[str, ...]) -> MultiScaleHeads:
    return MultiScaleHeads(_resnet(), stages, image_size=SIDE, semantic_size=SEMANTIC, width=4)


def _trained(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train, train_labels, test, test_labels = cluttered_digits(seed)
        model = build()
        train_classifier(model, train[:IMAGES], train_labels[:IMAGES], epochs=EPOCHS)
    return model, test, test_labels


def _scores(builds: dict[str, Callable[[], nn.Module]], seed: int) -> dict[str, list[float]]:
    return {
        name: [accuracy(*_trained(build, 3 * seed + run)) for run in range(3)] for name, build in builds.items()
    }  # fmt: skip


def _judge(scores: dict[str, list[float]], ours: str, rival: str) -> Finding:
    """Confirmed or refuted when the means differ by more than the margin."""
    means = {name: round(mean(values), 4) for name, values in scores.items()}
    margin, gain = margin_of(scores), means[ours] - means[rival]
    verdict = Verdict.INCONCLUSIVE
    if abs(gain) > margin:
        verdict = Verdict.CONFIRMED if gain > 0 else Verdict.REFUTED
    baseline = {name: value for name, value in means.items() if name != ours}
    return Finding(means[ours], baseline, verdict, {"per_seed": scores, "margin": margin})


def _foreground() -> Tensor:
    """1 where the digit in the middle lies."""
    edge = (SIDE - DIGIT) // 2
    return F.pad(torch.ones(DIGIT, DIGIT), (edge,) * 4)


CLAIMS = (
    Claim(
        system="medusa",
        name="unified_beats_isolated",
        statement="One attention body with heads at all scales classifies better than light attention at each scale.",
        rule="Mean accuracy over 3 seeds on digits among distracting digits. Confirmed when MEDUSA exceeds "
        "squeeze-excitation in each block by more than a margin (twice the standard error of a difference), refuted "
        "when it is further than that below, else inconclusive.",
        run=unified_beats_isolated,
        full_scale="manyheads train medusa --data COVIDX_FOLDER --batch-size 16",
    ),
    Claim(
        system="medusa",
        name="multi_scale_matters",
        statement="Heads at four scales classify better than one head, or than a mask of the image, on the same body.",
        rule="As above: confirmed when four heads exceed the better alternative by more than the margin, refuted when "
        "they are further than that below it, else inconclusive.",
        run=multi_scale_matters,
        full_scale="manyheads train medusa_single_scale --data COVIDX_FOLDER --batch-size 16",
    ),
    Claim(
        system="medusa",
        name="attention_finds_the_digit",
        statement="The body's attention lies on the object that decides.",
        rule="Share of the map on the digit in the middle, 3 seeds. Confirmed when it exceeds the digit's share of the "
        "area by more than twice the standard error of a difference, refuted when it is further than that below.",
        run=attention_finds_the_digit,
    ),
    Claim(
        system="medusa",
        name="published_accuracy",
        statement="98.3% accuracy on COVIDx8B with 29.2 million parameters.",
        rule="Here only the size can be counted: refuted when it is more than 50 thousand off, else inconclusive.",
        run=published_size,
        full_scale="manyheads evaluate medusa --data COVIDX_FOLDER --checkpoint medusa.safetensors",
    ),
)
