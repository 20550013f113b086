"""HaloNet: ResNet bottlenecks whose 3 x 3 convolution is halo attention.

    stem:  convolutions with stride 2, max-pool (or a strided convolution) to stride 4
    block: 1x1, halo attention (a) or 3x3 convolution (b), 1x1, each with BN, act between; + shortcut; act
    head:  optional 1x1 convolution, mean, Linear

H0 ... H7 are the paper's family, the other names timm's models with published weights; parameters carry timm's names.
Two of these mix halo attention with lambda layers (l) and global attention with relative positions (g).
Images of any size: maps that the block does not divide are padded (``manyheads.layers.halo``).

Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import ClassifierHead, DropPath, EcaModule, SqueezeExcite, make_divisible
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.conv_ffn import initialise_convolution
from manyheads.layers.conv_norm import normed
from manyheads.layers.fused import add, excite
from manyheads.layers.halo import HaloAttention
from manyheads.models.checkpoints import State
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image

ACTS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}
STEMS = ("7x7", "tiered", "3x3")
KINDS = ("a", "b", "g", "l")


class ConvBnAct(nn.Module):
    """Convolution without bias, batch norm, activation (keys ``conv`` and ``bn``)."""

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int, act: str | None, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)
        self.act = ACTS[act](inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return normed(self.conv, self.bn, x, self.act)


class Block(nn.Module):
    """A bottleneck around halo attention ("a"), a convolution ("b"), a lambda layer ("l") or global attention ("g").

    ``grid`` is the size of the map, which only global attention needs.
    """

    def __init__(
        self, dim: int, out_dim: int, kind: str, stride: int, options: dict[str, Any], drop: int | float,
        grid: tuple[int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        act = options["act"]
        inner = make_divisible(options["ratio"] * (dim if options["expand_input"] else out_dim), 8)
        if dim == out_dim and stride == 1:
            self.shortcut = nn.Identity()
        elif options["project_shortcut"]:
            self.shortcut = ConvBnAct(dim, out_dim, 1, None, stride=stride)
        else:
            self.shortcut = None
        self.conv1_1x1 = ConvBnAct(dim, inner, 1, act)
        self.kind = kind
        value = inner
        if kind == "b":
            groups = inner // options["group_width"] if options["group_width"] else 1
            self.conv2_kxk = ConvBnAct(inner, inner, 3, act, stride=stride, groups=groups)
            self.attn = nn.Identity()
            if options["channel_attention"] == "se":
                self.attn = SqueezeExcite(inner, options["squeeze"])
            elif options["channel_attention"] == "eca":
                self.attn = EcaModule(inner)
        else:
            value = int(inner * options["value_ratio"]) if kind == "a" else inner
            self.self_attn = _mixer(kind, inner, value, stride, options, grid)
            self.post_attn = nn.BatchNorm2d(value)
            self.post_act = ACTS[act](inplace=True)
        self.conv3_1x1 = ConvBnAct(value, out_dim, 1, None)
        self.drop_path = DropPath(drop) if drop else nn.Identity()
        self.act = nn.Identity() if options["linear_out"] else ACTS[act](inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1_1x1(x)
        if self.kind == "b":
            y = excite(self.attn, self.conv2_kxk(y))
        else:
            y = self.post_act(self.post_attn(self.self_attn(y)))
        y = self.drop_path(self.conv3_1x1(y))
        return self.act(y if self.shortcut is None else add(self.shortcut(x), y))


class GlobalAttention(BottleneckAttn):
    """timm's attention of all positions with relative positions, for maps of one size."""

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.pos_embed.height, self.pos_embed.width)
        if tuple(x.shape[2:]) != grid:
            raise ValueError(
                f"global attention was made for a map of {grid[0]} x {grid[1]} and got {x.shape[2]} x {x.shape[3]}; "
                "build the model with the img_size of its images"
            )
        return super().forward(x)


