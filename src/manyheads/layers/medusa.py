"""MEDUSA: one attention body that sees the whole image, and a light head at every scale of a classifier.

    body:   A = sigmoid( U-Net(s) )                      one map for a one-channel image s, sides divisible by 16
    head:   R = resize(A) to the feature map x;   y = x + x * Conv7x7(R)       1 to C channels, with bias, no activation

All heads read the same map. There are no queries or keys: the map weighs positions by itself, and since a head's
convolution is linear, its attention can be negative.

The resizing is TensorFlow 1's: position i reads i * (n_in / n_out), without the half-pixel shift, and interpolates
linearly; no mode of ``torch.nn.functional.interpolate`` does that.

Source: "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image
Analysis", arXiv 2110.06063.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Size = tuple[int, int]


def legacy_resize(
    x: Float[Tensor, "batch channels H W"], size: Size, *, align_corners: bool = False
) -> Float[Tensor, "batch channels rows columns"]:
    """Bilinear resizing as TensorFlow 1 did it.

    Args:
        x: maps.
        size: rows and columns wanted.
        align_corners: the corners of both maps coincide: position i reads i * (n_in - 1) / (n_out - 1).

    Raises:
        ValueError: a size below one.

    >>> import torch
    >>> legacy_resize(torch.tensor([[[[0.0, 1.0]]]]), (1, 4)).flatten()
    tensor([0.0000, 0.5000, 1.0000, 1.0000])
    """
    if min(size) < 1:
        raise ValueError(f"size={size} must be at least one position a side")
    for axis, side in zip((-2, -1), size):
        if x.shape[axis] != side:
            x = _resize_axis(x, side, axis, align_corners)
    return x


def _resize_axis(x: Tensor, side: int, axis: int, align_corners: bool) -> Tensor:
    given = x.shape[axis]
    ratio = (given - 1) / max(side - 1, 1) if align_corners else given / side
    # In float32, as the original counts: rounding decides which sample an exact position falls to.
    at = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(ratio, dtype=torch.float32)
    lower = at.floor().long().clamp(max=given - 1)
    upper = (lower + 1).clamp(max=given - 1)
    share = (at - lower).to(x.dtype)
    share = share[:, None] if axis == -2 else share
    return torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), share)


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros as TensorFlow's "same" puts them: so many that ceil(n / stride) remain, the smaller half first.

    >>> import torch
    >>> same_padding(torch.ones(1, 1, 4, 4), 7, 2).shape[-1] - 4
    5
    """
    before, after = zip(*(_same(side, kernel, stride) for side in x.shape[2:]))
    return F.pad(x, (before[1], after[1], before[0], after[0])) if any(before + after) else x


