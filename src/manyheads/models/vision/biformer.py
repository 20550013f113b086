"""BiFormer: a pyramid of blocks with bi-level routing attention and, in its last stage, full attention.

    stem (T/S/B): Conv3x3 s2, BN, GELU, Conv3x3 s2, BN;    between stages: Conv3x3 s2, BN
    stem (STL):   Conv4x4 s4, BN;                          between stages: BN, Conv2x2 s2
    block:        x <- x + DWConv3x3(x)  (not in STL);  x <- x + Attn(LN(x));  x <- x + MLP(LN(x))
    head:         BN, mean over positions, Linear

Inside a stage a map is (batch, X, Y, channels); between stages and in ``features_only`` it is the same memory seen as
(batch, channels, X, Y).

Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.biformer import AxialAttention, BiLevelRoutingAttention, ConvMixer, FullAttention
from manyheads.layers.davit import ConvPositionEncoding, WindowAttention
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image, stage_indices

ATTENTIONS = ("bra", "window", "axial")
STEMS = ("conv", "patch")
FULL, FULL_LEPE, CONVOLUTION = -1, -2, 0  # what values of topk below 1 mean
EPS = 1e-6


class ConvMlp(nn.Module):
    """Linear, optionally a depthwise convolution, GELU, Linear, on (batch, X, Y, channels)."""

    def __init__(self, dim: int, hidden: int, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden) if depthwise else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """Position encoding, attention, MLP, on (batch, X, Y, channels); ``pre_norm=False`` norms after each sum."""

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        mlp_ratio: float,
        mlp_dwconv: bool,
        pos_embed: bool,
        layer_scale: float | None,
        pre_norm: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.pos_embed = ConvPositionEncoding(dim) if pos_embed else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), mlp_dwconv)
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        for norm, branch, gamma in ((self.norm1, self.attn, self.gamma1), (self.norm2, self.mlp, self.gamma2)):
            change = branch(norm(x) if self.pre_norm else x)
            x = x + self.drop_path(change if gamma is None else gamma * change)
            x = x if self.pre_norm else norm(x)
        return x


class Stage(nn.Module):
    """A downsampling (the stem, in the first stage) and blocks, from and to (batch, channels, X, Y)."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x.permute(0, 3, 1, 2)


