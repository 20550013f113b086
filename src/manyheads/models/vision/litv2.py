"""LITv2: a pyramid whose first two stages only mix neighbours by convolution and whose last two attend with HiLo.

    patches:  Conv4x4 stride 4, LN.     Between stages: deformable token merging.     Head: LN, mean, Linear
    stages 1, 2:  x <- x + FFN(LN(x))                                FFN with a depthwise 3x3 convolution
    stages 3, 4:  x <- x + HiLo(LN(x));  x <- x + FFN(LN(x))         window 2 in stage 3, ordinary attention in stage 4

There is no position encoding: the zero padding of the depthwise convolutions tells positions apart. Inside, a map is
(batch, X, Y, channels); in ``features_only`` it is the same memory seen as (batch, channels, X, Y).

Source: "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.layers.conv_ffn import ConvFeedForward, initialise_convolution
from manyheads.layers.hilo import DeformableMerging, HiLoAttention
from manyheads.models.checkpoints import CheckpointError, State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image


class Block(nn.Module):
    """HiLo attention (stages without it have none) and convolutional FFN, on (batch, X, Y, channels)."""

    def __init__(self, dim: int, attention: HiLoAttention | None, mlp_ratio: int | float, drop_path: float) -> None:
        super().__init__()
        self.attn = attention
        if attention is not None:
            self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvFeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Image to (batch, X, Y, channels): non-overlapping patches and LN; zeros fill up the last ones if need be."""

    def __init__(self, in_chans: int, dim: int, patch: int, any_size: bool) -> None:
        super().__init__()
        self.patch, self.any_size = patch, any_size
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = -x.shape[2] % self.patch, -x.shape[3] % self.patch
        if (below or right) and not self.any_size:
            size = f"{x.shape[2]} x {x.shape[3]}"
            raise ValueError(f"an image of {size} pixels does not divide into patches of {self.patch}; allow any_size")
        return self.norm(self.proj(F.pad(x, (0, right, 0, below))).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one resolution and the merging to the next (none after the last)."""

    def __init__(self, blocks: list[Block], downsample: DeformableMerging | None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks' output, and what the next stage reads."""
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x, x if self.downsample is None else self.downsample(x)


class LITv2(Backbone):
    """The LITv2 classifier and backbone, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled, normed features.
        embed_dim: width of the first stage; every further stage doubles it.
        depths: blocks in each stage.
        num_heads: attention heads of each stage; stages without attention do not read theirs.
        attention: which stages attend.
        windows: s of each stage's HiLo attention; 1 is ordinary attention. The detection models with ``_ws_4`` in
            their name have 4 in stage 3.
        alpha: share of the low-frequency heads, see ``manyheads.layers.hilo.HiLoAttention``.
        mlp_ratio: hidden width of the FFN by the block's width.
        qkv_bias: bias of the attention's input projections.
        qk_scale: factor on the attention's scores; None means ``head_dim ** -0.5``.
        patch_size: side of the patches in pixels.
        any_size: fill up images to whole patches and maps to whole windows with zeros, and drop a last odd row or
            column when merging, as the authors' dense-prediction code does. False makes such sizes an error, as in
            their classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, widths that heads do not divide, ``alpha`` outside [0, 1]; in
            ``forward``, an image that is empty, has another number of channels, is smaller than one token of the
            last stage, or does not fit although ``any_size`` is off.

    Source: "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213.

    >>> import torch
    >>> model = LITv2(embed_dim=16, depths=(1, 1), num_heads=(2, 4), attention=(False, True), windows=(2, 2),
    ...               alpha=0.5, num_classes=10)
    >>> model(torch.randn(2, 3, 40, 33)).shape
    torch.Size([2, 10])
    """

    stages_name = "layers"
    channels_last = True
    downsamples_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attention: Sequence[bool] = (False, False, True, True),
        windows: Sequence[int] = (0, 0, 2, 1),
        alpha: int | float = 0.9,
        mlp_ratio: int | float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        patch_size: int = 4,
        any_size: bool = True,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(num_heads) == len(attention) == len(windows):
            raise ValueError(
                f"depths={depths}, num_heads={num_heads}, attention={attention}, windows={windows} differ in length"
            )
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, any_size)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())

        def mixer(dim: int, heads: int, window: int) -> HiLoAttention:
            options = {"qkv_bias": qkv_bias, "scale": qk_scale, "pad": any_size}
            return HiLoAttention(dim, heads, window=window, alpha=alpha, **options)

        self.layers = nn.ModuleList(
            Stage(
                [Block(dim, mixer(dim, heads, window) if attend else None, mlp_ratio, next(rates)) for _ in range(n)],
                DeformableMerging(dim, 2 * dim, drop_odd=any_size) if dim < dims[-1] else None,
            )
            for dim, n, heads, attend, window in zip(dims, depths, num_heads, attention, windows)
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"layers.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def lr_scales(self) -> dict[str, float]:
        """Parameters that learn slower than the others: the offsets of the mergings, at a hundredth of the rate."""
        return {name: 0.01 for name, _ in self.named_parameters() if ".downsample.offset." in name}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)", (999,))]
        )
        return {"stem": r"^patch_embed", "blocks": blocks}

    def embed(self, image: Tensor) -> Tensor:
        return self.patch_embed(image)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)


