"""MaxViT: a pyramid whose every block convolves, attends inside blocks and attends across a grid over the whole map.

    stem:  Conv3x3 stride 2, BN, act, Conv3x3.        stages at strides 4, 8, 16, 32, the first block of each strided
    block: MBConv, block attention + MLP, grid attention + MLP
    head:  mean, LN, Linear, tanh, Linear ("tf");     LN, mean, Linear ("rw", "rmlp")

Images of any size: the partition stays what the model was built for (side / 32), maps that it does not divide are
padded inside each attention (``manyheads.layers.maxvit``); ``set_input_size`` changes the partition and resizes the
tables.

Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import ClassifierHead, LayerNorm2d, NormMlpClassifierHead
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import both_sides, check_choice
from manyheads.layers.conv_ffn import initialise_convolution
from manyheads.layers.maxvit import AXES, FLAVOURS, Conv3x3, MBConv, PartitionAttention
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.maxvit_checkpoints import checkpoint_filter_fn

STRIDE = 32
Size = int | Sequence[int]


class Stem(nn.Module):
    """Two 3 x 3 convolutions, the first with stride 2."""

    def __init__(self, in_chans: int, widths: tuple[int, int], flavour: str) -> None:
        super().__init__()
        style = FLAVOURS[flavour]
        options = {"bias": style.output_bias, "same": style.same_padding}
        self.conv1 = Conv3x3(in_chans, widths[0], stride=2, **options)
        self.norm1 = nn.BatchNorm2d(widths[0], eps=style.bn_eps)
        self.act = style.conv_act()
        self.conv2 = Conv3x3(widths[0], widths[1], **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv2(self.conv1(x, self.norm1, self.act))


class Block(nn.Module):
    """MBConv and the two attention halves, from and to (batch, channels, X, Y)."""

    def __init__(self, conv: MBConv, attn_block: PartitionAttention, attn_grid: PartitionAttention) -> None:
        super().__init__()
        self.conv, self.attn_block, self.attn_grid = conv, attn_block, attn_grid

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return self.attn_grid(self.attn_block(x)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks of equal width, the first of them with stride 2."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class MaxViT(Backbone):
    """The MaxViT classifier and backbone, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        global_pool: timm's name of the pooling ("avg" in all published models).
        img_size: pixels, an integer or (height, width); decides the partition where none is given.
        depths: blocks in each stage.
        embed_dims: width of each stage, multiples of ``head_dim``.
        stem_width: widths of the stem's convolutions, one integer for both.
        head_dim: width of an attention head.
        flavour: "tf" (the authors'), "rw" or "rmlp" (timm's variants), see ``manyheads.layers.maxvit.Flavour``.
        layer_scale: initial factor on the residual branches of attention and MLP; None has none.
        head_hidden_size: width of the tanh layer before the classifier; 0 has none.
        window_size: partition of block attention, an integer or (height, width); None is ``img_size / 32``.
        grid_size: partition of grid attention; None is ``window_size``.
        axes: what the two halves of a block attend to; ("block", "block") is the paper's ablation without grids.
        pad: pad maps that the partitions do not divide; False refuses such images and names the nearest sizes.
        attn_drop: dropout on attention weights.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: options of different lengths, widths that ``head_dim`` does not divide, unknown names; in
            ``forward``, an image that is empty, has another number of channels, or (``pad=False``) another size.

    Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697.

    >>> import torch
    >>> model = MaxViT(img_size=64, depths=(1, 1), embed_dims=(32, 64), stem_width=16, num_classes=10)
    >>> model(torch.randn(2, 3, 64, 50)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: Size = 224,
        depths: Sequence[int] = (2, 2, 5, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        stem_width: int | Sequence[int] = 64,
        head_dim: int = 32,
        flavour: str = "tf",
        layer_scale: int | float | None = None,
        head_hidden_size: int = 0,
        window_size: Size | None = None,
        grid_size: Size | None = None,
        axes: Sequence[str] = AXES,
        pad: bool = True,
        attn_drop: int | float = 0.0,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("flavour", flavour, tuple(FLAVOURS))
        if len(depths) != len(embed_dims):
            raise ValueError(f"depths={depths} and embed_dims={embed_dims} differ in length")
        if len(axes) != 2:
            raise ValueError(f"axes={axes!r} must name what the two halves of a block attend to, from {AXES}")
        for axis in axes:
            check_choice("axes", axis, AXES)
        stem = (stem_width, stem_width) if isinstance(stem_width, int) else (int(stem_width[0]), int(stem_width[1]))
        self.in_chans, self.num_classes, self.flavour, self.pad = in_chans, num_classes, flavour, pad
        self.window_size = both_sides(window_size) if window_size else default_partition(img_size)
        self.grid_size = both_sides(grid_size) if grid_size else self.window_size
        self.num_features = embed_dims[-1]
        self.grad_checkpointing = False

        self.stem = Stem(in_chans, stem, flavour)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages, width = [], stem[1]
        for depth, dim in zip(depths, embed_dims):
            blocks = []
            for index in range(depth):
                drop_path = next(rates)

                def half(axis: str, sides: tuple[int, int], dim: int = dim, drop_path: float = drop_path):
                    return PartitionAttention(
                        dim, sides, axis=axis, head_dim=head_dim, flavour=flavour, layer_scale=layer_scale,
                        attn_drop=attn_drop, drop_path=drop_path, pad=pad,
                    )  # fmt: skip

                conv = MBConv(width, dim, stride=1 if index else 2, flavour=flavour, drop_path=drop_path)
                blocks.append(Block(conv, half(axes[0], self.window_size), half(axes[1], self.grid_size)))
                width = dim
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**s, "module": f"stages.{s}"} for s, dim in enumerate(embed_dims)
        ]

        norm = partial(LayerNorm2d, eps=FLAVOURS[flavour].ln_eps)
        if head_hidden_size:
            self.norm = nn.Identity()
            self.head = NormMlpClassifierHead(
                self.num_features, num_classes, hidden_size=head_hidden_size, pool_type=global_pool,
                drop_rate=drop_rate, norm_layer=norm, act_layer="tanh",
            )  # fmt: skip
        else:
            self.norm = norm(self.num_features)
            self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.head.num_features
        self.apply(_initialise_tf if flavour == "tf" else _initialise_rw)

    def set_input_size(
        self, img_size: Size | None = None, *, window_size: Size | None = None, grid_size: Size | None = None
    ) -> None:
        """Other partitions (side / 32 where only the image size is given), with the bias tables resized."""
        if img_size is None and window_size is None:
            raise ValueError("set_input_size needs img_size or window_size")
        self.window_size = both_sides(window_size) if window_size else default_partition(img_size)
        self.grid_size = both_sides(grid_size) if grid_size else self.window_size
        for block in self.modules():
            if isinstance(block, Block):
                block.attn_block.attn.set_partition(self.window_size)
                block.attn_grid.attn.set_partition(self.grid_size)

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay leaves alone beside biases and norms: the bias tables."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def embed(self, image: Tensor) -> Tensor:
        """The stem, for images that the partitions divide where nothing is padded."""
        if not self.pad:
            self._check_size(image)
        return self.stem(image)

    def finish(self, x: Tensor) -> Tensor:
        """The norm before the pooling, which only the "rw" and "rmlp" models have."""
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; ``pre_logits`` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def _check_size(self, image: Tensor) -> None:
        steps = [STRIDE * math.lcm(*sides) for sides in zip(self.window_size, self.grid_size)]
        if any(size % step for size, step in zip(image.shape[2:], steps)):
            near = " x ".join(_nearest(size, step) for size, step in zip(image.shape[2:], steps))
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} pixels: partitions {self.window_size} and "
                f"{self.grid_size} need multiples of {steps[0]} x {steps[1]}; nearest sizes: {near} (or pad=True)"
            )


