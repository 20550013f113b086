"""RVT with token-aware pooling: a robust vision transformer on maps, with optionally masked attention.

    stem:   conv 7 x 7 stride 2 (padding 2), BN, max-pool 3 stride 2, conv p/4 x p/4
    block:  x <- x + Attn(LN(TAP(x)));   x <- x + ConvFFN(LN(x))
    Attn:   softmax( q k^T / sqrt(d) * sigmoid(mask) ) v     (a mask (heads, 196, 196) in the first blocks of "plus")
    FFN:    1 x 1 conv, BN, GELU, depthwise 3 x 3, BN, GELU, 1 x 1 conv, BN
    head:   mean over positions, LN, Linear;  between stages a depthwise 3 x 3 convolution with stride 2

Inside a stage a map is (batch, X, Y, channels).

Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126; the backbone is that of "Towards
Robust Vision Transformer", arXiv 2105.07926.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.layers.fan import EPS, softmax_attention
from manyheads.layers.tap import TokenAwarePooling, on_channels_last
from manyheads.models.checkpoints import State
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone


class MaskedAttention(nn.Module):
    """Self-attention whose logits a learned mask of positions scales before the softmax.

    Args:
        dim: width.
        heads: attention heads.
        mask_tokens: sides of the mask, the most tokens that it serves; 0 has none.
        attn_drop: dropout of the weights.

    Shape: (batch, tokens, dim), returned as it came.

    Raises:
        ValueError: heads that do not divide the width; more tokens than the mask has.

    >>> import torch
    >>> MaskedAttention(8, 2, mask_tokens=9)(torch.randn(2, 4, 8)).shape
    torch.Size([2, 4, 8])
    """

    def __init__(self, dim: int, heads: int, *, mask_tokens: int = 0, attn_drop: int | float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} must divide dim={dim}")
        self.heads, self.fused_attn = heads, True
        self.att_mask = nn.Parameter(torch.randn(heads, mask_tokens, mask_tokens)) if mask_tokens else None
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(float(attn_drop))

    def forward(self, x: Tensor) -> Tensor:
        tokens, gate = x.shape[1], None
        if self.att_mask is not None:
            if tokens > self.att_mask.shape[1]:
                raise ValueError(f"{tokens} tokens, but att_mask is for at most {self.att_mask.shape[1]}")
            gate = self.att_mask[:, :tokens, :tokens].sigmoid()
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = softmax_attention(query, key, value, drop=self.attn_drop, fused=self.fused_attn, gate=gate)
        return self.proj(out.transpose(1, 2).flatten(2))


class ConvMlp(nn.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1 convolutions, each with batch norm, GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.dwconv, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.fc2, self.bn3 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.fc1(x)))
        x = F.gelu(self.bn2(self.dwconv(x)))
        return self.bn3(self.fc2(x))


class Block(nn.Module):
    """TAP, attention and convolutional FFN on a channels-last map."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: int | float,
        num_scales: int,
        mask_tokens: int,
        attn_drop: int | float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.dilation_predictor = TokenAwarePooling(dim, num_scales) if num_scales else None
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = MaskedAttention(dim, heads, mask_tokens=mask_tokens, attn_drop=attn_drop)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x if self.dilation_predictor is None else on_channels_last(self.dilation_predictor, x)
        mixed = self.attn(self.norm1(pooled).flatten(1, 2)).unflatten(1, x.shape[1:3])
        x = x + self.drop_path(mixed)
        return x + self.drop_path(on_channels_last(self.mlp, self.norm2(x)))


