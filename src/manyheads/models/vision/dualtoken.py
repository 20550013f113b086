"""DualToken-ViT: convolution for the near, a 7 x 7 grid of global tokens for the far, under one GFLOP.

    stem     five 3x3 convolutions to stride 8
    block    X_loc <- X + ConvNeXt branch;  X <- X_loc + what the tokens broadcast;  X <- X + gated FFN(LN(X))
    merge    2 x 2 positions become one: Linear(LN(all four)) + Linear(their maximum); tokens: Linear(LN(G))
    head     LN, mean over positions, Linear

three stages at strides 8, 16 and 32. Inside, a map is (batch, X, Y, channels) and travels with its global tokens.

Source: "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion", arXiv 2309.12424. No code
or weights were published; widths, depths and ratios are fitted to the published sizes and operations, stem and merging
are LightViT's (arXiv 2207.05557). The published accuracies cannot be claimed for these networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint as recompute
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from manyheads.layers.dual_token import EPS, BiDimensionalAttention, PositionAwareTokens
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image

SMALLEST = 32  # pixels a side that leave one position in the last stage

MapAndTokens = tuple[Tensor, Tensor]


class Stem(nn.Module):
    """LightViT's: convolutions of stride 2, 1, 1, 2 with batch norm and GELU, then one of stride 2 with a layer norm.

    Shape: images (batch, in_chans, height, width) to channels-last maps of an eighth of the sides.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for channels, stride, groups in ((in_chans, 2, 1), (half, 1, half), (half, 1, half), (half, 2, half)):
            convolution = nn.Conv2d(channels, half, 3, stride, 1, groups=groups, bias=False)
            layers += [convolution, nn.BatchNorm2d(half), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(half, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(self.stem(image)).permute(0, 2, 3, 1))


class Merge(nn.Module):
    """Four positions become one, twice as coarse, with another width; the tokens get the same width.

    Odd sides are padded with zeros at the bottom and at the right.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.res_proj = nn.Linear(dim, out_dim, bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> MapAndTokens:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        # The four phases stand in the order (row, column) = (0, 0), (1, 0), (0, 1), (1, 1).
        phases = rearrange(x, "b (X r) (Y c) d -> b X Y (c r) d", r=2, c=2)
        merged = self.reduction(self.norm(phases.flatten(3))) + self.res_proj(phases.amax(3))
        return merged, self.proj(self.norm2(tokens)).to(tokens.dtype)


class Block(nn.Module):
    """Convolution, global tokens, gated feed-forward."""

    def __init__(self, dim: int, conv_ratio: int | float, mlp_ratio: int | float, drop_path: float, **module: Any):
        super().__init__()
        self.conv_encoder = ConvNeXtBlock(dim, mlp_ratio=conv_ratio, ls_init_value=None, drop_path=drop_path)
        self.token_module = PositionAwareTokens(dim, **module)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.fc1, self.fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.bi_attn = BiDimensionalAttention(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, tokens: Tensor) -> MapAndTokens:
        x = self.conv_encoder(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        spread, tokens = self.token_module(x, tokens)
        x = x + self.drop_path(spread)
        return x + self.drop_path(self.bi_attn(self.fc2(F.gelu(self.fc1(self.norm2(x)))))), tokens


class Stage(nn.Module):
    """Perhaps a merge, then blocks."""

    def __init__(self, merge: Merge | None, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.merge = merge
        self.blocks = nn.ModuleList(blocks)

    def forward(self, state: MapAndTokens) -> tuple[Tensor, MapAndTokens]:
        x, tokens = state if self.merge is None else self.merge(*state)
        for block in self.blocks:
            recomputed = self.grad_checkpointing and self.training
            x, tokens = recompute(block, x, tokens) if recomputed else block(x, tokens)
        return x, (x, tokens)


class DualTokenViT(Backbone):
    """A light backbone of convolutions and position-aware global tokens.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled, normed features.
        embed_dims: channels of the stages, the first an even number.
        depths: blocks of the stages.
        num_heads: heads of the stages.
        mlp_ratios: hidden width of the stages' feed-forward layers by their channels.
        conv_ratio: hidden width of the convolution's branch by its channels.
        steps: how often each stage halves its map before the tokens aggregate it.
        token_size, mlp, alpha, resize: see ``PositionAwareTokens``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width), at least 32 pixels a side, to logits (batch, num_classes).

    Raises:
        ValueError: stages that differ in number, an odd first width, whatever ``PositionAwareTokens`` refuses; in
            ``forward``, smaller images.

    Source: "DualToken-ViT", arXiv 2309.12424.

    >>> import torch
    >>> model = DualTokenViT(embed_dims=(16, 24, 32), depths=(1, 1, 1), token_size=3, num_classes=10)
    >>> model(torch.randn(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 6, 6),
        num_heads: Sequence[int] = (2, 4, 8),
        mlp_ratios: Sequence[int | float] = (2, 2, 2),
        conv_ratio: int | float = 4,
        steps: Sequence[int] = (2, 1, 0),
        token_size: int = 7,
        mlp: str = "mix",
        alpha: int | float = 0.1,
        resize: str = "bilinear",
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        lengths = {len(values) for values in (embed_dims, depths, num_heads, mlp_ratios, steps)}
        if len(lengths) != 1:
            raise ValueError(
                f"embed_dims={tuple(embed_dims)}, depths={tuple(depths)}, num_heads={tuple(num_heads)}, "
                f"mlp_ratios={tuple(mlp_ratios)} and steps={tuple(steps)} differ in length"
            )
        if embed_dims[0] % 2:
            raise ValueError(f"embed_dims={tuple(embed_dims)}: the first must be even, because the stem has half of it")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.patch_embed = Stem(in_chans, embed_dims[0])
        self.global_token = nn.Parameter(torch.zeros(1, token_size**2, embed_dims[0]))
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stages = nn.ModuleList()
        for index, dim in enumerate(embed_dims):
            merge = Merge(embed_dims[index - 1], dim) if index else None
            module = {"heads": num_heads[index], "steps": steps[index], "token_size": token_size}
            module |= {"mlp": mlp, "alpha": alpha, "resize": resize}
            blocks = [Block(dim, conv_ratio, mlp_ratios[index], rate, **module) for rate in rates[index].tolist()]
            self.stages.append(Stage(merge, blocks))
        self.feature_info = [
            {"num_chs": dim, "reduction": 8 * 2**index, "module": f"stages.{index}"}
            for index, dim in enumerate(embed_dims)
        ]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.norm = nn.LayerNorm(self.num_features, eps=EPS)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.global_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """The first global tokens."""
        return {"global_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(?:blocks\.(\d+)|merge)"
        return {"stem": r"^patch_embed|global_token", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def embed(self, image: Tensor) -> Any:
        if min(image.shape[2:]) < SMALLEST:
            raise ValueError(f"images must have {SMALLEST} pixels a side at least, got {tuple(image.shape[2:])}")
        x = self.patch_embed(image)
        return x, self.global_token.expand(x.shape[0], -1, -1)

    def finish(self, x: Any) -> Tensor:
        return self.norm(x[0])

    def forward_tokens(self, image: Tensor) -> MapAndTokens:
        """The last map with the final norm (batch, X, Y, channels), and the global tokens (batch, T^2, channels)."""
        check_image(image, self.in_chans)
        state = self.embed(image)
        for stage in self.stages:
            _, state = stage(state)
        return self.finish(state), state[1]


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The layout of the specification (merges beside stages, a flat convolution block) renamed to ours."""
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    state = {re_numbered(key): value for key, value in state.items()}
    return rename(state, _PUBLISHED)


def re_numbered(key: str) -> str:
    """merges.i stands before stage i + 1.

    >>> re_numbered("merges.0.norm.weight")
    'stages.1.merge.norm.weight'
    """
    if not key.startswith("merges."):
        return key
    _, number, rest = key.split(".", 2)
    return f"stages.{int(number) + 1}.merge.{rest}"


_PUBLISHED = [
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.conv_encoder\.dwconv\.", ".conv_encoder.conv_dw."),
    (r"\.conv_encoder\.pw(\d)\.", r".conv_encoder.mlp.fc\1."),
]

VARIANTS = {
    "dualtoken_vit_t": {"embed_dims": (48, 96, 192), "depths": (2, 6, 5)},
    "dualtoken_vit_s": {"embed_dims": (64, 128, 256), "depths": (2, 6, 6)},
    "dualtoken_vit_s_normal": {"embed_dims": (64, 128, 256), "depths": (2, 6, 6), "mlp": "normal"},
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        DualTokenViT,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="patch_embed.stem.0",
        classifier="head",
    )
