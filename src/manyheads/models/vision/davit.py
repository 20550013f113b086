"""DaViT: a pyramid of dual blocks, window attention and channel-group attention taking turns.

    stem: Conv7x7 stride 4, LN.   Between stages: LN, Conv2x2 stride 2.   Head: mean over positions, LN, Linear.
    sub-block (either attention):  x <- CPE1(x);  x <- x + Attn(LN1(x));  x <- CPE2(x);  x <- x + MLP(LN2(x))

Inside a stage a map is (batch, X, Y, channels); between stages and in ``features_only`` it is the same memory seen as
(batch, channels, X, Y). Parameters carry timm's names, so weights go either way without conversion.

Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645 (Florence-2 towers: arXiv 2311.06242).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, NormMlpClassifierHead, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.conv_norm import normed
from manyheads.layers.davit import ChannelAttention, ConvPositionEncoding, WindowAttention
from manyheads.layers.fused import add, perceive
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone

ATTENTIONS = ("spatial", "channel")


class SubBlock(nn.Module):
    """One attention with its MLP: CPE, attention, CPE, MLP, on (batch, X, Y, channels)."""

    def __init__(
        self, dim: int, attention: nn.Module, mlp_ratio: int | float, drop_path: int | float, cpe_act: bool
    ) -> None:
        super().__init__()
        self.cpe1 = ConvPositionEncoding(dim, activation=cpe_act)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.cpe2 = ConvPositionEncoding(dim, activation=cpe_act)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = add(x, self.drop_path1(self.attn(self.norm1(x))))
        x = self.cpe2(x)
        return add(x, self.drop_path2(perceive(self.mlp, self.norm2(x))))


class Stem(nn.Module):
    """Image to patches: Conv7x7 with stride 4, then LN; ceil(side / 4) tokens a side whatever the image size."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        # Padding 3 already covers what the paper's zero padding to a multiple of 4 would add.
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3)
        self.norm = LayerNorm2d(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(normed(self.conv, None, x.contiguous(memory_format=torch.channels_last)))


class Downsample(nn.Module):
    """Half the sides and a new width: LN, zero padding to even sides (kernel 2 only), convolution with stride 2."""

    def __init__(self, dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-5)
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, stride=2, padding=(kernel_size - 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        below, right = x.shape[2] % 2, x.shape[3] % 2
        if self.conv.kernel_size[0] == 2 and (below or right):
            x = F.pad(x, (0, right, 0, below))
        return normed(self.conv, None, x)


class Stage(nn.Module):
    """A downsampling and ``depth`` dual blocks, from and to (batch, channels, X, Y)."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Sequential]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x.permute(0, 3, 1, 2)


class DaViT(Backbone):
    """The DaViT classifier and backbone, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled, normed features.
        global_pool: timm's name of the pooling ("avg" in all published models).
        depths: dual blocks in each stage.
        embed_dims: width of each stage.
        num_heads: attention heads, which is also the number of channel groups, of each stage.
        window_size: side of the attention windows in tokens.
        mlp_ratio: hidden width of the MLP by the block's width.
        qkv_bias: bias of the attention projections.
        attention_types: what takes turns in a dual block, in order; ("spatial",) and ("channel",) are the ablations.
        channel_flavour: "v1" (DaViT) or "v2" (Florence-2), see ``manyheads.layers.davit.ChannelAttention``.
        down_kernel_size: 2 (DaViT) or 3 (Florence-2) between the stages.
        cpe_act: GELU on the branch of the conv position encodings.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last sub-block; rises linearly from 0 over all sub-blocks.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, widths that heads do not divide, an unknown attention type;
            in ``forward``, an image that is empty or has another number of channels.

    Source: "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645.

    >>> import torch
    >>> model = DaViT(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4, num_classes=10)
    >>> model(torch.randn(2, 3, 30, 45)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: int | float = 4.0,
        qkv_bias: bool = True,
        attention_types: Sequence[str] = ATTENTIONS,
        channel_flavour: str = "v1",
        down_kernel_size: int = 2,
        cpe_act: bool = False,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(embed_dims) == len(num_heads):
            raise ValueError(f"depths={depths}, embed_dims={embed_dims}, num_heads={num_heads} differ in length")
        if isinstance(attention_types, str) or not attention_types:
            raise ValueError(f"attention_types={attention_types!r} must be a sequence of {ATTENTIONS}")
        for kind in attention_types:
            check_choice("attention_types", kind, ATTENTIONS)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]

        self.stem = Stem(in_chans, embed_dims[0])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths) * len(attention_types), device="cpu").tolist())
        stages = []
        for s, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads)):

            def attention(kind: str, dim: int = dim, heads: int = heads) -> nn.Module:
                if kind == "spatial":
                    return WindowAttention(dim, heads, window=window_size, qkv_bias=qkv_bias)
                return ChannelAttention(dim, heads, flavour=channel_flavour, qkv_bias=qkv_bias)

            blocks = [
                nn.Sequential(*(SubBlock(dim, attention(a), mlp_ratio, next(rates), cpe_act) for a in attention_types))
                for _ in range(depth)
            ]
            stages.append(Stage(Downsample(embed_dims[s - 1], dim, down_kernel_size) if s else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**s, "module": f"stages.{s}"} for s, dim in enumerate(embed_dims)
        ]
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=_norm2d,
        )
        self.apply(_initialise)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        )
        return {"stem": r"^stem", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def embed(self, image: Tensor) -> Tensor:
        return self.stem(image)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, then norm, then classify; ``pre_logits`` stops before the classifier."""
        return self.head(x, pre_logits=pre_logits)


class DaViTDense(nn.Module):
    """A DaViT as detection and segmentation heads want it: the normed map of every stage, no classifier.

    Args:
        model: the trunk; its classifier is dropped.
        out_indices: the stages whose maps are returned.

    >>> import torch
    >>> trunk = DaViT(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4)
    >>> [tuple(x.shape) for x in DaViTDense(trunk, (0, 1))(torch.randn(1, 3, 30, 45))]
    [(1, 16, 8, 12), (1, 32, 4, 6)]
    """

    def __init__(self, model: DaViT, out_indices: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.out_indices = tuple(out_indices)
        self.stem, self.stages = model.stem, model.stages
        self.feature_info = [model.feature_info[s] for s in self.out_indices]
        for s, info in zip(self.out_indices, self.feature_info):
            self.add_module(f"norm{s}", LayerNorm2d(info["num_chs"], eps=1e-5))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for s, stage in enumerate(self.stages):
            x = stage(x)
            if s in self.out_indices:
                maps.append(self.get_submodule(f"norm{s}")(x))
        return maps


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """Any published layout of a DaViT checkpoint, renamed to ours (which is timm's).

    Known: the authors' (``patch_embeds``, ``main_blocks``), timm's with numbered or named blocks, Florence-2's original
    (under ``vision_tower``) and the one of the transformers library. A Florence-2 file brings its whole language model;
    only the tower is taken. It has no head either: where the model has no classifier, the head's norm starts fresh.
    """
    tower = next((p for p in ("model.vision_tower.", "vision_tower.") if any(key.startswith(p) for key in state)), "")
    if tower:
        state = {key.removeprefix(tower): value for key, value in state.items() if key.startswith(tower)}
    florence = "convs.0.norm.weight" in state
    if florence:
        state = rename(state, _FLORENCE)
    elif "patch_embeds.0.proj.weight" in state:
        state = rename(state, _OFFICIAL)
    state = rename(state, _NAMED_BLOCKS)
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.fc.")}
        if florence:
            state |= {name: value.clone() for name, value in model.state_dict().items() if name.startswith("head.norm")}
    return state


_OFFICIAL = [
    (r"^patch_embeds\.(\d+)\.proj\.", r"patch_embeds.\1.conv."),
    (r"^patch_embeds\.0\.", "stem."),
    (r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^head\.", "head.fc."),
    (r"^norms\.", "head.norm."),
]
_FLORENCE = [
    (r"^convs\.(\d+)\.proj\.", r"convs.\1.conv."),
    (r"^convs\.0\.", "stem."),
    (r"^convs\.(\d+)\.", r"stages.\1.downsample."),
    (r"^blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.conv([12])\.(fn\.dw\.)?", r".cpe\1.proj."),
    (r"\.(window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(window|channel)_attn\.(fn\.)?", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.(fn\.net\.)?", ".mlp."),
]
_NAMED_BLOCKS = [(r"\.spatial_block\.", ".0."), (r"\.channel_block\.", ".1.")]


def _norm2d(dim: int, **factory: Any) -> nn.Module:
    return LayerNorm2d(dim, eps=1e-5, **factory)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _options(width: int, depths: tuple[int, ...] = (1, 1, 9, 1), **rest: object) -> dict:
    widths = tuple(width * 2**s for s in range(4))
    return {"depths": depths, "embed_dims": widths, "num_heads": tuple(w // 32 for w in widths), **rest}


_FLORENCE_TOWER = {"window_size": 12, "channel_flavour": "v2", "down_kernel_size": 3}
VARIANTS = {
    "davit_tiny": _options(96, (1, 1, 3, 1)),
    "davit_small": _options(96),
    "davit_base": _options(128),
    "davit_large": _options(192, window_size=12),
    "davit_huge": _options(256),
    "davit_giant": _options(384, (1, 1, 12, 3)),
    "davit_base_fl": _options(128, **_FLORENCE_TOWER),
    "davit_huge_fl": _options(256, **_FLORENCE_TOWER),
}
_DATA = {
    "davit_large": {"input_size": (3, 384, 384), "pool_size": (12, 12)},
    "davit_base_fl": {"num_classes": 0, "input_size": (3, 768, 768), "pool_size": (24, 24)},
    "davit_huge_fl": {"num_classes": 0, "input_size": (3, 768, 768), "pool_size": (24, 24)},
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        DaViT,
        _variant,
        convert=checkpoint_filter_fn,
        first_conv="stem.conv",
        classifier="head.fc",
        **_DATA.get(_name, {}),
    )
