"""The three convolutional branches of Dynamic Perceiver, cut into a stem and four stages.

    RegNetY          torchvision's; every stage begins with stride 2
    MobileNetV3      torchvision's large one with a width factor: features 0-2, 3-4, 5-7, 8-13, 14-16
    ResNet-50        timm's bottlenecks (stride in the 3 x 3 convolution) with a width factor

Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import DropPath
from timm.models.resnet import Bottleneck
from torch import nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.regnet import BlockParams, RegNet

# Blocks and channels of each stage, channels of a convolution's group.
REGNETS = {
    "regnet_y_400mf": ((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "regnet_y_800mf": ((1, 3, 8, 2), (64, 144, 320, 784), 16),
    "regnet_y_1_6gf": ((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "regnet_y_3_2gf": ((2, 5, 13, 1), (72, 216, 576, 1512), 24),
}
FAMILIES = (*REGNETS, "mobilenet_v3", "resnet50")


@dataclass
class Branch:
    """A convolutional network in pieces.

    Attributes:
        stem: from the image to the first stage's input.
        stages: four of them.
        widths: channels of the stem and of the four stages, C1 ... C5.
        reductions: pixels a position of the four stages' maps, a side.
        hidden: width of the hidden layer of its classifiers; 0 where they have none.
    """

    stem: nn.Module
    stages: list[nn.Module]
    widths: tuple[int, ...]
    reductions: tuple[int, ...]
    hidden: int = 0


def build_branch(family: str, width: int | float, in_chans: int, drop_path_rate: int | float) -> Branch:
    """The branch ``family`` (one of ``FAMILIES``), its channels multiplied by ``width``.

    Raises:
        ValueError: an unknown family, a width that is not positive or that RegNet does not have, a drop-path rate for
            a branch other than ResNet.
    """
    if family not in FAMILIES:
        raise ValueError(f"cnn={family!r} is not one of {', '.join(FAMILIES)}")
    if width <= 0 or (family in REGNETS and width != 1):
        raise ValueError(f"width={width} must be positive, and 1 for RegNet")
    if drop_path_rate and family != "resnet50":
        raise ValueError(
            f"drop_path_rate={drop_path_rate}: only the branch resnet50 has stochastic depth, not {family}"
        )
    if family == "resnet50":
        return _resnet(width, in_chans, drop_path_rate)
    return _mobilenet(width, in_chans) if family == "mobilenet_v3" else _regnet(family, in_chans)


def _regnet(family: str, in_chans: int) -> Branch:
    depths, widths, group = REGNETS[family]
    net = RegNet(BlockParams([*depths], [*widths], 4 * [group], 4 * [1.0], 4 * [2], se_ratio=0.25))
    _read_channels(net.stem, in_chans)
    # Renumbered from 0, because torchvision names a block after its stage ("block1-0").
    stages: list[nn.Module] = [nn.Sequential(*stage.children()) for stage in net.trunk_output.children()]
    return Branch(net.stem, stages, (32, *widths), (4, 8, 16, 32))


def _mobilenet(width: int | float, in_chans: int) -> Branch:
    net = mobilenet_v3_large(width_mult=float(width))
    features = net.features
    _read_channels(features[0], in_chans)
    widths = tuple(
        [m for m in features[i].modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features for i in (2, 4, 7, 13, 16)
    )
    last = net.classifier[0]
    assert isinstance(last, nn.Linear)
    return Branch(
        nn.Sequential(*features[:3]),
        [nn.Sequential(*features[a:b]) for a, b in ((3, 5), (5, 8), (8, 14), (14, 17))],
        widths,
        (8, 16, 32, 32),
        hidden=last.out_features,
    )


def _resnet(width: int | float, in_chans: int, drop_path_rate: int | float) -> Branch:
    planes = [int(64 * 2**s * width) for s in range(4)]
    first = int(64 * width)
    stem = nn.Sequential(
        nn.Conv2d(in_chans, first, 7, 2, 3, bias=False), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    depths = (3, 4, 6, 3)
    rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
    stages, dim = [], first
    for s, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            stride = 2 if s and not j else 1
            out, shortcut = 4 * planes[s], None
            if not j:
                shortcut = nn.Sequential(nn.Conv2d(dim, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            rate = next(rates)
            blocks.append(Bottleneck(dim, planes[s], stride, shortcut, drop_path=DropPath(rate) if rate else None))
            dim = out
        stages.append(nn.Sequential(*blocks))
    for module in (stem, *stages):
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return Branch(stem, stages, (first, *(4 * p for p in planes)), (4, 8, 16, 32))


def _read_channels(block: nn.Module, in_chans: int) -> None:
    """Replace the first convolution of a stem by one that reads ``in_chans`` channels."""
    if in_chans == 3:
        return
    old = block.get_submodule("0")
    assert isinstance(old, nn.Conv2d)
    new = nn.Conv2d(in_chans, old.out_channels, 3, 2, 1, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out")
    setattr(block, "0", new)