def _mixer(kind: str, inner: int, value: int, stride: int, options: dict[str, Any], grid: tuple[int, int]) -> nn.Module:
    """What stands in place of the 3 x 3 convolution."""
    heads, head_dim, ratio = options["heads"], options["head_dim"], options["qk_ratio"]
    if kind == "a":
        return HaloAttention(
            inner, value, block=options["block"], halo=options["halo"], heads=heads, stride=stride, head_dim=head_dim,
            qk_ratio=ratio / options["value_ratio"], mask_padding=options["mask_padding"],
            scale_pos_embed=options["scale_pos_embed"], pad=options["pad"], ceil=options["project_shortcut"],
        )  # fmt: skip
    if heads < 1 or inner % heads:
        raise ValueError(f"heads={heads} must divide the inner width, {inner}")
    if kind == "l":
        return LambdaLayer(inner, stride=stride, num_heads=heads, dim_head=head_dim or 16, r=options["lambda_window"])
    return GlobalAttention(
        inner, feat_size=grid, stride=stride, num_heads=heads, dim_head=head_dim, qk_ratio=ratio,
        scale_pos_embed=options["scale_pos_embed"],
    )  # fmt: skip


class Stage(nn.Sequential):
    """The blocks of one width."""

    grad_checkpointing = False

    def forward(self, input: Tensor) -> Tensor:
        for block in self:
            input = recompute(block, input) if self.grad_checkpointing and self.training else block(input)
        return input


class HaloNet(Backbone):
    """The HaloNet classifier and backbone, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        patterns: the blocks of each stage: "a" (halo attention), "b" (3 x 3 convolution), "l" (lambda layer, arXiv
            2102.08602), "g" (global attention, arXiv 2101.11605), for example ("bb", "bb", "ba", "aa").
        embed_dims: output width of each stage.
        strides: stride of each stage's first block.
        ratios: inner width of each stage's blocks by their output (or input) width, rounded to multiples of 8.
        block, halo: of the attention.
        heads: attention heads of each stage.
        head_dim: width of query and key; None follows from ``qk_ratio``.
        qk_ratio: width of all queries by the inner width.
        value_ratio: width of all values by the inner width (r_v in the paper).
        stem: "7x7", "tiered" (three 3 x 3) or "3x3".
        stem_width: output width of the stem.
        stem_pool: max-pool behind the stem, to stride 4; without it the tiered stem's last convolution is strided and
            the other stems stay at stride 2.
        final_width: width of a last 1 x 1 convolution before the pooling (d_f in the paper); 0 has none.
        act: "relu" or "silu".
        group_width: channels of a group in the 3 x 3 convolutions; 0 has one group.
        channel_attention: "se", "eca" or "" behind the 3 x 3 convolutions.
        squeeze: width of the squeeze-excitation by the inner width.
        expand_input: ratios count from the input width of a block.
        linear_out: no activation after the shortcut.
        project_shortcut: project shortcuts that change the shape; False leaves them out.
        scale_pos_embed, mask_padding, pad: as in ``manyheads.layers.halo.HaloAttention``.
        lambda_window: side of the neighbourhood of the lambda layers, odd.
        img_size: size of the images; only models with "g" blocks depend on it, and take no other.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, unknown names, heads that do not divide widths; in ``forward``,
            an image that is empty, has another number of channels or (``pad=False``) a size that the blocks do not
            divide, with the multiple that they need.

    Source: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731.

    >>> import torch
    >>> model = HaloNet(patterns=("b", "a"), embed_dims=(32, 64), strides=(1, 2), ratios=(0.5, 0.5), heads=(2, 2))
    >>> model(torch.randn(2, 3, 64, 50)).shape
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patterns: Sequence[str] = ("bb", "bb", "ba", "aa"),
        embed_dims: Sequence[int] = (256, 512, 1024, 2048),
        strides: Sequence[int] = (1, 2, 2, 2),
        ratios: Sequence[int | float] = (0.25, 0.25, 0.25, 0.25),
        block: int = 8,
        halo: int = 2,
        heads: Sequence[int] = (8, 8, 8, 8),
        head_dim: int | None = None,
        qk_ratio: int | float = 1.0,
        value_ratio: int | float = 1.0,
        stem: str = "tiered",
        stem_width: int = 64,
        stem_pool: bool = True,
        final_width: int = 0,
        act: str = "relu",
        group_width: int = 0,
        channel_attention: str = "",
        squeeze: int | float = 1 / 16,
        expand_input: bool = False,
        linear_out: bool = False,
        project_shortcut: bool = True,
        scale_pos_embed: bool = False,
        mask_padding: bool = False,
        pad: bool = True,
        lambda_window: int = 13,
        img_size: int | Sequence[int] = 256,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not len(patterns) == len(embed_dims) == len(strides) == len(ratios) == len(heads):
            raise ValueError(
                f"patterns={patterns}, embed_dims={embed_dims}, strides={strides}, ratios={ratios}, heads={heads} "
                "differ in length"
            )
        for kind in "".join(patterns):
            check_choice("patterns", kind, KINDS)
        if lambda_window < 1 or lambda_window % 2 == 0:
            raise ValueError(f"lambda_window={lambda_window} must be odd and positive")
        check_choice("stem", stem, STEMS)
        check_choice("act", act, tuple(ACTS))
        check_choice("channel_attention", channel_attention, ("", "se", "eca"))
        self.in_chans, self.num_classes, self.block, self.pad = in_chans, num_classes, block, pad
        self.stem, reduction = _stem(stem, in_chans, stem_width, stem_pool, act)
        shared = {
            "block": block, "halo": halo, "head_dim": head_dim, "qk_ratio": qk_ratio, "value_ratio": value_ratio,
            "act": act, "group_width": group_width, "channel_attention": channel_attention, "squeeze": squeeze,
            "expand_input": expand_input, "linear_out": linear_out, "project_shortcut": project_shortcut,
            "scale_pos_embed": scale_pos_embed, "mask_padding": mask_padding, "pad": pad,
            "lambda_window": lambda_window,
        }  # fmt: skip
        image = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        drops = iter(torch.linspace(0, drop_path_rate, sum(map(len, patterns)), device="cpu").tolist())
        stages, width, self.multiple, self.feature_info = [], stem_width, 1, []
        for s, (pattern, dim, ratio) in enumerate(zip(patterns, embed_dims, ratios)):
            blocks = []
            for index, kind in enumerate(pattern):
                stride = 1 if index else strides[s]
                if kind == "a":
                    self.multiple = max(self.multiple, block * reduction)
                options = {**shared, "ratio": ratio, "heads": heads[s]}
                grid = (-(-image[0] // reduction), -(-image[1] // reduction))
                blocks.append(Block(width, dim, kind, stride, options, next(drops), grid))
                width, reduction = dim, reduction * stride
            stages.append(Stage(*blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{s}"})
        self.stages = nn.Sequential(*stages)
        self.final_conv = ConvBnAct(width, final_width, 1, act) if final_width else nn.Identity()
        self.num_features = self.head_hidden_size = final_width or width
        self.head = ClassifierHead(self.num_features, num_classes, drop_rate=drop_rate)
        _initialise(self)

    def embed(self, image: Tensor) -> Tensor:
        check_image(image, self.in_chans)
        if not self.pad and any(size % self.multiple for size in image.shape[2:]):
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} pixels: blocks of {self.block} need multiples of "
                f"{self.multiple} pixels (or pad=True)"
            )
        return self.stem(image.contiguous(memory_format=torch.channels_last))

    def finish(self, x: Tensor) -> Tensor:
        return self.final_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over positions, then classify; ``pre_logits`` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^final_conv", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)


class MaxPool(nn.Module):
    """3 x 3 maximum with stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)


