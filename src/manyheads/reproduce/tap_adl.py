"""The claims of "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126, as miniatures."""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from manyheads.data.corruptions import SEVERITIES, corrupt
from manyheads.models import create_model
from manyheads.models.vision.token_robustness import add_token_pooling, attention_inputs, attention_maps
from manyheads.objectives.diversification import attention_diversification_loss, overfocus
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy, margin_of, train_on_digits

CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "contrast")
# Two minutes hold twelve trainings of 3 epochs, or six of 6: small batches make enough steps of them.
BATCH, PEAK = 32, 4e-3
KINDS = {"plain": (False, False), "TAP": (True, False), "ADL": (False, True), "both": (True, True)}
SPOILED = 128


def robust_to_corruption(seed: int) -> Finding:
    """Train small transformers on clean digits, plain, with TAP, with ADL and with both; test them on corrupted ones.

    Only plain and both are judged; what TAP and ADL do alone is told beside them. In the time of a claim the models are
    barely trained (they name half of the clean digits), and attention that is not sharp yet leaves ADL little to do.
    """
    clean: dict[str, list[float]] = {name: [] for name in KINDS}
    corrupted: dict[str, list[float]] = {name: [] for name in KINDS}
    for run in range(3):
        spoiled = None
        for name, (pooled, diverse) in KINDS.items():
            model, images, labels = _train(3 * seed + run, epochs=3, pooled=pooled, diverse=diverse)
            spoiled = spoiled or [
                _spoil(images[:SPOILED], kind, strength) for kind in CORRUPTIONS for strength in SEVERITIES
            ]
            clean[name].append(accuracy(model, images, labels))
            corrupted[name].append(mean(accuracy(model, part, labels[:SPOILED]) for part in spoiled))
    gain = mean(corrupted["both"]) - mean(corrupted["plain"])
    loss = mean(clean["plain"]) - mean(clean["both"])
    margin, clean_margin = margin_of(corrupted), margin_of(clean)
    verdict = Verdict.INCONCLUSIVE
    if gain > margin and loss <= clean_margin:
        verdict = Verdict.CONFIRMED
    elif gain < -margin or loss > clean_margin:
        verdict = Verdict.REFUTED
    return Finding(
        {"corrupted": mean(corrupted["both"]), "clean": mean(clean["both"])},
        {"corrupted": mean(corrupted["plain"]), "clean": mean(clean["plain"])},
        verdict,
        {"clean": clean, "corrupted": corrupted, "margin": margin, "clean_margin": clean_margin},
    )


def less_overfocusing(seed: int) -> Finding:
    """Train with and without ADL, and measure on test images how much attention the favourite token gets."""
    focus: dict[str, list[float]] = {"plain": [], "ADL": []}
    similarity: dict[str, list[float]] = {"plain": [], "ADL": []}
    for run in range(3):
        for name in focus:
            model, images, _ = _train(3 * seed + run, epochs=6, pooled=False, diverse=name == "ADL")
            with torch.no_grad(), attention_maps(model) as maps:
                model(images)
            focus[name].append(mean(overfocus(weights) for weights in maps))
            similarity[name].append(attention_diversification_loss(maps).item())
    falls = all(mean(values["ADL"]) < mean(values["plain"]) - margin_of(values) for values in (focus, similarity))
    rises = any(mean(values["ADL"]) > mean(values["plain"]) + margin_of(values) for values in (focus, similarity))
    verdict = Verdict.CONFIRMED if falls else Verdict.REFUTED if rises else Verdict.INCONCLUSIVE
    return Finding(
        {"largest_share": mean(focus["ADL"]), "adl": mean(similarity["ADL"])},
        {"largest_share": mean(focus["plain"]), "adl": mean(similarity["plain"])},
        verdict,
        {"largest_share": focus, "adl": similarity, "uniform_share": 1 / 65},
    )


def few_parameters(seed: int) -> Finding:
    """Count the parameters of FAN-B-Hybrid with and without token-aware pooling."""
    with torch.device("meta"):
        pooled, plain = (
            sum(p.numel() for p in create_model("fan_base_hybrid_tap", num_scales=scales).parameters())
            for scales in (4, 0)
        )
    share = (pooled - plain) / plain
    return Finding(
        {"added": float(pooled - plain), "share": share},
        {"parameters": float(plain)},
        Verdict.CONFIRMED if share < 0.01 else Verdict.REFUTED,
    )


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the hybrid variants; accuracies and corruption errors need ImageNet."""
    paper = {"fan_small_hybrid_tap": 26.3e6, "fan_base_hybrid_tap": 50.7e6, "fan_large_hybrid_tap": 76.8e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 5e5 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the errors need ImageNet-C" if fits else "the sizes differ"},
    )


def _train(seed: int, *, epochs: int, pooled: bool, diverse: bool) -> tuple[nn.Module, Tensor, Tensor]:
    def build() -> nn.Module:
        vit = VisionTransformer(
            img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
        )
        attentions: list[Any] = [module for module in vit.modules() if isinstance(module, Attention)]
        for module in attentions:
            # For 65 tokens a CPU is faster with maps than with the fused kernel.
            module.fused_attn = False
        return add_token_pooling(vit) if pooled else vit

    loss = _diverse if diverse else None
    return train_on_digits(build, seed, epochs=epochs, batch=BATCH, learning_rate=PEAK, loss=loss)


def _diverse(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with attention_inputs(model) as attention:
        logits = model(images)
    return F.cross_entropy(logits, labels) + attention_diversification_loss(attention)


def _spoil(images: Tensor, kind: str, strength: int) -> Tensor:
    spoiled = [
        pil_to_tensor(corrupt(to_pil_image(image), kind, strength, seed=index)) for index, image in enumerate(images)
    ]
    return torch.stack(spoiled).float() / 255


CLAIMS = (
    Claim(
        system="tap_adl",
        name="robust_to_corruption",
        statement="TAP and ADL together lower the error under corruption at equal clean accuracy.",
        rule="Transformers of 4 layers trained on clean digits, plain, with TAP, with ADL and with both, 3 seeds, "
        "tested under noise, blur and low contrast at five strengths. Confirmed when the mean corrupted accuracy with "
        "both exceeds that with neither by more than a margin (twice the standard error of a difference) and the "
        "clean one is at most a margin lower; refuted when "
        "either is more than a margin lower; else inconclusive.",
        run=robust_to_corruption,
        full_scale="manyheads train fan_base_hybrid_tap --data imagenet --batch-size 64",
    ),
    Claim(
        system="tap_adl",
        name="less_overfocusing",
        statement="ADL keeps attention from resting on few tokens.",
        rule="Largest share of attention that one token gets, and the loss itself, on test digits, 3 seeds. Confirmed "
        "when both are lower with the loss by more than a margin (twice the standard error of a difference), refuted "
        "when one is higher by more than that, else inconclusive.",
        run=less_overfocusing,
    ),
    Claim(
        system="tap_adl",
        name="few_parameters",
        statement="TAP adds less than 1% of parameters.",
        rule="Parameters of FAN-B-Hybrid with TAP and without. Confirmed below 1% more, else refuted.",
        run=few_parameters,
    ),
    Claim(
        system="tap_adl",
        name="published_errors",
        statement="FAN-B-Hybrid with TAP and ADL: 84.3% top-1 on ImageNet and a mean corruption error of 43.7.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.5 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate fan_base_hybrid_tap --data imagenet --corruptions all "
        "--checkpoint tapadl_fan_base.pth.tar",
    ),
)