class BiFormer(Backbone):
    """The BiFormer classifier and backbone.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled features.
        depths: blocks in each stage.
        embed_dims: width of each stage.
        head_dim: width of a head of bi-level routing attention.
        qk_dims: width of query and key in each stage; None means ``embed_dims``. Heads are ``qk_dim // head_dim``.
        regions: n, regions per side in every stage: 7 for classification, 8 or 16 for dense prediction.
        topks: k in each stage; -2 is full attention with LePE, -1 without, 0 a depthwise convolution instead.
        mlp_ratios: hidden width of the MLPs by the block's width, for all stages or one each.
        stem: "conv" (overlapping 3x3 convolutions: T/S/B) or "patch" (Swin-Tiny's layout: STL).
        pos_embed: depthwise 3x3 convolution at the start of each block.
        formulation: "legacy" or "current" (the authors' "nchw"); see ``BiLevelRoutingAttention``.
        full_lepe: what LePE of full attention reads, "input" or "value".
        lepe_kernel: side of the LePE convolutions; 0 leaves them away.
        auto_pad: take maps of any size; see ``BiLevelRoutingAttention``.
        soft_routing, diff_routing, param_routing: see ``BiLevelRoutingAttention``.
        kv_downsample: pooling of keys and values inside regions, for all stages.
        kv_sizes: its size or ratio in each stage.
        output_projection: see ``BiLevelRoutingAttention``.
        qk_scale: factor on the token scores; None means the published ``qk_dim ** -0.5``.
        layer_scale: initial value of learnt factors on both branches; None, as in the published models, has none.
        pre_norm: False norms after the residual sums.
        mlp_dwconv: depthwise 3x3 convolution inside the MLPs.
        attention: "bra", or what it is compared with: "window" (plain windows of 7 x 7 tokens) or "axial" (rows and
            columns in turn); stages of full attention or convolution stay.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 over all blocks.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, widths that heads do not divide, unknown names; in
            ``forward``, an image without pixels or with another number of channels, or, without ``auto_pad``, of a
            size that the regions do not divide.

    Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.

    >>> import torch
    >>> model = BiFormer(depths=(1, 1), embed_dims=(32, 64), topks=(2, -2), regions=4, num_classes=10)
    >>> model(torch.randn(2, 3, 32, 48)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        head_dim: int = 32,
        qk_dims: Sequence[int] | None = None,
        regions: int = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        mlp_ratios: float | Sequence[int | float] = 3.0,
        stem: str = "conv",
        pos_embed: bool = True,
        formulation: str = "legacy",
        full_lepe: str = "input",
        lepe_kernel: int = 5,
        auto_pad: bool = True,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        kv_downsample: str = "identity",
        kv_sizes: Sequence[int | None] | None = None,
        output_projection: bool = True,
        qk_scale: float | None = None,
        layer_scale: float | None = None,
        pre_norm: bool = True,
        mlp_dwconv: bool = False,
        attention: str = "bra",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        check_choice("stem", stem, STEMS)
        count = len(embed_dims)
        ratios = mlp_ratios if isinstance(mlp_ratios, Sequence) else (mlp_ratios,) * count
        widths, sizes = qk_dims or embed_dims, kv_sizes or (None,) * count
        per_stage = {"depths": depths, "topks": topks, "mlp_ratios": ratios, "qk_dims": widths, "kv_sizes": sizes}
        for name, values in per_stage.items():
            if len(values) != count:
                raise ValueError(f"{name}={values} must name one value for each of the {count} embed_dims")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]

        def mixer(s: int, j: int) -> nn.Module:
            dim, topk = embed_dims[s], topks[s]
            if topk == CONVOLUTION:
                return ConvMixer(dim)
            if topk < 1:
                if topk not in (FULL, FULL_LEPE):
                    raise ValueError(f"topks={topks}: below 1 only 0, -1 and -2 have a meaning")
                return FullAttention(dim, lepe=full_lepe if topk == FULL_LEPE else "none", lepe_kernel=lepe_kernel)
            heads = widths[s] // head_dim
            if attention == "window":
                return WindowAttention(dim, heads, window=7)
            if attention == "axial":
                return AxialAttention(dim, heads, axis=j % 2)
            return BiLevelRoutingAttention(
                dim, heads, regions=regions, topk=topk, formulation=formulation, auto_pad=auto_pad,
                qk_dim=widths[s], scale=qk_scale, lepe_kernel=lepe_kernel, param_routing=param_routing,
                soft_routing=soft_routing, diff_routing=diff_routing, kv_downsample=kv_downsample, kv_size=sizes[s],
                output_projection=output_projection,
            )  # fmt: skip

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        shared = {"mlp_dwconv": mlp_dwconv, "pos_embed": pos_embed, "layer_scale": layer_scale, "pre_norm": pre_norm}
        stages = []
        for s, dim in enumerate(embed_dims):
            blocks = [
                Block(dim, mixer(s, j), mlp_ratio=float(ratios[s]), drop_path=next(rates), **shared)
                for j in range(depths[s])
            ]
            stages.append(Stage(_downsample(stem, embed_dims[s - 1] if s else in_chans, dim, first=s == 0), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**s, "module": f"stages.{s}"} for s, dim in enumerate(embed_dims)
        ]
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        later = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)" if coarse else later}

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)


class BiFormerDense(nn.Module):
    """A BiFormer as detection and segmentation heads want it: a normed map of every stage, no classifier.

    Args:
        model: the trunk (published with ``regions=8`` for 512 pixel crops, 16 for detection); its final batch norm
            and classifier are dropped.
        out_indices: the stages whose maps are returned.

    >>> import torch
    >>> trunk = BiFormer(depths=(1, 1), embed_dims=(32, 64), topks=(2, -2), regions=4)
    >>> [tuple(x.shape) for x in BiFormerDense(trunk, (0, 1))(torch.randn(1, 3, 32, 48))]
    [(1, 32, 8, 12), (1, 64, 4, 6)]
    """

    def __init__(self, model: BiFormer, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        self.out_indices = tuple(stage_indices(len(model.stages), None if out_indices is None else list(out_indices)))
        self.in_chans, self.num_classes, self.stages = model.in_chans, 0, model.stages
        self.feature_info = [model.feature_info[s] for s in self.out_indices]
        self.extra_norms = nn.ModuleList(LayerNorm2d(info["num_chs"], eps=EPS) for info in model.feature_info)

    def forward(self, x: Tensor) -> list[Tensor]:
        check_image(x, self.in_chans)
        maps = []
        for s, stage in enumerate(self.stages):
            x = stage(x)
            if s in self.out_indices:
                maps.append(self.extra_norms[s](x))
        return maps


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layouts (T/S/B, STL, STL-nchw with its 1x1 convolutions, dense backbones) renamed to ours.

    Where the model has no classifier, that of the file is left out.
    """
    if any(key.startswith("downsample_layers.") for key in state):
        state = rename(state, _OFFICIAL)
        linear = (".qkv.weight", ".wo.weight", ".proj.weight", ".fc1.weight", ".fc2.weight", ".proj_in.weight")
        state = {
            key: value.flatten(1) if key.endswith((*linear, ".proj_out.weight")) and "pos_embed" not in key else value
            for key, value in state.items()
        }
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    return state