def _stem(kind: str, in_chans: int, width: int, pool: bool, act: str) -> tuple[nn.Module, int]:
    """The stem and its stride."""
    kernel_size = 7 if kind == "7x7" else 3
    if kind != "tiered" and not pool:
        return ConvBnAct(in_chans, width, kernel_size, act, stride=2), 2
    stem = nn.Sequential()
    widths = [width * 3 // 8, width // 2, width] if kind == "tiered" else [width]
    for index, out_dim in enumerate(widths):
        last = index == len(widths) - 1
        stride = 2 if index == 0 or (last and not pool) else 1
        stem.add_module(f"conv{index + 1}", ConvBnAct(in_chans, out_dim, kernel_size, act, stride=stride))
        in_chans = out_dim
    if pool:
        stem.add_module("pool", MaxPool())
    return stem, 4


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """timm's layout, which is ours; a model without a classifier leaves the file's aside."""
    if getattr(model, "num_classes", 1) == 0:
        return {key: value for key, value in state.items() if not key.startswith("head.fc.")}
    return state


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            initialise_convolution(module)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, (HaloAttention, LambdaLayer, BottleneckAttn)):
            module.reset_parameters()
        elif isinstance(module, Block) and module.shortcut is not None:
            nn.init.zeros_(module.conv3_1x1.bn.weight)