def _same(side: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class GlobalAttention(nn.Module):
    """The attention body: a U-Net of 3 x 3 convolutions with ReLU, from an image to a map of weights in (0, 1).

    Args:
        width: channels of the finest level, 32 in the paper; deeper levels have 2, 2, 4 and 8 times as many.

    Shape: (batch, 1, H, W) to (batch, 1, H, W), sides divisible by 16. Parameters are named after the authors' layers.

    Raises:
        ValueError: another number of channels, or sides that 16 does not divide.

    Source: arXiv 2110.06063, section 2.1.

    >>> import torch
    >>> GlobalAttention(width=4)(torch.randn(2, 1, 32, 48)).shape
    torch.Size([2, 1, 32, 48])
    """

    # Number of the authors' layer -> channels in and out, in units of the width; 0 is the single channel of the image.
    DOWN = (((1, 0, 1), (2, 1, 1)), ((4, 1, 2), (5, 2, 2)), ((7, 2, 2), (8, 2, 2)), ((10, 2, 4), (11, 4, 4)))
    MIDDLE = (13, 4, 8)
    UP = (
        ((15, 8, 8), (16, 8, 8), (18, 12, 8)),
        ((20, 8, 8), (21, 8, 8), (23, 10, 8)),
        ((25, 8, 4), (26, 4, 4), (28, 6, 4)),
        ((30, 4, 2), (31, 2, 2), (33, 3, 2)),
    )
    LAST = (34, 2, 0)

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        every = [spec for level in (*self.DOWN, (self.MIDDLE,), *self.UP, (self.LAST,)) for spec in level]
        for number, wide, out in every:
            conv = nn.Conv2d(wide * width or 1, out * width or 1, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
            self.add_module(str(number), conv)

    def forward(self, x: Float[Tensor, "batch 1 H W"]) -> Float[Tensor, "batch 1 H W"]:
        if x.ndim != 4 or x.shape[1] != 1 or x.shape[2] % 16 or x.shape[3] % 16 or not x.shape[2] * x.shape[3]:
            raise ValueError(
                f"semantic image must be (batch, 1, H, W) with sides divisible by 16, got {tuple(x.shape)}"
            )
        skips = []
        for level in self.DOWN:
            for number, _, _ in level:
                x = self._relu(number, x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self._relu(self.MIDDLE[0], x)
        for first, second, joined in self.UP:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = self._relu(second[0], self._relu(first[0], x))
            x = self._relu(joined[0], torch.cat([skips.pop(), x], dim=1))
        return self.get_submodule(str(self.LAST[0]))(x).sigmoid()

    def _relu(self, number: int, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(str(number))(x))


class ScaleHead(nn.Conv2d):
    """A head: turns the global map into attention on a feature map, x + x * A.

    Args:
        channels: of the feature map.

    Shape: features (batch, channels, H, W) and map (batch, 1, h, w) to the features' shape; any sides.

    Raises:
        ValueError: features of other channels, or a map of another batch or of several channels.

    Source: arXiv 2110.06063, section 2.2.

    >>> import torch
    >>> ScaleHead(5)(torch.randn(2, 5, 7, 7), torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 5, 7, 7])
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, 7, padding=3)

    def attention(self, weights: Tensor, size: Size) -> Tensor:
        """A for feature maps of ``size``, (batch, channels, rows, columns)."""
        return super().forward(legacy_resize(weights, size))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if x.ndim != 4 or x.shape[1] != self.out_channels:
            raise ValueError(f"features must be (batch, {self.out_channels}, H, W), got {tuple(x.shape)}")
        if weights.ndim != 4 or weights.shape[:2] != (x.shape[0], 1):
            raise ValueError(f"the map must be ({x.shape[0]}, 1, h, w) like the features, got {tuple(weights.shape)}")
        return torch.addcmul(x, x, self.attention(weights, (x.shape[2], x.shape[3])))


class _Current:
    """The map that the body made for the images that are on their way through the model."""

    weights: Tensor | None = None


class _HookedHead(ScaleHead):
    """A head that attends the output of the module that it is hooked to.

    The hook is a method, which a deep copy of the model takes along; a function would go on serving the original.
    """

    def __init__(self, channels: int, current: _Current) -> None:
        super().__init__(channels)
        self.current = current

    def attend(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output if self.current.weights is None else self(output, self.current.weights)


class MultiScaleHeads(nn.Module):
    """MEDUSA's body and heads around any convolutional network: the outputs of the named modules are attended.

    Args:
        model: changed by hooks only; its parameters keep their names below ``model``.
        modules: dotted names of modules that return (batch, channels, H, W).
        image_size: side or sides of an image to find their channels with.
        in_chans: channels of that image.
        semantic_size: sides of the body's input.
        width: of the body.

    Shape: image (batch, in_chans, height, width) and, optionally, the body's input (batch, 1, h, w), to whatever the
    model returns; without the second, ``semantic_image`` makes it of the first.

    Raises:
        ValueError: no module of that name, or one that returns no feature map.

    >>> import timm, torch
    >>> net = timm.create_model("resnet18", num_classes=10)
    >>> wrapped = MultiScaleHeads(net, ["layer1", "layer3"], image_size=64, semantic_size=(32, 32), width=4)
    >>> wrapped(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[str],
        *,
        image_size: int | Size = 224,
        in_chans: int = 3,
        semantic_size: Size = (256, 256),
        width: int = 32,
    ) -> None:
        super().__init__()
        known = dict(model.named_modules())
        missing = [name for name in modules if name not in known]
        if missing or not modules:
            raise ValueError(f"modules={list(modules)}: {missing or 'nothing'} is not in {type(model).__name__}")
        self.model, self.modules_attended, self.semantic_size = model, tuple(modules), semantic_size
        self.body = GlobalAttention(width)
        channels = self._probe(known, image_size, in_chans)
        self.current = _Current()
        self.heads = nn.ModuleList(_HookedHead(width, self.current) for width in channels)
        for name, head in zip(modules, self.heads):
            known[name].register_forward_hook(cast(_HookedHead, head).attend)

    def forward(self, image: Tensor, semantic: Tensor | None = None) -> Tensor:
        self.current.weights = self.body(semantic_image(image, self.semantic_size) if semantic is None else semantic)
        try:
            return self.model(image)
        finally:
            self.current.weights = None

    def _probe(self, known: dict[str, nn.Module], image_size: int | Size, in_chans: int) -> list[int]:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        found: dict[str, Tensor] = {}

        def keep(name: str):
            return lambda module, inputs, output: found.update({name: output})

        handles = [known[name].register_forward_hook(keep(name)) for name in self.modules_attended]
        training, like = self.model.training, next(self.model.parameters())
        with torch.no_grad():
            self.model.eval()(torch.zeros(1, in_chans, *sides, device=like.device, dtype=like.dtype))
        self.model.train(training)
        for handle in handles:
            handle.remove()
        for name in self.modules_attended:
            if not isinstance(found.get(name), Tensor) or found[name].ndim != 4:
                raise ValueError(f"module {name!r} returns no feature map (batch, channels, H, W)")
        return [found[name].shape[1] for name in self.modules_attended]


def semantic_image(image: Tensor, size: Size) -> Tensor:
    """The body's input: the grey image, resized, minus its own mean, divided by its own deviation.

    >>> import torch
    >>> s = semantic_image(torch.rand(2, 3, 40, 40), (32, 32))
    >>> s.shape, bool(s.mean().abs() < 1e-5)
    (torch.Size([2, 1, 32, 32]), True)
    """
    grey = F.interpolate(image.mean(1, keepdim=True), size, mode="bilinear", align_corners=False)
    deviation, mean = torch.std_mean(grey, dim=(1, 2, 3), keepdim=True, correction=0)
    # An empty picture has no deviation: it stays zero.
    return (grey - mean) / deviation.clamp(min=1e-6)