def default_partition(img_size: Size | None) -> tuple[int, int]:
    """The published rule: a 32nd of the image's sides.

    Raises:
        ValueError: an image smaller than 32 pixels.
    """
    height, width = both_sides(224 if img_size is None else img_size)
    if min(height, width) < STRIDE:
        raise ValueError(f"img_size={img_size} is below {STRIDE} pixels; give window_size for smaller images")
    return height // STRIDE, width // STRIDE


def _nearest(size: int, step: int) -> str:
    below = size // step * step
    return f"({below} or {below + step})" if below else str(step)


def _initialise_tf(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _initialise_rw(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        initialise_convolution(module)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _options(width: int, depths: tuple[int, ...], **rest: object) -> dict:
    return {"depths": depths, "embed_dims": tuple(width * 2**s for s in range(4)), **rest}


def _tf(width: int, depths: tuple[int, ...], stem: int, size: int) -> dict:
    return _options(width, depths, stem_width=stem, head_hidden_size=8 * width, flavour="tf", img_size=size)


_SHALLOW, _DEEP = (2, 2, 5, 2), (2, 6, 14, 2)
_SIZES = {"tiny": (64, _SHALLOW, 64), "small": (96, _SHALLOW, 64), "base": (96, _DEEP, 64), "large": (128, _DEEP, 128),
          "xlarge": (192, _DEEP, 192)}  # fmt: skip
_PICO, _SMALL_STEM = (24, 32), (32, 64)
VARIANTS = {
    **{f"maxvit_{name}": _tf(*sizes, 224) for name, sizes in _SIZES.items()},
    **{f"maxvit_{name}_tf_{size}": _tf(*sizes, size) for name, sizes in _SIZES.items() for size in (224, 384, 512)},
    "maxvit_pico_rw_256": _options(32, _SHALLOW, stem_width=_PICO, flavour="rw", img_size=256),
    "maxvit_nano_rw_256": _options(64, (1, 2, 3, 1), stem_width=_SMALL_STEM, flavour="rw", img_size=256),
    "maxvit_tiny_rw_224": _options(64, _SHALLOW, stem_width=_SMALL_STEM, flavour="rw", img_size=224),
    "maxvit_tiny_rw_256": _options(64, _SHALLOW, stem_width=_SMALL_STEM, flavour="rw", img_size=256),
    "maxvit_rmlp_pico_rw_256": _options(32, _SHALLOW, stem_width=_PICO, flavour="rmlp", img_size=256),
    "maxvit_rmlp_nano_rw_256": _options(64, (1, 2, 3, 1), stem_width=_SMALL_STEM, flavour="rmlp", img_size=256),
    "maxvit_rmlp_tiny_rw_256": _options(64, _SHALLOW, stem_width=_SMALL_STEM, flavour="rmlp", img_size=256),
    **{
        f"maxvit_rmlp_small_rw_{size}": _options(
            96, _SHALLOW, stem_width=_SMALL_STEM, flavour="rmlp", img_size=size, layer_scale=1e-6
        )
        for size in (224, 256)
    },
    **{
        f"maxvit_rmlp_base_rw_{size}": _options(
            96, _DEEP, stem_width=_SMALL_STEM, flavour="rmlp", img_size=size, head_hidden_size=768
        )
        for size in (224, 384)
    },
}


def _data(name: str, size: int) -> dict[str, Any]:
    config: dict[str, Any] = {"input_size": (3, size, size), "pool_size": (size // STRIDE,) * 2, "crop_pct": 0.95}
    if "xlarge" in name or "_rw" in name or size > 256:
        config |= {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
    if size > 256:
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    if name == "maxvit_rmlp_small_rw_224":
        config["crop_pct"] = 0.9
    return config


for _name, _variant in VARIANTS.items():
    register(
        _name,
        MaxViT,
        _variant,
        convert=checkpoint_filter_fn,
        first_conv="stem.conv1",
        classifier="head.fc",
        fixed_input_size=False,
        **_data(_name, _variant["img_size"]),
    )
