"""TransNeXt: a pyramid of aggregated attention and convolutional GLUs, for images of any size.

    stage:  overlapping Conv (7x7 stride 4 first, then 3x3 stride 2), LN, blocks, LN
    block:  x <- x + Attention(LN(x));  x <- x + ConvGLU(LN(x))
    head:   mean over positions, Linear

Stages with a pooling ratio above 1 attend to a 3x3 neighbourhood and to a pooled map in one softmax; the last stage
attends to everything. Length scaling and a position bias that is a function of distance serve other image sizes than
those of the training. Inside, a map is (batch, X, Y, channels); in ``features_only`` it is the same memory seen as
(batch, channels, X, Y).

Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import both_sides
from manyheads.layers.conv_ffn import ConvGLU, initialise_convolution
from manyheads.layers.transnext import AggregatedAttention, CosineAttention
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone


class Block(nn.Module):
    """Attention and convolutional GLU, on (batch, X, Y, channels)."""

    def __init__(self, dim: int, attention: nn.Module, mlp_ratio: int | float, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = ConvGLU(dim, 2 * int(mlp_ratio * dim) // 3)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """An overlapping convolution and LN: (batch, X, Y, channels) to a coarser map."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Patch embedding, blocks and LN, on (batch, X, Y, channels)."""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[Block], dim: int, eps: float) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return self.norm(x)


