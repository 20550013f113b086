"""The claims of "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697, as miniatures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.layers.maxvit import MBConv, PartitionAttention
from manyheads.models import create_model
from manyheads.models.evaluation import count_flops
from manyheads.models.vision.maxvit import MaxViT
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare

SIDES = (28, 56, 112)
WINDOW = 7
WIDTH = 32


class _Block(nn.Module):
    """A block at one stride without its squeeze-excitation, which would see the whole map by itself."""

    def __init__(self, *axes: str) -> None:
        super().__init__()
        self.conv = MBConv(WIDTH, WIDTH, squeeze=False)
        self.halves = nn.Sequential(*(PartitionAttention(WIDTH, WINDOW, axis=axis) for axis in axes))

    def forward(self, x: Tensor) -> Tensor:
        return self.halves(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def global_view_at_linear_cost(seed: int) -> Finding:
    """See which inputs one output of a block depends on, and count operations for each position as the map grows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole, half = _Block("block", "grid").eval(), _Block("block").eval()
        # The published initialisation is so small that gradients through two attentions vanish in rounding.
        for parameter in [*whole.parameters(), *half.parameters()]:
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
        x = torch.randn(1, WIDTH, 28, 28, dtype=torch.double, requires_grad=True)
    share = {}
    for name, block in (("block and grid", whole), ("block only", half)):
        (gradient,) = torch.autograd.grad(block.double()(x)[0, :, 10, 10].sum(), x)
        share[name] = (gradient.abs().sum(1) > 0).double().mean().item()
        block.float()
    per_position = [count_flops(whole, torch.zeros(1, WIDTH, side, side)) / side**2 for side in SIDES]
    growth = max(per_position) / min(per_position)
    holds = share["block and grid"] == 1 and abs(share["block only"] - 81 / 784) < 1e-9 and growth < 1.001
    return Finding(
        {"share_of_positions": share["block and grid"], "cost_growth": growth},
        {"share_of_positions": share["block only"], "cost_growth": growth},
        Verdict.CONFIRMED if holds else Verdict.REFUTED,
        {"sides": SIDES, "operations_per_position": per_position},
    )


def grids_help(seed: int) -> Finding:
    """Train nets of equal size on digits: blocks and grids in turn, or blocks twice."""
    scores = {
        name: [accuracy_on_digits(lambda axes=axes: _tiny(axes), 3 * seed + run) for run in range(3)]
        for name, axes in (("grid", ("block", "grid")), ("block", ("block", "block")))
    }
    return compare(scores, "grid", ("block",))


def published_sizes(seed: int) -> Finding:
    """Count the parameters of the released variants; their accuracy needs ImageNet."""
    paper = {"maxvit_tiny": 31e6, "maxvit_small": 69e6, "maxvit_base": 120e6, "maxvit_large": 212e6}
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in create_model(name).parameters()) for name in paper}
    fits = all(abs(counts[name] - size) <= 6e5 for name, size in paper.items())
    return Finding(
        {name: count / 1e6 for name, count in counts.items()},
        {name: size / 1e6 for name, size in paper.items()},
        Verdict.INCONCLUSIVE if fits else Verdict.REFUTED,
        {"reason": "the sizes agree; the accuracies need ImageNet" if fits else "the sizes differ"},
    )


def _tiny(axes: tuple[str, str]) -> MaxViT:
    return MaxViT(
        num_classes=10, img_size=32, window_size=4, depths=(1, 1), embed_dims=(16, 32), stem_width=16, head_dim=8,
        head_hidden_size=32, axes=axes,
    )  # fmt: skip


CLAIMS = (
    Claim(
        system="maxvit",
        name="global_view_at_linear_cost",
        statement="Every block sees the whole map, at a cost linear in the number of positions.",
        rule="Confirmed when, on a 28 x 28 map with partition 7, one output of a block depends on all positions, with "
        "the block half alone on 9 x 9 of them, and operations for a position stay equal within 0.1% from 28 x 28 to "
        "112 x 112; else refuted.",
        run=global_view_at_linear_cost,
    ),
    Claim(
        system="maxvit",
        name="grids_help",
        statement="Grid attention after block attention classifies better than block attention twice (by a point).",
        rule="Mean accuracy on digits over 3 seeds. Confirmed when the net with grids is at most a margin (twice the "
        "standard error of a difference) below the one without, refuted when it is further below.",
        run=grids_help,
        full_scale="manyheads train maxvit_tiny --data imagenet --option axes=block,block",
    ),
    Claim(
        system="maxvit",
        name="published_accuracy",
        statement="83.6, 84.5, 85.0 and 85.2% top-1 on ImageNet with 31, 69, 120 and 212 million parameters.",
        rule="Here only the sizes can be counted: refuted when one is more than 0.6 million off, else inconclusive.",
        run=published_sizes,
        full_scale="manyheads evaluate maxvit_tiny --data imagenet --checkpoint timm/maxvit_tiny_tf_224.in1k",
    ),
)
