"""MEDUSA: a ResNet-50 for radiographs, attended at four scales by one body that sees the whole image.

    stem:    conv 7 x 7 stride 2, BN, ReLU, max-pool 3 stride 2 without padding       -> head 600
    stages:  3, 4, 6, 3 bottlenecks; the stride is in the first 1 x 1 convolution     -> heads 601, 602, 603, none
    head:    mean over 7 x 7 tiles, flattened by (row, column, channel), Linear, softmax by the caller

Convolutions have biases and TensorFlow's "same" padding, batch norms an epsilon of 1e-3. The classifier's width
depends on the size of the images it was built for: 2 x 2 tiles at 480 pixels.

A research model: **not a diagnostic device**, not validated for any clinical use.

Source: "MEDUSA: Multi-scale Encoder-Decoder Self-Attention Deep Neural Network Architecture for Medical Image
Analysis", arXiv 2110.06063.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import both_sides, check_choice
from manyheads.layers.medusa import GlobalAttention, ScaleHead, Size, legacy_resize, same_padding, semantic_image
from manyheads.models.checkpoints import State
from manyheads.models.registry import register
from manyheads.models.vision.features import check_image, stage_indices

ATTENTIONS = ("multi_scale", "single_scale", "residual", "mask")
TILE = 7
EPS = 1e-3


class Bottleneck(nn.Module):
    """1 x 1 (with the stride), 3 x 3 and 1 x 1 convolutions with batch norms; the first of a stage projects."""

    def __init__(self, dim: int, width: int, out_dim: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, width, 1, stride), _norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), _norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_dim, 1), _norm(out_dim)
        self.shortcut = nn.Conv2d(dim, out_dim, 1, stride) if project else None
        self.bn_shortcut = _norm(out_dim) if project else None

    def forward(self, x: Tensor) -> Tensor:
        past = x if self.shortcut is None or self.bn_shortcut is None else self.bn_shortcut(self.shortcut(x))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + past)


class Medusa(nn.Module):
    """The MEDUSA classifier.

    Args:
        img_size: side or (height, width) of the images, to which the classifier belongs; at least 197 pixels.
        semantic_size: sides of the body's input, divisible by 16; 256 in the paper.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        attention: "multi_scale" (MEDUSA; the authors' resnet1), "single_scale" (one head behind the third stage,
            resnet2), "residual" or "mask" (no heads, the image x becomes x + x R or x R; resnet0).
        depths: bottlenecks of each stage.
        width: channels of the stem; stages have 4, 8, 16 and 32 times as many.
        body_width: channels of the body's finest level.
        drop_rate: dropout before the classifier.
        body_starts: in training, the epoch before which body and heads do not learn (the authors' ``in_sem``).

    Shape: image (batch, in_chans, height, width) in [0, 1] and, optionally, the same picture as the body wants it,
    (batch, 1, h, w) with zero mean and unit deviation, to logits (batch, num_classes). Without the second input it is
    made of the first.

    Raises:
        ValueError: an unknown attention, sizes that do not fit; in ``forward``, images too small or of another size
            than the classifier's, inputs of different batches.

    Source: arXiv 2110.06063.

    >>> import torch
    >>> model = Medusa(197, (32, 32), num_classes=3, depths=(1, 1, 1, 1), width=4, body_width=2).eval()
    >>> model(torch.rand(2, 3, 197, 197)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 480,
        semantic_size: int | Sequence[int] = 256,
        in_chans: int = 3,
        num_classes: int = 2,
        attention: str = "multi_scale",
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        body_width: int = 32,
        drop_rate: int | float = 0.0,
        body_starts: int = 0,
    ) -> None:
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths={depths} must be four numbers of at least 1")
        self.semantic_size = both_sides(semantic_size)
        if any(side < 16 or side % 16 for side in self.semantic_size):
            raise ValueError(f"semantic_size={semantic_size} must be divisible by 16")
        self.in_chans, self.num_classes, self.attention, self.drop_rate = in_chans, num_classes, attention, drop_rate
        self.grad_checkpointing, self.body_starts = False, body_starts
        dims = [width, *(4 * width * 2**s for s in range(4))]
        self.dims = dims
        self.sem = GlobalAttention(body_width)
        attended = {"multi_scale": (0, 1, 2, 3), "single_scale": (3,)}.get(attention, ())
        for scale in attended:
            self.sem.add_module(str(600 + scale), ScaleHead(dims[scale]))
        self.conv1, self.bn_conv1 = nn.Conv2d(in_chans, width, 7, stride=2), _norm(width)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Bottleneck(dims[s] if b == 0 else dims[s + 1], width * 2**s, dims[s + 1], 1 + (b == 0 < s), b == 0)
                    for b in range(depth)
                )
            )
            for s, depth in enumerate(depths)
        )
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2 ** max(s - 1, 0), "module": f"stages.{s - 1}" if s else "bn_conv1"}
            for s, dim in enumerate(dims)
        ]
        self.apply(_initialise)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """A classifier for images of another size; where the number of tiles changes, it is a fresh one.

        Raises:
            ValueError: a side so small that the last map has no tile of 7 x 7.
        """
        self.img_size = both_sides(img_size)
        self.tiles = _tiles(self.img_size)
        features = self.dims[-1] * self.tiles[0] * self.tiles[1]
        like = self.conv1.weight
        old = getattr(self, "final_output", None)
        if not isinstance(old, nn.Linear) or old.in_features != features:
            fresh = nn.Linear(features, self.num_classes) if self.num_classes else nn.Identity()
            self.final_output = fresh.to(like.device, like.dtype)

    def frozen_parameters(self, epoch: int) -> list[nn.Parameter]:
        """The authors' alternation: body and heads learn in every third epoch, everything else in the others.

        Args:
            epoch: from 0; before ``body_starts``, body and heads do not learn at all.

        Returns:
            The parameters that keep their values in this epoch; batch norms go on counting.
        """
        body = epoch >= self.body_starts and epoch % 3 == 0
        return [parameter for name, parameter in self.named_parameters() if name.startswith("sem.") != body]

    def attend(self, image: Tensor, semantic: Tensor | None = None) -> Tensor:
        """The body's map A, (batch, 1, h, w)."""
        if semantic is None:
            semantic = semantic_image(image, self.semantic_size)
        if semantic.shape[0] != image.shape[0]:
            raise ValueError(f"image has a batch of {image.shape[0]}, the semantic image of {semantic.shape[0]}")
        return self.sem(semantic)

    def scales(self, image: Tensor, semantic: Tensor | None = None) -> Iterator[Tensor]:
        """The attended maps of stem and stages, one after the other."""
        check_image(image, self.in_chans)
        weights = self.attend(image, semantic)
        if self.attention in ("residual", "mask"):
            masked = image * legacy_resize(weights, (image.shape[2], image.shape[3]), align_corners=True)
            image = image + masked if self.attention == "residual" else masked
        x = F.relu(self.bn_conv1(self.conv1(same_padding(image, 7, 2))))
        x = self._head(0, F.max_pool2d(x, 3, stride=2), weights)
        yield x
        for scale, stage in enumerate(self.stages, 1):
            x = self._head(
                scale, recompute(stage, x) if self.grad_checkpointing and self.training else stage(x), weights
            )
            yield x

    def forward_features(self, image: Tensor, semantic: Tensor | None = None) -> Tensor:
        """The last stage's map."""
        *_, last = self.scales(image, semantic)
        return last

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tiles of 7 x 7, averaged and flattened, then the classifier; ``pre_logits`` stops before it."""
        pooled = F.avg_pool2d(x, TILE, TILE)
        if tuple(pooled.shape[2:]) != self.tiles:
            raise ValueError(
                f"{pooled.shape[2]} x {pooled.shape[3]} tiles, but the classifier was built for {self.tiles[0]} x "
                f"{self.tiles[1]}, images of {self.img_size[0]} x {self.img_size[1]} pixels: set_input_size changes it"
            )
        features = F.dropout(pooled.permute(0, 2, 3, 1).flatten(1), self.drop_rate, self.training)
        return features if pre_logits else self.final_output(features)

    def forward(self, image: Tensor, semantic: Tensor | None = None) -> Tensor:
        _check_side(image)
        return self.forward_head(self.forward_features(image, semantic))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The attended maps of stem and stages: all for None, the last n for an int. There is no final norm."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        wanted = stage_indices(len(self.feature_info), indices)
        maps, last = [], x
        for index, last in enumerate(self.scales(x)):
            if index in wanted:
                maps.append(last)
            if stop_early and index == max(wanted):
                break
        return maps if intermediates_only else (last, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one wanted, and the classifier."""
        wanted = stage_indices(len(self.feature_info), indices)
        self.stages = self.stages[: max(wanted)]
        if prune_head:
            self.final_output = nn.Identity()
        return wanted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stages in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        return {"stem": r"^sem|^conv1|^bn_conv1", "blocks": [(r"^stages\.(\d+)\.(\d+)", None)]}

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.final_output

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width; the pooling is always the mean of tiles."""
        check_choice("global_pool", global_pool or "avg", ("avg",))
        self.num_classes = num_classes
        del self.final_output
        self.set_input_size(self.img_size)

    def _head(self, scale: int, x: Tensor, weights: Tensor) -> Tensor:
        head = getattr(self.sem, str(600 + scale), None)
        return x if head is None else head(x, weights)


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout, of TensorFlow's graph or already transposed to torch's, renamed to ours."""
    renamed: State = {}
    for key, value in state.items():
        name = re.sub(r":0$", "", key).replace("/", ".")
        for theirs, ours in _TENSORFLOW.items():
            name = re.sub(rf"\.{theirs}$", f".{ours}", name)
        if key.replace(":0", "").endswith("kernel"):
            value = value.permute(3, 2, 0, 1).contiguous() if value.ndim == 4 else value.T.contiguous()
        renamed[re.sub(r"^(res|bn)([2-5])([a-z])_branch(2a|2b|2c|1)\.", _block, name)] = value
    heads = [name for name in renamed if re.match(r"sem\.6\d\d\.", name)]
    if getattr(model, "attention", "") == "single_scale" and {name.split(".")[1] for name in heads} == {"600"}:
        renamed = {name.replace("sem.600.", "sem.603."): value for name, value in renamed.items()}
    if getattr(model, "num_classes", 1) == 0:
        renamed = {name: value for name, value in renamed.items() if not name.startswith("final_output.")}
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return {**counters, **renamed}


