"""FAN with token-aware pooling: a fully attentional network whose blocks look around before they attend.

    FAN-ViT:    four 3 x 3 convolutions with stride 2        FAN-Hybrid:  two ConvNeXt stages and a convolution
    both:       + Fourier position encoding, FAN blocks with TAP, class token and two class attention blocks, LN, Linear

Inside the trunk a map is (batch, X, Y, channels). Parameters carry the authors' names.

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126; the backbone is that of
"Understanding The Robustness in Vision Transformers", arXiv 2204.12451.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.layers.fan import EPS, ClassAttentionBlock, FANBlock
from manyheads.models.checkpoints import State
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image, stage_indices

FREQUENCIES = 32


class ConvStem(nn.Module):
    """Four 3 x 3 convolutions with stride 2, each with batch norm, GELU between them."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, out in pairwise([in_chans, dim // 8, dim // 4, dim // 2, dim]):
            conv = nn.Conv2d(wide, out, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(out)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channels, X, Y), with the variance that the released weights were trained
    with: divided by C - 1, except in the stem, because the authors' code takes another path for channels-last maps."""

    def __init__(self, dim: int, *, unbiased: bool) -> None:
        super().__init__(dim, eps=EPS)
        self.unbiased = unbiased

    def forward(self, input: Tensor) -> Tensor:
        if not self.unbiased:
            return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        variance, mean = torch.var_mean(input, dim=1, keepdim=True)
        normed = (input - mean) * torch.rsqrt(variance + self.eps)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class _PointwiseMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvBlock(nn.Module):
    """ConvNeXt's block: depthwise 7 x 7, norm, two pointwise convolutions with GELU between, scaled, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = ChannelNorm(dim, unbiased=True)
        self.mlp = _PointwiseMlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma[:, None, None] * self.mlp(self.norm(self.conv_dw(x)))


class _ConvStage(nn.Module):
    def __init__(self, dim: int, out_dim: int, depth: int, first: bool) -> None:
        super().__init__()
        down = (ChannelNorm(dim, unbiased=True), nn.Conv2d(dim, out_dim, 2, stride=2))
        self.downsample = nn.Identity() if first else nn.Sequential(*down)
        self.blocks = nn.Sequential(*(ConvBlock(out_dim) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _ConvNeXt(nn.Module):
    def __init__(self, in_chans: int, depths: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        stem = nn.Conv2d(in_chans, dims[0], 4, stride=4)
        self.stem = nn.Sequential(stem, ChannelNorm(dims[0], unbiased=False))
        widths = [dims[0], *dims]
        self.stages = nn.Sequential(
            *(_ConvStage(widths[s], dims[s], depth, first=s == 0) for s, depth in enumerate(depths))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class HybridStem(nn.Module):
    """The first stages of a ConvNeXt, then a 2 x 2 convolution with stride 2 to the trunk's width."""

    def __init__(self, in_chans: int, dim: int, depths: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.backbone = _ConvNeXt(in_chans, depths, dims)
        self.proj = nn.Conv2d(dims[-1], dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.backbone(x))


class FourierPosition(nn.Module):
    """Sines and cosines of row and column, at 32 frequencies each, through a 1 x 1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        axes = (self._waves(side, x) for side in x.shape[2:])
        rows, columns = axes
        height, width = x.shape[2:]
        waves = torch.cat(
            [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1
        )  # (height, width, 64)
        return self.token_projection(waves.permute(2, 0, 1)[None].to(x.dtype))

    @staticmethod
    def _waves(side: int, like: Tensor) -> Tensor:
        at = torch.arange(1, side + 1, dtype=torch.float32, device=like.device) * (2 * math.pi / (side + 1e-6))
        pairs = torch.arange(FREQUENCIES // 2, dtype=torch.float32, device=like.device)
        angles = at[:, None] / 10000 ** (2 * pairs / FREQUENCIES)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class FAN(Backbone):
    """The FAN classifier and backbone with TAP, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        embed_dim: width C.
        depth: FAN blocks.
        num_heads: attention heads and channel groups.
        mlp_ratio: hidden width of MLPs by the width.
        num_scales: scales of TAP; 0 leaves it away (FAN as it was).
        class_depth: class attention blocks.
        conv_depths: blocks of the ConvNeXt stages (FAN-Hybrid); empty takes the convolutional stem (FAN-ViT).
        conv_dims: their widths.
        head_gain: factor on the classifier's initial weights.
        drop_rate: dropout before the classifier.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth, the same for every block.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: a width that heads do not divide or that is no multiple of 8, stage options of different lengths;
            in ``forward``, an image that is empty or has another number of channels.

    Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126.

    >>> import torch
    >>> model = FAN(embed_dim=16, depth=2, num_heads=2, num_classes=10).eval()
    >>> model(torch.randn(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    stages_name, channels_last = "blocks", True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: int | float = 4.0,
        num_scales: int = 4,
        class_depth: int = 2,
        conv_depths: Sequence[int] = (),
        conv_dims: Sequence[int] = (128, 256),
        head_gain: int | float = 1.0,
        drop_rate: int | float = 0.0,
        attn_drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % 8:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of 8, which the stem divides")
        if conv_depths and len(conv_depths) != len(conv_dims):
            raise ValueError(f"conv_depths={conv_depths} and conv_dims={conv_dims} differ in length")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        hybrid = len(conv_depths) > 0
        self.patch_embed = (
            HybridStem(in_chans, embed_dim, conv_depths, conv_dims) if hybrid else ConvStem(in_chans, embed_dim)
        )
        self.pos_embed = FourierPosition(embed_dim)
        self.blocks = nn.Sequential(
            *(
                FANBlock(
                    embed_dim, num_heads, mlp_ratio=mlp_ratio, num_scales=num_scales, attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate,
                )
                for _ in range(depth)
            )
        )  # fmt: skip
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, mlp_ratio=mlp_ratio) for _ in range(class_depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        reduction = 4 * 2 ** len(conv_depths) if hybrid else 16
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"blocks.{block}"} for block in range(depth)
        ]
        self.apply(_initialise)
        if isinstance(self.head, nn.Linear) and head_gain != 1:
            with torch.no_grad():
                self.head.weight.mul_(head_gain)
                self.head.bias.mul_(head_gain)

    def no_weight_decay(self) -> set[str]:
        """The class token is not decayed."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}

    def embed(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        return (x + self.pos_embed(x)).permute(0, 2, 3, 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """The class token, the first, and the patches after the class attention blocks, normed."""
        check_image(x, self.in_chans)
        x = self.embed(x)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token, then the classifier; ``pre_logits`` stops before it."""
        first = F.dropout(x[:, 0], self.drop_rate, self.training)
        return first if pre_logits else self.head(first)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the blocks ``indices``, and the normed tokens unless ``intermediates_only``.

        The final norm belongs to what the class attention blocks make, so that no map can be normed.
        """
        if norm:
            raise ValueError("norm=True: the final norm stands behind the class attention blocks, not behind a map")
        maps = super().forward_intermediates(x, indices, False, stop_early, output_fmt, intermediates_only=True)
        assert isinstance(maps, list)
        return maps if intermediates_only else (self.forward_features(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted, and what only the classifier needs."""
        wanted = stage_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_head:
            self.cls_attn_blocks, self.norm, self.head = nn.ModuleList(), nn.Identity(), nn.Identity()
            del self.cls_token
        return wanted

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width, on the class token."""
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool={global_pool!r} must be 'token'")
        super().reset_classifier(num_classes)


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout has our names; pointwise convolutions may come as matrices."""
    state = {
        name: value[:, :, None, None] if ".mlp.fc" in name and ".stages." in name and value.ndim == 2 else value
        for name, value in state.items()
    }
    if getattr(model, "num_classes", 1) == 0:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    return state


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


VARIANTS: dict[str, dict] = {
    "fan_tiny_tap": dict(embed_dim=192, depth=12, num_heads=4),
    "fan_small_tap": dict(embed_dim=384, depth=12, num_heads=8),
    "fan_base_tap": dict(embed_dim=448, depth=18, num_heads=8),
    "fan_large_tap": dict(embed_dim=480, depth=24, num_heads=10),
    "fan_tiny_hybrid_tap": dict(embed_dim=192, depth=8, num_heads=8, conv_depths=(3, 3)),
    "fan_small_hybrid_tap": dict(embed_dim=384, depth=10, num_heads=8, conv_depths=(3, 3)),
    "fan_base_hybrid_tap": dict(embed_dim=448, depth=16, num_heads=8, conv_depths=(3, 3)),
    "fan_large_hybrid_tap": dict(embed_dim=480, depth=22, num_heads=10, conv_depths=(3, 5), head_gain=0.001),
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        FAN,
        _variant,
        convert=checkpoint_filter_fn,
        stages=_variant["depth"],
        feature_cls="getter",
        first_conv="patch_embed.backbone.stem.0" if "conv_depths" in _variant else "patch_embed.proj.0.0",
        classifier="head",
        pool_size=None,
        crop_pct=1.0 if "hybrid" in _name else 0.9,
    )
