"""NAT and DiNAT: pyramids (or a single level) of neighborhood attention blocks.

    block:  x <- x + g1 * NA(LN(x));  x <- x + g2 * MLP(LN(x))       (g1, g2 learnt only where layer scale is set)
    end:    LN, mean over tokens, Linear

=============  ================================  ==============================================  ============
family         stem                              between levels                                  attention
=============  ================================  ==============================================  ============
NAT            two Conv3x3 stride 2, LN          Conv3x3 stride 2 without bias, LN               dilation 1
DiNAT          as NAT                            as NAT                                          odd blocks dilated
DiNAT_s        Conv4x4 stride 4, LN              2x2 tokens concatenated, LN, Linear             odd blocks dilated
isotropic      Conv16x16 stride 16, LN           (one level)                                     NAT, DiNAT or full
=============  ================================  ==============================================  ============

Maps are (batch, X, Y, channels) throughout, (batch, channels, X, Y) in ``features_only``. Parameters carry the names of
the authors' NAT files.

Sources: "Neighborhood Attention Transformer", arXiv 2204.07143; "Dilated Neighborhood Attention Transformer",
arXiv 2209.15001.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.neighborhood import NeighborhoodAttention
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.nat_checkpoints import checkpoint_filter_fn


class FullAttention(nn.Module):
    """Softmax attention over the whole map with a bias for each offset, the ViT that isotropic NAT is compared with.

    Args:
        dim: width, a multiple of ``heads``.
        heads: attention heads.
        side: tokens on each side of the (square) map; the table ``rpb`` holds (2 side - 1)^2 offsets a head.
        qkv_bias: bias of the fused projection (order Q, K, V).
    """

    def __init__(self, dim: int, heads: int, *, side: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.empty(heads, 2 * side - 1, 2 * side - 1))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side
        if x.shape[1:3] != (side, side):
            raise ValueError(
                f"full attention's bias is for {side} x {side} tokens, got {x.shape[1]} x {x.shape[2]}; "
                "create the model with the image_size of your images"
            )
        query, key, value = rearrange(self.qkv(x), "b x y (slot h d) -> slot b h (x y) d", slot=3, h=self.heads)
        # offset[query, key] = key - query + side - 1 on each axis
        offset = torch.arange(side, device=x.device)[None] - torch.arange(side, device=x.device)[:, None] + side - 1
        bias = self.rpb[:, offset[:, None, :, None], offset[None, :, None, :]]
        out = F.scaled_dot_product_attention(query, key, value, bias.flatten(3).flatten(1, 2)[None].to(query.dtype))
        return self.proj(rearrange(out, "b h (x y) d -> b x y (h d)", x=side))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and, where set, a learnt scale for each channel.

    ``pad_to`` is the side below which the normed map is padded with zeros at the bottom and the right before the
    attention: NATTEN up to 0.14, with which the checkpoints were trained, padded maps smaller than window * dilation,
    so that padded tokens take part as keys carrying the projection's bias. 0 pads nothing.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: int | float,
        drop_path: int | float,
        layer_scale: int | float | None,
        pad_to: int,
    ) -> None:
        super().__init__()
        self.pad_to = pad_to
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None
        self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale))) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        attended = self._attend(self.norm1(x))
        x = x + self.drop_path(attended if self.gamma1 is None else self.gamma1 * attended)
        refined = self.mlp(self.norm2(x))
        return x + self.drop_path(refined if self.gamma2 is None else self.gamma2 * refined)

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        below, right = max(self.pad_to - height, 0), max(self.pad_to - width, 0)
        if not (below or right):
            return self.attn(x)
        return self.attn(F.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]


class Stem(nn.Module):
    """Image to tokens: two overlapping convolutions (``patch`` 0) or non-overlapping patches, then LN."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        if patch:
            self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        else:
            first = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
            self.proj = nn.Sequential(first, nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.patch:
            x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """Half the sides, twice the channels: Conv3x3 with stride 2 and no bias, LN."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the sides, twice the channels: 2x2 tokens side by side (down first, then right), LN, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.reduction(self.norm(rearrange(x, "b (x i) (y j) c -> b x y (j i c)", i=2, j=2)))


class Level(nn.Module):
    """Blocks of one resolution and the downsampling to the next."""

    def __init__(self, blocks: list[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks' output, and what the next level reads."""
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x, x if self.downsample is None else self.downsample(x)


class NAT(Backbone):
    """NAT, DiNAT, DiNAT_s, their isotropic forms and the ViT with relative bias, as classifier and backbone.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled, normed features.
        embed_dim: width C of the first level; every further level doubles it.
        depths: blocks in each level; one entry makes the model isotropic.
        num_heads: attention heads in each level.
        kernel_size: side w of the neighborhood ("kernel size" in the papers), odd.
        dilations: dilation of every block of every level; None means 1 everywhere.
        mlp_ratio: hidden width of the MLP by the block's width.
        layer_scale: start value of the learnt scales; None has none.
        qkv_bias: bias of the attention projections.
        patch_size: 0 is NAT's overlapping stem; 4 is DiNAT_s, 16 isotropic.
        merging: downsample as "conv" (NAT, DiNAT) or "patch" (DiNAT_s, as Swin).
        attention: "neighborhood", or "full" over the whole map (ViT-rpb; needs square images of ``image_size``).
        image_size: side of the images in pixels; read only where ``attention="full"``.
        pad_small_maps: maps smaller than window * dilation are zero-padded as in the version of NATTEN with which the
            checkpoints were trained; False raises instead, as newer versions do.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: per-level options of different lengths, widths that heads do not divide; in ``forward``, an image
            that is empty, has another number of channels or is too small where ``pad_small_maps`` is off.

    Sources: arXiv 2204.07143 (NAT), arXiv 2209.15001 (DiNAT, DiNAT_s, isotropic).

    >>> import torch
    >>> model = NAT(embed_dim=16, depths=(1, 1), num_heads=(2, 4), kernel_size=3, num_classes=10)
    >>> model(torch.randn(2, 3, 40, 33)).shape
    torch.Size([2, 10])
    """

    stages_name = "levels"
    channels_last = True
    downsamples_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: int | float = 3.0,
        layer_scale: int | float | None = None,
        qkv_bias: bool = True,
        patch_size: int = 0,
        merging: str = "conv",
        attention: str = "neighborhood",
        image_size: int = 224,
        pad_small_maps: bool = True,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("merging", merging, ("conv", "patch"))
        check_choice("attention", attention, ("neighborhood", "full"))
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if len(depths) != len(num_heads) or [len(level) for level in dilations] != list(depths):
            raise ValueError(f"depths={depths}, num_heads={num_heads} and dilations={dilations} do not fit together")
        dims = [embed_dim * 2**level for level in range(len(depths))]
        for dim, heads in zip(dims, num_heads):
            if heads < 1 or dim % heads:
                raise ValueError(f"the level of width {dim} is not a multiple of its {heads} heads")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = Stem(in_chans, embed_dim, patch_size)
        stride = patch_size or 4

        def block(dim: int, heads: int, dilation: int, drop_path: int | float) -> Block:
            if attention == "full":
                attend: nn.Module = FullAttention(dim, heads, side=-(-image_size // stride), qkv_bias=qkv_bias)
            else:
                attend = NeighborhoodAttention(
                    dim, heads, kernel_size=kernel_size, dilation=dilation, rel_pos_bias=True, qkv_bias=qkv_bias
                )
            pad_to = kernel_size * dilation if pad_small_maps and attention == "neighborhood" else 0
            return Block(dim, attend, mlp_ratio, drop_path, layer_scale, pad_to)

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        between = {"conv": ConvDownsample, "patch": PatchMerging}[merging]
        self.levels = nn.ModuleList(
            Level(
                [block(dim, heads, dilation, next(rates)) for dilation in level],
                between(dim) if dim < dims[-1] else None,
            )
            for dim, heads, level in zip(dims, num_heads, dilations)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": stride * 2**level, "module": f"levels.{level}"}
            for level, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """The relative biases, which the recipe trains without weight decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^levels\.(\d+)" if coarse else [(r"^levels\.(\d+)\.blocks\.(\d+)", None), (r"^levels\.(\d+)", (999,))]
        )
        return {"stem": r"^patch_embed", "blocks": blocks}

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _dilated(depths: Sequence[int], far: Sequence[int]) -> list[list[int]]:
    """Dilation ``far`` in every second block of a level, 1 in the others."""
    return [[dilation if index % 2 else 1 for index in range(depth)] for depth, dilation in zip(depths, far)]


def _pyramid(
    dim: int, depths: tuple[int, ...], mlp_ratio: int | float, drop: int | float, far: tuple[int, ...] = (), **rest
) -> dict:
    heads = tuple(dim * 2**level // 32 for level in range(4))
    dilations = _dilated(depths, far) if far else None
    options = {"embed_dim": dim, "depths": depths, "num_heads": heads, "mlp_ratio": mlp_ratio, "drop_path_rate": drop}
    return {**options, "dilations": dilations, **rest}


def _isotropic(dim: int, drop: int | float, far: int = 1, **rest) -> dict:
    options = {"embed_dim": dim, "depths": (12,), "num_heads": (dim // 32,), "mlp_ratio": 4.0, "drop_path_rate": drop}
    return {**options, "dilations": _dilated((12,), (far,)), "patch_size": 16, **rest}


_DEEP, _SWIN = (3, 4, 18, 5), {"patch_size": 4, "merging": "patch"}
_224, _384 = (8, 4, 2, 1), (13, 6, 3, 1)
VARIANTS = {
    "nat_mini": _pyramid(64, (3, 4, 6, 5), 3, 0.2),
    "nat_tiny": _pyramid(64, _DEEP, 3, 0.2),
    "nat_small": _pyramid(96, _DEEP, 2, 0.3, layer_scale=1e-5),
    "nat_base": _pyramid(128, _DEEP, 2, 0.5, layer_scale=1e-5),
    "dinat_mini": _pyramid(64, (3, 4, 6, 5), 3, 0.2, _224),
    "dinat_tiny": _pyramid(64, _DEEP, 3, 0.2, _224),
    "dinat_small": _pyramid(96, _DEEP, 2, 0.3, _224),
    "dinat_base": _pyramid(128, _DEEP, 2, 0.5, _224, layer_scale=1e-5),
    "dinat_large": _pyramid(192, _DEEP, 2, 0.35, _224),
    "dinat_large_384": _pyramid(192, _DEEP, 2, 0.35, _384),
    "dinat_large_384_11x11": _pyramid(192, _DEEP, 2, 0.35, _224, kernel_size=11),
    "dinat_s_tiny": _pyramid(96, (2, 2, 6, 2), 4, 0.2, _224, **_SWIN),
    "dinat_s_small": _pyramid(96, (2, 2, 18, 2), 4, 0.3, _224, **_SWIN),
    "dinat_s_base": _pyramid(128, (2, 2, 18, 2), 4, 0.5, _224, **_SWIN),
    "dinat_s_large": _pyramid(192, (2, 2, 18, 2), 4, 0.35, _224, **_SWIN),
    "dinat_s_large_384": _pyramid(192, (2, 2, 18, 2), 4, 0.35, _384, **_SWIN),
    "nat_isotropic_small": _isotropic(384, 0.1),
    "nat_isotropic_base": _isotropic(768, 0.4),
    "dinat_isotropic_small": _isotropic(384, 0.1, 2),
    "dinat_isotropic_base": _isotropic(768, 0.4, 2),
    "vit_rpb_small": _isotropic(384, 0.1, attention="full"),
    "vit_rpb_base": _isotropic(768, 0.4, attention="full"),
}
for _name, _variant in VARIANTS.items():
    _large_images = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0} if "384" in _name else {}
    register(
        _name,
        NAT,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="patch_embed.proj.0" if not _variant.get("patch_size") else "patch_embed.proj",
        classifier="head",
        **_large_images,
    )