_OFFICIAL = [
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"\.pos_embed\.", ".pos_embed.proj."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.output_linear\.", ".attn.wo."),
    (r"\.attn\.router\.emb\.", ".attn.router."),
    (r"\.attn\.1\.", ".attn.proj_in."),
    (r"\.attn\.2\.", ".attn.mix."),
    (r"\.attn\.3\.", ".attn.proj_out."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.dwconv\.", ".mlp.dwconv."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
]


def _downsample(stem: str, dim: int, out_dim: int, *, first: bool) -> nn.Sequential:
    if stem == "patch":
        if first:
            return nn.Sequential(nn.Conv2d(dim, out_dim, 4, stride=4), nn.BatchNorm2d(out_dim))
        return nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, out_dim, 2, stride=2))
    half = out_dim // 2 if first else out_dim
    layers: list[Any] = [nn.Conv2d(dim, half, 3, stride=2, padding=1), nn.BatchNorm2d(half)]
    if first:
        layers += [nn.GELU(), nn.Conv2d(half, out_dim, 3, stride=2, padding=1), nn.BatchNorm2d(out_dim)]
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _options(width: int, depths: tuple[int, ...], **rest: object) -> dict:
    return {"depths": depths, "embed_dims": tuple(width * 2**s for s in range(4)), **rest}


_STL = {"stem": "patch", "pos_embed": False, "mlp_ratios": 4.0}
VARIANTS = {
    "biformer_tiny": _options(64, (2, 2, 8, 2)),
    "biformer_small": _options(64, (4, 4, 18, 4)),
    "biformer_base": _options(96, (4, 4, 18, 4)),
    "biformer_stl": _options(96, (2, 2, 6, 2), **_STL),
    "biformer_stl_nchw": _options(96, (2, 2, 6, 2), **_STL, formulation="current", full_lepe="value"),
}
for _name, _variant in VARIANTS.items():
    _first = "stages.0.downsample.0"
    register(
        _name, BiFormer, _variant, convert=checkpoint_filter_fn, first_conv=_first, classifier="head", crop_pct=0.875
    )