class Stage(nn.Module):
    """A depthwise convolution with stride 2 (none in the first stage) and blocks, on channels-last maps."""

    def __init__(self, dim: int, out_dim: int, blocks: list[Block], first: bool) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if first else nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = on_channels_last(self.downsample, x)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class _Stem(nn.Module):
    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 32, 7, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, dim, patch // 4, stride=patch // 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class RVT(Backbone):
    """The RVT classifier and backbone with TAP.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        patch_size: pixels that a token of the first stage stands for, a multiple of 4.
        base_dims: width of a head in each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; widths are their products with ``base_dims``.
        mlp_ratio: hidden width of the FFN by the width.
        num_scales: scales of TAP; 0 leaves it away (RVT as it was).
        masked_blocks: how many first blocks of the network have masked attention.
        mask_tokens: the most tokens that masks serve, 196 in all published models (224 pixels).
        drop_rate: dropout before the classifier.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes); of any size without masks, with at
    most ``mask_tokens`` tokens with them.

    Raises:
        ValueError: stage options of different lengths, a patch size that 4 does not divide; in ``forward``, an image
            that is empty, too small for a patch, too large for the masks, or of another number of channels.

    Source: "Robustifying Token Attention for Vision Transformers", arXiv 2303.11126.

    >>> import torch
    >>> model = RVT(base_dims=(8, 8), depths=(1, 1), num_heads=(2, 4), num_classes=10).eval()
    >>> model(torch.randn(2, 3, 64, 48)).shape
    torch.Size([2, 10])
    """

    stages_name, channels_last = "transformers", True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        base_dims: Sequence[int] = (32, 32),
        depths: Sequence[int] = (10, 2),
        num_heads: Sequence[int] = (6, 12),
        mlp_ratio: int | float = 4.0,
        num_scales: int = 4,
        masked_blocks: int = 0,
        mask_tokens: int = 196,
        drop_rate: int | float = 0.0,
        attn_drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not len(base_dims) == len(depths) == len(num_heads):
            raise ValueError(f"base_dims={base_dims}, depths={depths}, num_heads={num_heads} differ in length")
        if patch_size < 4 or patch_size % 4:
            raise ValueError(f"patch_size={patch_size} must be a multiple of 4, by which the stem shrinks the image")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        dims = [base * heads for base, heads in zip(base_dims, num_heads)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_size = patch_size
        self.patch_embed = _Stem(in_chans, dims[0], patch_size)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        first = [sum(depths[:s]) for s in range(len(depths))]
        self.transformers = nn.ModuleList()
        for s, ((before, dim), heads, depth) in enumerate(zip(pairwise([dims[0], *dims]), num_heads, depths)):
            blocks = [
                Block(
                    dim, heads, mlp_ratio, num_scales, mask_tokens if index < masked_blocks else 0, attn_drop_rate,
                    rates[index],
                )
                for index in range(first[s], first[s] + depth)
            ]  # fmt: skip
            self.transformers.append(Stage(before, dim, blocks, first=s == 0))
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**s, "module": f"transformers.{s}"}
            for s, dim in enumerate(dims)
        ]
        self.apply(_initialise)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = r"^transformers\.(\d+)" if coarse else r"^transformers\.(\d+)\.blocks\.(\d+)"
        return {"stem": r"^patch_embed", "blocks": [(blocks, None), (r"^norm", (99999,))]}

    def embed(self, image: Tensor) -> Tensor:
        if min(image.shape[2:]) < 2 * self.patch_size - 8:
            raise ValueError(
                f"an image of {image.shape[2]} x {image.shape[3]} pixels is too small for patches of {self.patch_size}"
            )
        return self.patch_embed(image).permute(0, 2, 3, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over positions, LN, classifier; ``pre_logits`` stops before it."""
        pooled = F.dropout(self.norm(x.mean((1, 2))), self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout, renamed to ours: what stands between two stages belongs to the second one."""
    state = {
        re.sub(r"^pools\.(\d+)\.conv\.", lambda found: f"transformers.{int(found[1]) + 1}.downsample.", name): value
        for name, value in state.items()
    }
    if getattr(model, "num_classes", 1) == 0:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    return state


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


_TINY = dict(base_dims=(32, 32), depths=(10, 2), num_heads=(6, 12))
_SMALL = dict(base_dims=(64,), depths=(12,), num_heads=(6,))
_BASE = dict(base_dims=(64,), depths=(12,), num_heads=(12,))
VARIANTS: dict[str, dict] = {
    "rvt_tiny_tap": _TINY,
    "rvt_small_tap": _SMALL,
    "rvt_base_tap": _BASE,
    "rvt_tiny_plus_tap": {**_TINY, "masked_blocks": 10},
    "rvt_small_plus_tap": {**_SMALL, "masked_blocks": 5},
    "rvt_base_plus_tap": {**_BASE, "masked_blocks": 5},
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        RVT,
        _variant,
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="patch_embed.proj.0",
        classifier="head",
        pool_size=None,
    )