class LITv2Dense(nn.Module):
    """A LITv2 as detection and segmentation heads want it: the normed map of every stage, no classifier.

    Args:
        model: the trunk, with ``any_size``; its classifier is dropped.
        out_indices: the stages whose maps, taken before the merging, are returned.

    >>> import torch
    >>> trunk = LITv2(embed_dim=16, depths=(1, 1), num_heads=(2, 4), attention=(False, True), windows=(2, 2))
    >>> [tuple(x.shape) for x in LITv2Dense(trunk, (0, 1))(torch.randn(1, 3, 30, 45))]
    [(1, 16, 8, 12), (1, 32, 4, 6)]
    """

    def __init__(self, model: LITv2, out_indices: Sequence[int] = (0, 1, 2, 3)) -> None:
        super().__init__()
        self.in_chans, self.out_indices = model.in_chans, tuple(out_indices)
        self.patch_embed, self.layers = model.patch_embed, model.layers
        self.feature_info = [model.feature_info[stage] for stage in self.out_indices]
        for stage, info in zip(self.out_indices, self.feature_info):
            self.add_module(f"norm{stage}", nn.LayerNorm(info["num_chs"]))

    def forward(self, x: Tensor) -> list[Tensor]:
        check_image(x, self.in_chans)
        x = self.patch_embed(x)
        maps = []
        for index, stage in enumerate(self.layers):
            kept, x = stage(x)
            if index in self.out_indices:
                maps.append(self.get_submodule(f"norm{index}")(kept).permute(0, 3, 1, 2))
        return maps


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout, renamed to ours.

    Raises:
        CheckpointError: the file's heads are split by another alpha than the model's.
    """
    state = rename(state, _OFFICIAL)
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    for name, layer in model.named_modules():
        # Where the shapes of other tensors differ too, the general comparison says it better.
        if isinstance(layer, HiLoAttention) and layer.window > 1:
            low, high = state.get(f"{name}.l_proj.bias"), state.get(f"{name}.h_proj.bias")
            rows = [0 if part is None else len(part) for part in (low, high)]
            if sum(rows) == layer.dim and rows[0] != layer.low_heads * layer.head_dim:
                found, heads = rows[0] // layer.head_dim, layer.low_heads + layer.high_heads
                raise CheckpointError(
                    f"the file has {found} low-frequency heads of {heads} in {name} (alpha about {found / heads:.2f}), "
                    f"the model has {layer.low_heads}: create it with the file's alpha"
                )
    return state


_OFFICIAL = [
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"\.downsample\.dconv\.conv_offset\.", ".downsample.offset."),
    (r"\.downsample\.dconv\.", ".downsample.conv."),
    (r"\.downsample\.norm_layer\.", ".downsample.norm."),
]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ConvFeedForward):
        initialise_convolution(module.dwconv)


def _options(width: int, depths: tuple[int, ...], drop_path: float, alpha: float = 0.9) -> dict:
    heads = tuple(width * 2**stage // 32 for stage in range(4))
    return {"embed_dim": width, "depths": depths, "num_heads": heads, "alpha": alpha, "drop_path_rate": drop_path}


_DEEP = (2, 2, 18, 2)
VARIANTS = {
    "litv2_small": _options(96, (2, 2, 6, 2), 0.2),
    "litv2_medium": _options(96, _DEEP, 0.3),
    "litv2_base": _options(128, _DEEP, 0.5),
    "litv2_base_384": _options(128, _DEEP, 0.5),
    # The sweep of alpha on the small model, in per cent; 90 is litv2_small itself.
    **{f"litv2_small_alpha{p}": _options(96, (2, 2, 6, 2), 0.2, p / 100) for p in (0, 20, 40, 50, 70, 100)},
    # The trunks of the detection models with larger windows.
    "litv2_small_ws4": {**_options(96, (2, 2, 6, 2), 0.2), "windows": (0, 0, 4, 1)},
    "litv2_medium_ws4": {**_options(96, _DEEP, 0.3), "windows": (0, 0, 4, 1)},
    "litv2_base_ws4": {**_options(128, _DEEP, 0.5), "windows": (0, 0, 4, 1)},
}
for _name, _variant in VARIANTS.items():
    _large_images = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0} if "384" in _name else {}
    register(
        _name,
        LITv2,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="patch_embed.proj",
        classifier="head",
        **{"crop_pct": 0.875, **_large_images},
    )