_TENSORFLOW = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _block(found: re.Match) -> str:
    kind, stage, letter, branch = found.groups()
    place = f"stages.{int(stage) - 2}.{ord(letter) - ord('a')}"
    if branch == "1":
        return f"{place}.{'shortcut' if kind == 'res' else 'bn_shortcut'}."
    return f"{place}.{'conv' if kind == 'res' else 'bn'}{'abc'.index(branch[1]) + 1}."


def _norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=EPS, momentum=0.01)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and not isinstance(module, ScaleHead):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]


def _last_side(side: int) -> int:
    """How many positions the last map has for so many pixels."""
    side = (-(-side // 2) - 3) // 2 + 1
    for _ in range(3):
        side = -(-side // 2)
    return side


def _tiles(size: Size) -> Size:
    if min(_last_side(side) for side in size) < TILE:
        least = next(side for side in range(1, 1000) if _last_side(side) >= TILE)
        raise ValueError(f"images of {size[0]} x {size[1]} pixels are too small: a side needs at least {least} pixels")
    return _last_side(size[0]) // TILE, _last_side(size[1]) // TILE


def _check_side(image: Tensor) -> None:
    if image.ndim == 4:
        _tiles((image.shape[2], image.shape[3]))


VARIANTS = {
    "medusa": {},
    "medusa_224": {"img_size": 224, "semantic_size": 64, "num_classes": 3},
    "medusa_single_scale": {"attention": "single_scale"},
    "medusa_residual": {"attention": "residual"},
    "medusa_mask": {"attention": "mask"},
}
for _name, _variant in VARIANTS.items():
    _size = _variant.get("img_size", 480)
    register(
        _name,
        Medusa,
        _variant,
        convert=checkpoint_filter_fn,
        stages=5,
        feature_cls="getter",
        num_classes=_variant.get("num_classes", 2),
        input_size=(3, _size, _size),
        fixed_input_size=True,
        pool_size=None,
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        first_conv="conv1",
        classifier="final_output",
    )
