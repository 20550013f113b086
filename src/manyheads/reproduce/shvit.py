"""The claims of "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from manyheads.bench.speed import measure
from manyheads.models import create_model
from manyheads.models.evaluation import count_flops
from manyheads.models.vision.shvit import SHViT
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

RIVAL = "mobilevitv2_100"
PYRAMID = "edgenext_xx_small"


def less_memory_traffic(seed: int) -> Finding:
    """Add up what all layers write, beside a net with a 4 x 4 stem, four stages and at least as few operations."""
    image = torch.zeros(1, 3, 224, 224)
    nets = {"shvit_s1": create_model("shvit_s1").eval(), PYRAMID: timm.create_model(PYRAMID).eval()}
    written = {name: _activation_bytes(net, image) for name, net in nets.items()}
    operations = {name: count_flops(net, image) for name, net in nets.items()}
    per_operation = {name: written[name] / operations[name] for name in nets}
    ratio = per_operation[PYRAMID] / per_operation["shvit_s1"]
    return Finding(
        {"bytes_per_operation": per_operation["shvit_s1"]},
        {"bytes_per_operation": per_operation[PYRAMID]},
        Verdict.CONFIRMED if ratio >= 2 else Verdict.REFUTED,
        {"ratio": ratio, "bytes": written, "operations": operations},
    )


def faster_than_mobilevit(seed: int) -> Finding:
    """Time SHViT-S4, fused, against MobileViTv2-1.0 on the same eight images of 256 x 256 pixels."""
    images = torch.randn(8, 3, 256, 256, generator=torch.Generator().manual_seed(seed))
    ours, theirs = create_model("shvit_s4").eval(), timm.create_model(RIVAL).eval()
    assert isinstance(ours, SHViT)
    with torch.inference_mode():
        timings = measure({"shvit_s4": ours.fuse(), RIVAL: theirs}, [images], repeats=10, budget=60, memory=False)
    ratio = timings[RIVAL].seconds / timings["shvit_s4"].seconds
    verdict = Verdict.CONFIRMED if ratio > 2 else Verdict.REFUTED if ratio < 1 else Verdict.INCONCLUSIVE
    return Finding(
        {"images_per_second": 8 / timings["shvit_s4"].seconds},
        {"images_per_second": 8 / timings[RIVAL].seconds},
        verdict,
        {"ratio": ratio, "threads": torch.get_num_threads()},
    )


def one_head_suffices(seed: int) -> Finding:
    """Train nets of equal width on digits of 64 pixels: one head or four on the same attended channels."""
    scores = {
        name: [accuracy_on_digits(lambda heads=heads: _tiny(heads), 3 * seed + run) for run in range(3)]
        for name, heads in (("one head", 1), ("four heads", 4))
    }
    return compare(scores, "one head", ("four heads",))


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the released variants; their accuracy needs ImageNet."""
    paper = {"shvit_s1": 6.3e6, "shvit_s2": 11.4e6, "shvit_s3": 14.2e6, "shvit_s4": 16.5e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 1e5 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


def _activation_bytes(net: nn.Module, image: Tensor) -> int:
    written = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal written
        if isinstance(output, Tensor):
            written += output.numel() * output.element_size()

    leaves = [m for m in net.modules() if not any(m.children()) and not isinstance(m, (nn.Identity, nn.Dropout))]
    handles = [leaf.register_forward_hook(count) for leaf in leaves]
    with torch.inference_mode():
        net(image)
    for handle in handles:
        handle.remove()
    return written


def _tiny(heads: int) -> nn.Module:
    net = SHViT(
        num_classes=10, depths=(1, 1), embed_dims=(32, 48), partial_dims=(16, 16), qk_dims=(16, 16), types="ss",
        heads=heads,
    )  # fmt: skip
    return nn.Sequential(nn.Upsample(scale_factor=2), net)


CLAIMS = (
    Claim(
        system="shvit",
        name="less_memory_traffic",
        statement="A stem of stride 16 and three stages move less memory than a stem of stride 4 and four stages.",
        rule="Bytes that all layers write for an image of 224 x 224, by operation. Confirmed when SHViT-S1 writes at "
        f"most half of what {PYRAMID} (4 x 4 stem, four stages, similar operations) writes; else refuted.",
        run=less_memory_traffic,
    ),
    Claim(
        system="shvit",
        name="faster_than_mobilevit",
        statement="SHViT-S4 runs 8.1 times as fast as MobileViTv2-1.0 on a CPU (3.3 times on a GPU).",
        rule="Medians of ten interleaved runs on eight images of 256 x 256, norms folded, all threads of this machine. "
        "Confirmed (in direction) above twice the speed, refuted below equal speed, else inconclusive.",
        run=faster_than_mobilevit,
        full_scale="manyheads evaluate shvit_s4 --data imagenet --checkpoint timm/shvit_s4.in1k --batch-size 256",
    ),
    Claim(
        system="shvit",
        name="one_head_suffices",
        statement="Further attention heads on the same channels do not classify better.",
        rule="Mean accuracy on digits over 3 seeds. Confirmed when one head is at most a margin (twice the standard "
        "error of a difference) below four, refuted when it is further below.",
        run=one_head_suffices,
        full_scale="manyheads train shvit_s1 --data imagenet --option heads=4",
    ),
    Claim(
        system="shvit",
        name="published_accuracy",
        statement="72.8, 75.2, 77.4 and 79.4% top-1 on ImageNet with 6.3, 11.4, 14.2 and 16.5 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.1 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate shvit_s1 --data imagenet --checkpoint timm/shvit_s1.in1k",
    ),
)
