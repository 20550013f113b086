"""The claims of "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", arXiv 2309.12424.

The authors published no code: what is measured here is this library's network, see ``models.vision.dualtoken``.
"""

from __future__ import annotations

from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.data.images import digits
from manyheads.layers.dual_token import HalvingStep, PositionAwareTokens
from manyheads.models import create_model
from manyheads.models.vision.dualtoken import DualTokenViT
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, margin_of, train_classifier

SEEDS = 3
SIDE = 64
PROBED = 4  # side of the grid of tokens whose positions are probed


def both_tokens_are_needed(seed: int) -> Finding:
    """Train small nets on digits: whole, without the tokens, without the convolutions, with tokens all alike."""
    nets = {"whole": _whole, "convolution": _without_tokens, "tokens": _without_convolution, "placeless": _placeless}
    scores = {
        name: [accuracy_on_digits(build, SEEDS * seed + run, size=SIDE, epochs=5) for run in range(SEEDS)]
        for name, build in nets.items()
    }
    return _is_best(scores, "whole")


def tokens_know_their_place(seed: int) -> Finding:
    """Train on digits, then let a linear probe tell from a global token after the last stage where it stands."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images, labels, test_images, _ = digits(SIDE, seed=seed)
        model = _whole(token_size=PROBED, steps=(1, 0, 0))
        train_classifier(model, images, labels, epochs=4)
        seen, unseen = (_last_tokens(model, some) for some in (images[:512], test_images))
        centre, spread = seen.mean((0, 1)), seen.std((0, 1)).clamp(min=1e-12)
        seen, unseen = (seen - centre) / spread, (unseen - centre) / spread
        probe = nn.Linear(seen.shape[-1], PROBED**2)
        place = torch.arange(PROBED**2)
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2)
        for _ in range(200):
            F.cross_entropy(probe(seen).flatten(0, 1), place.repeat(len(seen))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found = (probe(unseen).argmax(-1) == place).float().mean().item()
    chance = 1 / PROBED**2
    verdict = Verdict.CONFIRMED if found >= 0.5 else Verdict.REFUTED if found < 2 * chance else Verdict.INCONCLUSIVE
    return Finding(found, chance, verdict)


def halving_beats_one_step(seed: int) -> Finding:
    """Train on digits with maps halved step by step and with maps shrunk in one step."""
    scores = {
        name: [accuracy_on_digits(build, SEEDS * seed + run, size=SIDE, epochs=5) for run in range(SEEDS)]
        for name, build in (("steps", _whole), ("at_once", _at_once))
    }
    return _is_best(scores, "steps")


def published_sizes(seed: int) -> Finding:
    """Count the parameters of both sizes; their accuracies need ImageNet."""
    paper = {"dualtoken_vit_t": 5.8e6, "dualtoken_vit_s": 11.4e6}
    with torch.device("meta"):
        counts = {name: float(sum(p.numel() for p in create_model(name).parameters())) for name in paper}
    fits = all(abs(counts[name] / size - 1) < 0.05 for name, size in paper.items())
    reason = "sizes within 5%; the accuracies need ImageNet" if fits else "the sizes differ by more than 5%"
    return Finding(counts, paper, Verdict.INCONCLUSIVE if fits else Verdict.REFUTED, {"reason": reason})


def _is_best(scores: dict[str, list[float]], ours: str) -> Finding:
    """Confirmed when ours has the best mean, refuted when the best one is ahead by more than the margin."""
    means = {name: mean(values) for name, values in scores.items()}
    margin, best = margin_of(scores), max(value for name, value in means.items() if name != ours)
    verdict = Verdict.INCONCLUSIVE
    if means[ours] > best or means[ours] < best - margin:
        verdict = Verdict.CONFIRMED if means[ours] > best else Verdict.REFUTED
    baseline = {name: round(value, 4) for name, value in means.items() if name != ours}
    return Finding(round(means[ours], 4), baseline, verdict, {"per_seed": scores, "margin": margin})


def _whole(token_size: int = 2, steps: tuple[int, ...] = (2, 1, 0)) -> DualTokenViT:
    return DualTokenViT(
        num_classes=10, embed_dims=(16, 24, 32), depths=(1, 1, 1), num_heads=(2, 2, 4), token_size=token_size,
        steps=steps,
    )  # fmt: skip


def _without_tokens() -> DualTokenViT:
    model = _whole()
    for block in _blocks(model):
        block.token_module = _NoTokens()
    return model


def _without_convolution() -> DualTokenViT:
    model = _whole()
    for block in _blocks(model):
        block.conv_encoder = nn.Identity()
    return model


def _placeless() -> DualTokenViT:
    model = _whole()
    for block in _blocks(model):
        block.token_module = _Placeless(block.token_module)
    return model


def _at_once() -> DualTokenViT:
    model = _whole()
    for block in _blocks(model):
        steps = len(block.token_module.down)
        dim = block.norm2.normalized_shape[0]
        block.token_module.down = nn.ModuleList([HalvingStep(dim, factor=2**steps)] if steps else [])
    return model


class _NoTokens(nn.Module):
    """Tokens that say nothing."""

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), tokens


class _Placeless(nn.Module):
    """Tokens that all hold their mean."""

    def __init__(self, module: PositionAwareTokens) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        tokens = module.enrich(tokens, module.aggregate(x)).mean(1, keepdim=True).expand_as(tokens)
        return module.broadcast(x, tokens), tokens


def _blocks(model: DualTokenViT) -> list:
    return [block for stage in model.stages for block in stage.blocks]  # pyright: ignore[reportGeneralTypeIssues]


def _last_tokens(model: DualTokenViT, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.forward_tokens(part)[1] for part in images.split(128)])


CLAIMS = (
    Claim(
        system="dualtoken_vit",
        name="both_tokens_are_needed",
        statement="Convolution and position-aware global tokens together classify better than either alone.",
        rule="Mean accuracy on digits of 64 pixels over 3 seeds, one block a stage, 5 epochs, against convolutions "
        "alone, tokens alone and tokens that all hold their mean. Confirmed when the whole block is above all of them, "
        "refuted when the best of them is ahead by more than twice the standard error of a difference, else "
        "inconclusive.",
        run=both_tokens_are_needed,
        full_scale="manyheads train dualtoken_vit_s --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="dualtoken_vit",
        name="tokens_know_their_place",
        statement="The global tokens carry position information to the end of the network.",
        rule="A linear probe on the 16 tokens after the last stage (standardised channels), trained on 512 images, "
        "tested on others. Confirmed when it names at least half of the places, refuted when it names fewer than "
        "twice the chance of 1/16, else inconclusive.",
        run=tokens_know_their_place,
        full_scale="manyheads train dualtoken_vit_s --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="dualtoken_vit",
        name="halving_beats_one_step",
        statement="Shrinking the map step by step keeps more than shrinking it at once.",
        rule="The same nets, 3 seeds. Confirmed when the mean accuracy with halving steps is above that with one step, "
        "refuted when it is below by more than twice the standard error of a difference, else inconclusive.",
        run=halving_beats_one_step,
        full_scale="manyheads train dualtoken_vit_t --data imagenet --dtype bfloat16",
    ),
    Claim(
        system="dualtoken_vit",
        name="published_accuracy",
        statement="75.4 and 79.4% top-1 on ImageNet with about 5.8 and 11.4 million parameters (T and S).",
        rule="Here only the sizes can be counted: refuted when one is more than 5% off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads train dualtoken_vit_s --data imagenet --dtype bfloat16",
    ),
)
