"""The claims of "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645, as miniatures."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from manyheads.layers.davit import ChannelAttention, WindowAttention
from manyheads.models import create_model
from manyheads.models.vision.davit import DaViT
from manyheads.ops.channel import channel_attention
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

SIDES = (14, 28, 56)
WINDOW = 7


def global_at_linear_cost(seed: int) -> Finding:
    """Count operations of both attentions while the map grows, and see which inputs one output depends on."""
    generator = torch.Generator().manual_seed(seed)
    operations: dict[str, list[int]] = {"channel": [], "full": []}
    seconds: dict[str, list[float]] = {"channel": [], "full": []}
    for side in SIDES:
        q, k, v = torch.randn(3, 1, 3, side * side, 32, generator=generator)
        for name, attend in (("channel", channel_attention), ("full", scaled_dot_product_attention)):
            with FlopCounterMode(display=False) as counter:
                attend(q, k, v)
            operations[name].append(counter.get_total_flops())
            start = time.perf_counter()
            attend(q, k, v)
            seconds[name].append(time.perf_counter() - start)
    steps = {name: [b / a for a, b in pairwise(counts)] for name, counts in operations.items()}

    # Random projections: with q = k the D x D softmax would be so peaked that gradients vanish in rounding.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {"channel": ChannelAttention(96, 3), "window": WindowAttention(96, 3, window=WINDOW)}
    x = torch.randn(1, 28, 28, 96, generator=generator, requires_grad=True)
    gradients = {name: torch.autograd.grad(layer(x)[0, 0, 0].sum(), x)[0] for name, layer in layers.items()}
    reach = {name: int((gradient.abs().sum(-1) > 0).sum()) for name, gradient in gradients.items()}

    linear = all(abs(ratio / 4 - 1) < 0.01 for ratio in steps["channel"])
    quadratic = all(abs(ratio / 16 - 1) < 0.01 for ratio in steps["full"])
    holds = linear and quadratic and reach == {"channel": 28 * 28, "window": WINDOW**2}
    return Finding(
        {"cost_ratio": max(steps["channel"]), "positions_reached": float(reach["channel"])},
        {"cost_ratio": min(steps["full"]), "positions_reached": float(reach["window"])},
        Verdict.CONFIRMED if holds else Verdict.REFUTED,
        {"tokens": [side * side for side in SIDES], "operations": operations, "seconds": seconds},
    )


def attentions_complement_each_other(seed: int) -> Finding:
    """Train three nets of equal size on digits: both attentions in turn, only windows, only channels."""
    kinds = {"dual": ("spatial", "channel"), "spatial": ("spatial", "spatial"), "channel": ("channel", "channel")}
    scores = {
        name: [accuracy_on_digits(lambda types=types: _tiny(types), 3 * seed + run) for run in range(3)]
        for name, types in kinds.items()
    }
    return compare(scores, "dual", ("spatial", "channel"))


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the released variants; their accuracy needs ImageNet."""
    paper = {"davit_tiny": 28.3e6, "davit_small": 49.7e6, "davit_base": 87.9e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 1e5 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


def _tiny(attention_types: tuple[str, ...]) -> DaViT:
    return DaViT(
        num_classes=10,
        depths=(1, 1),
        embed_dims=(16, 32),
        num_heads=(2, 4),
        window_size=4,
        attention_types=attention_types,
    )


CLAIMS = (
    Claim(
        system="davit",
        name="global_at_linear_cost",
        statement="Channel attention sees the whole map at a cost linear in the number of tokens.",
        rule="Confirmed when four times the tokens cost 4 times the operations (full attention: 16 times), both within "
        "1%, and one output depends on every position, but on one window only for window attention; else refuted.",
        run=global_at_linear_cost,
    ),
    Claim(
        system="davit",
        name="attentions_complement_each_other",
        statement="Window and channel attention in turn classify better than either alone in a net of equal size.",
        rule="Mean accuracy on digits over 3 seeds. Confirmed when the dual net is at most a margin (twice the "
        "standard error of a difference) below the better single one, refuted when it is further than that below both.",
        run=attentions_complement_each_other,
        full_scale="manyheads train davit_tiny --data imagenet --attention-types spatial,channel",
    ),
    Claim(
        system="davit",
        name="published_accuracy",
        statement="82.8, 84.2 and 84.6% top-1 on ImageNet with 28.3, 49.7 and 87.9 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.1 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate davit_tiny --data imagenet --checkpoint timm/davit_tiny.msft_in1k",
    ),
)
