"""Claims of the neighborhood attention papers (arXiv 2204.07143, 2209.15001, 2403.04690, 2504.16922) as miniatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.models.vision.nat import NAT
from manyheads.reproduce.claims import Claim, Finding, Verdict
from manyheads.reproduce.digits import accuracy_on_digits, compare
from manyheads.reproduce.neighborhood_operator import OPERATOR_CLAIMS

WINDOW = 3


def locality_without_loss(seed: int) -> Finding:
    """Train one net on digits with sliding windows, with blocked windows and with full attention, all without bias."""
    options: dict[str, dict[str, int]] = {"neighborhood": {}, "blocked": {"stride": WINDOW}, "full": {"full": 1}}
    scores = {
        name: [accuracy_on_digits(lambda chosen=chosen: _tiny(**chosen), 3 * seed + run) for run in range(3)]
        for name, chosen in options.items()
    }
    finding = compare({name: scores[name] for name in ("neighborhood", "blocked")}, "neighborhood", ("blocked",))
    full = sum(scores["full"]) / len(scores["full"])
    return Finding(
        finding.measured,
        {**dict(finding.baseline or {}), "full": round(full, 4)},  # type: ignore[arg-type]
        finding.verdict,
        {**finding.details, "per_seed": scores},
    )


def dilation_restores_reach(seed: int) -> Finding:
    """Count the pixels on which the middle token of the last map depends, without and with dilation."""
    reach = {}
    size = 128
    for name, dilations in (("NAT", [[1, 1], [1, 1]]), ("DiNAT", [[1, 8], [1, 4]])):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = NAT(embed_dim=16, depths=(2, 2), num_heads=(2, 4), kernel_size=WINDOW, dilations=dilations)
            image = torch.randn(1, 3, size, size, dtype=torch.double, requires_grad=True)
        # One channel: the sum over all channels of a normed token does not depend on anything.
        output = model.double().eval().forward_features(image)[0, 8, 8, 0]
        reach[name] = int((torch.autograd.grad(output, image)[0].abs().sum(1) > 0).sum())
    verdict = Verdict.INCONCLUSIVE
    if reach["DiNAT"] == size**2 > reach["NAT"]:
        verdict = Verdict.CONFIRMED
    elif reach["DiNAT"] <= reach["NAT"]:
        verdict = Verdict.REFUTED
    return Finding(float(reach["DiNAT"]), float(reach["NAT"]), verdict, {"pixels": size**2, "window": WINDOW})


def _tiny(stride: int = 1, full: int = 0) -> nn.Module:
    model = NAT(embed_dim=16, depths=(2, 2), num_heads=(2, 4), kernel_size=WINDOW, mlp_ratio=2, num_classes=10)
    # Bias tables exist for sliding windows only, so that a fair comparison goes without them.
    for side, level in zip((8, 4), model.levels):
        blocks: Any = level.get_submodule("blocks")
        for block in blocks:
            old: Any = block.get_submodule("attn")
            window = side if full else WINDOW
            new = NeighborhoodAttention(old.proj.in_features, old.num_heads, kernel_size=window, stride=stride)
            new.load_state_dict({name: value for name, value in old.state_dict().items() if name != "rpb"})
            block.attn = new
            block.pad_to = 0
    return model


CLAIMS = (
    Claim(
        system="neighborhood_attention",
        name="locality_without_loss",
        statement="Sliding windows are local without the loss of blocked ones: NAT is at least as good as Swin.",
        rule="Mean accuracy on digits over 3 seeds, one net with both kinds of windows. Confirmed when sliding windows "
        "are at most a margin (twice the standard error of a difference) below blocked ones, else refuted.",
        run=locality_without_loss,
        full_scale="manyheads train nat_tiny --data imagenet",
    ),
    Claim(
        system="neighborhood_attention",
        name="dilation_restores_reach",
        statement="Dilation gives a token the whole image where undilated windows of the same size see a part.",
        rule="Pixels with a gradient from the middle token of a reduced net. Confirmed when DiNAT's cover the image "
        "and NAT's do not, refuted when DiNAT's are not more than NAT's.",
        run=dilation_restores_reach,
    ),
    *OPERATOR_CLAIMS,
)