def _paper(block: int, halo: int, r_v: int | float, r_b: int | float, third: int, final_width: int = 0) -> dict:
    """A row of the paper's table 1."""
    return {
        "patterns": ("aaa", "aaa", "a" * third, "aaa"), "embed_dims": tuple(int(c * r_b) for c in (64, 128, 256, 512)),
        "ratios": (1 / r_b,) * 4, "block": block, "halo": halo, "heads": (4, 8, 8, 8), "value_ratio": r_v,
        "stem": "7x7", "final_width": final_width,
    }  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "halonet_h0": _paper(8, 3, 1, 0.5, 7),
    "halonet_h1": _paper(8, 3, 1, 1, 10),
    "halonet_h2": _paper(8, 3, 1, 1.25, 11),
    "halonet_h3": _paper(10, 3, 1, 1.5, 12, 1024),
    "halonet_h4": _paper(12, 2, 1, 3, 12, 1280),
    "halonet_h5": _paper(14, 2, 2.5, 2, 23, 1536),
    "halonet_h6": _paper(8, 4, 3, 2.75, 24, 1536),
    "halonet_h7": _paper(10, 3, 4, 3.5, 26, 2048),
    "halonet_h1_timm": _paper(8, 3, 1, 1, 10) | {"heads": (8, 8, 8, 8)},
    "halonet26t": {},
    "halonet50ts": {"patterns": ("bbb", "bbba", "bababa", "bab"), "halo": 3, "heads": (8, 4, 8, 8), "act": "silu"},
    "sehalonet33ts": {
        "patterns": ("bb", "bba", "bba", "aa"), "embed_dims": (256, 512, 1024, 1536), "halo": 3, "act": "silu",
        "ratios": (0.25, 0.25, 0.25, 0.333), "stem_pool": False, "channel_attention": "se", "final_width": 1280,
    },
    "lamhalobotnet50ts": {
        "patterns": ("bbb", "blbl", "bababa", "bgb"), "halo": 3, "heads": (4, 4, 8, 4), "act": "silu",
        "stem_pool": False,
    },
    "halo2botnet50ts": {
        "patterns": ("bbb", "baba", "bababa", "bgb"), "halo": 3, "heads": (8, 8, 8, 4), "act": "silu",
        "stem_pool": False,
    },
    "eca_halonext26ts": {"act": "silu", "group_width": 16, "channel_attention": "eca", "head_dim": 16},
    "haloregnetz_b": {
        "patterns": ("bb", "b" * 6, "bbba" * 3, "aa"), "embed_dims": (48, 96, 192, 288), "strides": (2, 2, 2, 2),
        "ratios": (3, 3, 3, 3), "block": 7, "qk_ratio": 0.33, "stem": "3x3", "stem_width": 32, "stem_pool": False,
        "final_width": 1536, "act": "silu", "group_width": 16, "channel_attention": "se", "squeeze": 0.25,
        "expand_input": True, "linear_out": True, "project_shortcut": False,
    },
}  # fmt: skip
_CROPS: dict[str, float] = dict.fromkeys(("halonet50ts", "sehalonet33ts", "eca_halonext26ts", "haloregnetz_b"), 0.94)
_SIZES = {"halonet_h3": 320, "halonet_h4": 384, "halonet_h5": 448, "halonet_h6": 512, "halonet_h7": 640,
          "haloregnetz_b": 224}  # fmt: skip
for _name, _variant in VARIANTS.items():
    _size = _SIZES.get(_name, 256)
    _statistics: dict[str, Any] = (
        {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD} if "regnetz" in _name else {}
    )
    register(
        _name,
        HaloNet,
        _variant,
        convert=checkpoint_filter_fn,
        first_conv="stem.conv.conv" if "regnetz" in _name else "stem.conv1.conv",
        classifier="head.fc",
        input_size=(3, _size, _size),
        pool_size=(_size // 32, _size // 32),
        fixed_input_size="botnet" in _name,
        crop_pct=_CROPS.get(_name, 0.95),
        **_statistics,
    )