class TransNeXt(Backbone):
    """The TransNeXt classifier and backbone, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled, normed features.
        embed_dims: width of each stage.
        depths: blocks in each stage.
        num_heads: attention heads in each stage.
        mlp_ratios: per stage, hidden width of an FFN by the block's width; the GLU takes two thirds of it.
        sr_ratios: per stage, side of the map by side of the pooled map; 1 is plain attention.
        window_size: side of the neighbourhood, odd; or one for each stage, None where the ratio is 1.
        img_size: side, or (height, width), of the images in pixels for which position biases are made before they are
            resized ("interpolate").
        pretrain_size: side, or (height, width), of the images of the pre-training, at least 64; None means
            ``img_size``. It sets the unit of the distances: keep it where a model is fine-tuned or evaluated at another
            size.
        position_bias: for images of other sizes "extrapolate" evaluates the bias network at the actual distances;
            "interpolate", the default of the authors' dense-prediction code, resizes the biases of ``img_size``.
        fixed_pool_size: cells a side of the pooled maps whatever the image, which makes the cost linear in the
            pixels ("linear inference mode"); None follows ``sr_ratios``.
        shared_heads, active_heads: per stage, for mixture-of-head attention (arXiv 2410.11842), the heads that every
            position uses, and how many of the others it chooses; None for both has plain multi-head attention.
        qkv_bias: bias of the attention's input projections.
        attn_drop_rate: dropout on attention weights.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        norm_eps: of the norms of blocks and stages; those of patch embeddings and pooled branches have 1e-5.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, widths that heads do not divide, an even window,
            ``pretrain_size`` below 64; in ``forward``, an image that is empty, has another number of channels, or is
            too small for a stage's pooling.

    Source: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", arXiv 2311.17132.

    >>> import torch
    >>> model = TransNeXt(embed_dims=(24, 48), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(4, 4), sr_ratios=(2, 1),
    ...                   num_classes=10)
    >>> model(torch.randn(2, 3, 40, 33)).shape
    torch.Size([2, 10])
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[int | float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: int | Sequence[int | None] = 3,
        img_size: int | tuple[int, int] = 224,
        pretrain_size: int | tuple[int, int] | None = None,
        position_bias: str = "extrapolate",
        fixed_pool_size: int | None = None,
        shared_heads: Sequence[int] | None = None,
        active_heads: Sequence[int] | None = None,
        qkv_bias: bool = True,
        attn_drop_rate: int | float = 0.0,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        windows = [window_size] * len(depths) if isinstance(window_size, int) else window_size
        per_stage = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads}
        per_stage |= {"mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios, "window_size": windows}
        if (shared_heads is None) != (active_heads is None):
            raise ValueError(f"shared_heads={shared_heads} and active_heads={active_heads} belong together")
        if shared_heads is not None and active_heads is not None:
            per_stage |= {"shared_heads": shared_heads, "active_heads": active_heads}
        if len({len(option) for option in per_stage.values()}) > 1:
            raise ValueError(f"options differ in length: {per_stage}")
        pretrain_size = img_size if pretrain_size is None else pretrain_size
        pretraining, image = both_sides(pretrain_size), both_sides(img_size)
        if min(*pretraining, *image) < 64:
            raise ValueError(
                f"pretrain_size={pretrain_size} and img_size={img_size} must be at least 64 pixels: distances are "
                "divided by the last stage's side minus 1"
            )
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for s, (dim, depth, heads, mlp_ratio, ratio) in enumerate(
            zip(embed_dims, depths, num_heads, mlp_ratios, sr_ratios)
        ):
            sizes: dict[str, Any] = {
                "pretrain_side": tuple(side // 2 ** (s + 2) for side in pretraining),
                "base": tuple(side // 2 ** (s + 2) for side in image),
                "position_bias": position_bias,
                "qkv_bias": qkv_bias,
                "attn_drop": attn_drop_rate,
            }
            if shared_heads is not None and active_heads is not None:
                sizes["routing"] = (shared_heads[s], active_heads[s])

            layer = CosineAttention
            if ratio > 1:
                if windows[s] is None:
                    raise ValueError(f"window_size={window_size} has none for stage {s}, which pools by {ratio}")
                layer = AggregatedAttention
                sizes |= {"window": windows[s], "sr_ratio": ratio, "fixed_pool_size": fixed_pool_size}
            embed = PatchEmbed(embed_dims[s - 1], dim, 3, 2) if s else PatchEmbed(in_chans, dim, 7, 4)
            blocks = [Block(dim, layer(dim, heads, **sizes), mlp_ratio, next(rates), norm_eps) for _ in range(depth)]
            stages.append(Stage(embed, blocks, dim, norm_eps))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**s, "module": f"stages.{s}"} for s, dim in enumerate(embed_dims)
        ]
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Query embeddings, local biases, the bias networks and temperatures, as the recipe trains them."""
        kept = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
        return {name for name, _ in self.named_parameters() if any(part in name for part in kept)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (999,))]
        )
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    def embed(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1)


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout, renamed to ours; nothing in a file depends on the resolution."""
    state = rename(state, _OFFICIAL)
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    # The authors' 1 x 1 convolution is our linear map.
    return {
        key: value.flatten(1) if key.endswith(".attn.sr.weight") and value.ndim == 4 else value
        for key, value in state.items()
    }


_OFFICIAL = [
    *((rf"^patch_embed{s + 1}\.", f"stages.{s}.patch_embed.") for s in range(4)),
    *((rf"^block{s + 1}\.", f"stages.{s}.blocks.") for s in range(4)),
    *((rf"^norm{s + 1}\.", f"stages.{s}.norm.") for s in range(4)),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"\.attn\.cpb_fc", ".attn.position.cpb_fc"),
    (r"\.attn\.(wg(_[01])?)\.", r".attn.router.\1."),
]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        initialise_convolution(module)
    elif isinstance(module, AggregatedAttention):
        # A 1 x 1 convolution in the authors' code, and begun like one.
        nn.init.normal_(module.sr.weight, std=(2 / module.sr.out_features) ** 0.5)


def _options(width: int, depths: tuple[int, ...], drop_path: float, **rest: object) -> dict:
    widths = tuple(width * 2**s for s in range(4))
    heads = tuple(w // 24 for w in widths)
    return {"embed_dims": widths, "depths": depths, "num_heads": heads, "drop_path_rate": drop_path, **rest}


_DEEP, _DEEPER = (5, 5, 22, 5), (5, 5, 23, 5)
_384 = {"img_size": 384, "pretrain_size": 224}
VARIANTS = {
    "transnext_micro": _options(48, (2, 2, 15, 2), 0.15),
    "transnext_tiny": _options(72, (2, 2, 15, 2), 0.25),
    "transnext_small": _options(72, _DEEP, 0.45),
    "transnext_base": _options(96, _DEEPER, 0.6),
    "transnext_small_384": _options(72, _DEEP, 0.7, **_384),
    "transnext_base_384": _options(96, _DEEPER, 0.8, **_384),
    # Aggregated attention in all four stages.
    "transnext_micro_aaaa": _options(48, (2, 2, 15, 2), 0.15, sr_ratios=(16, 8, 4, 2), img_size=256),
}
for _name, _variant in VARIANTS.items():
    _side = int(_variant.get("img_size", 224))
    _large_images: dict[str, Any] = {"crop_pct": 1.0, "crop_mode": "squash"} if _side == 384 else {}
    register(
        _name,
        TransNeXt,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="stages.0.patch_embed.proj",
        classifier="head",
        input_size=(3, _side, _side),
        pool_size=(_side // 32, _side // 32),
        **{"crop_pct": 0.875, **_large_images},
    )
