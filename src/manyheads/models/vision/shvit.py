"""SHViT: patches of 16 pixels, three stages of depthwise convolution, single-head attention and FFN, for low latency.

    stem:    four 3 x 3 convolutions with stride 2        (every convolution is followed by batch norm)
    block:   x <- x + DW3x3(x);  x <- x + SHSA(x) ("s" stages);  x <- x + FFN(x)
    between: x <- x + DW3x3(x);  x <- x + FFN(x);  1x1, DW3x3 stride 2, SE, 1x1;  x <- x + DW3x3(x);  x <- x + FFN(x)
    head:    mean, BN, Linear

``fuse()`` folds every batch norm into its convolution for deployment. Parameters carry timm's names.

Source: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.conv_norm import ConvNorm, Residual
from manyheads.layers.fused import excite, norm_affine
from manyheads.layers.shvit import SingleHeadAttention
from manyheads.models.checkpoints import CheckpointError, State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone

TYPES = ("i", "s")
SMALLEST = 64


class FeedForward(nn.Module):
    """1 x 1 convolution to twice the width, ReLU, 1 x 1 convolution back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1, self.pw2 = ConvNorm(dim, 2 * dim), ConvNorm(2 * dim, dim, gain=0.0)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(self.pw1(x, self.act))


class PatchMerging(nn.Module):
    """An inverted bottleneck with stride 2 and squeeze-excitation: half the sides, a new width."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvNorm(dim, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, stride=2, groups=hidden)
        self.se = SqueezeExcite(hidden, 0.25)
        self.conv3 = ConvNorm(hidden, out_dim)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(excite(self.se, self.conv2(self.conv1(x, self.act), self.act)))


class Block(nn.Module):
    """Depthwise convolution, attention (type "s" only) and FFN, all residual."""

    def __init__(
        self, dim: int, partial_dim: int, qk_dim: int, kind: str, heads: int, drop_path: int | float = 0.0
    ) -> None:
        super().__init__()
        self.conv = Residual(ConvNorm(dim, dim, 3, groups=dim, gain=0.0), drop_path=drop_path)
        if kind == "s":
            attention = SingleHeadAttention(dim, partial_dim, qk_dim=qk_dim, heads=heads)
            self.mixer = Residual(attention, drop_path=drop_path)
        else:
            self.mixer = nn.Identity()
        self.ffn = Residual(FeedForward(dim), drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class Stage(nn.Module):
    """What leads to a stage, and its blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class Stem(nn.Sequential):
    """Convolutions with norm and activation in turn."""

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        for conv, act in zip_longest(layers[::2], layers[1::2]):
            input = conv(input, act)
        return input


class NormLinear(nn.Module):
    """Batch norm, then a linear classifier."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn, self.l = nn.BatchNorm1d(dim), nn.Linear(dim, classes)
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The same as one linear layer, for evaluation."""
        factor, shift = norm_affine(self.bn)
        weight = self.l.weight
        fused = nn.Linear(self.l.in_features, self.l.out_features, device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight * factor)
        fused.bias.copy_(self.l.bias + weight @ shift)
        return fused.train(self.training)


class SHViT(Backbone):
    """The SHViT classifier and backbone, for images of any size.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        depths: blocks in each stage.
        embed_dims: width of each stage.
        partial_dims: attended channels of each stage.
        qk_dims: width of query and key of each stage.
        types: "s" (with attention) or "i" (without) for each stage.
        heads: attention heads; 1 is the paper's.
        distillation: a second classifier for a teacher; training returns both logits, evaluation their mean.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0; the paper has none.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, an unknown type, attended channels outside the width; in
            ``forward``, an image that is empty or has another number of channels. Images under 64 pixels give a
            warning: the last map is a single position.

    Source: "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456.

    >>> import torch
    >>> model = SHViT(depths=(1, 1), embed_dims=(16, 24), partial_dims=(4, 8), qk_dims=(4, 4), types="is").eval()
    >>> model(torch.randn(2, 3, 64, 90)).shape
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 4, 5),
        embed_dims: Sequence[int] = (128, 224, 320),
        partial_dims: Sequence[int] = (32, 48, 68),
        qk_dims: Sequence[int] = (16, 16, 16),
        types: Sequence[str] = ("i", "s", "s"),
        heads: int = 1,
        distillation: bool = False,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(embed_dims) == len(partial_dims) == len(qk_dims) == len(types):
            raise ValueError(
                f"depths={depths}, embed_dims={embed_dims}, partial_dims={partial_dims}, qk_dims={qk_dims}, "
                f"types={types} differ in length"
            )
        for kind in types:
            check_choice("types", kind, TYPES)
        for dim, partial_dim in zip(embed_dims, partial_dims):
            if not 1 <= partial_dim <= dim:
                raise ValueError(f"partial_dims={partial_dims} must lie between 1 and embed_dims={embed_dims}")
        if embed_dims[0] % 8:
            raise ValueError(f"embed_dims={embed_dims} must begin with a multiple of 8, which the stem divides")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]

        widths = [in_chans, *(embed_dims[0] // part for part in (8, 4, 2, 1))]
        stem: list[nn.Module] = []
        for dim, out_dim in pairwise(widths):
            stem += [ConvNorm(dim, out_dim, 3, stride=2), nn.ReLU(inplace=True)]
        self.patch_embed = Stem(*stem[:-1])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for s, dim in enumerate(embed_dims):
            options = (dim, partial_dims[s], qk_dims[s], types[s], heads)
            blocks = [Block(*options, drop_path=next(rates)) for _ in range(depths[s])]
            stages.append(Stage(_between(embed_dims[s - 1], dim) if s else nn.Identity(), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 16 * 2**s, "module": f"stages.{s}"} for s, dim in enumerate(embed_dims)
        ]
        self.head = NormLinear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head_dist = NormLinear(self.num_features, num_classes) if num_classes and distillation else None

    def fuse(self) -> SHViT:
        """Fold every batch norm into the layer in front of it (the head's into the one behind it), and return self.

        For evaluation only: the statistics are fixed afterwards.
        """
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, (ConvNorm, Residual, NormLinear)):
                    setattr(parent, name, child.fuse())
        return self.eval()

    def embed(self, image: Tensor) -> Tensor:
        if min(image.shape[2:]) < SMALLEST and not torch.compiler.is_compiling():
            size = f"{image.shape[2]} x {image.shape[3]}"
            warnings.warn(f"an image of {size} pixels leaves a single position to the last stage", stacklevel=2)
        return self.patch_embed(image.contiguous(memory_format=torch.channels_last))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mean over positions, then classify; ``pre_logits`` stops before the classifier."""
        pooled = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        if pre_logits or self.head_dist is None:
            return pooled if pre_logits else self.head(pooled)
        logits, taught = self.head(pooled), self.head_dist(pooled)
        return (logits, taught) if self.training else (logits + taught) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        )
        return {"stem": r"^patch_embed", "blocks": blocks}

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.l if isinstance(self.head, NormLinear) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier of another width; the pooling is always the mean."""
        check_choice("global_pool", global_pool or "avg", ("avg",))
        self.num_classes = num_classes
        device = next(self.stages.parameters()).device
        self.head = NormLinear(self.num_features, num_classes).to(device) if num_classes else nn.Identity()
        if self.head_dist is not None:
            self.head_dist = NormLinear(self.num_features, num_classes).to(device) if num_classes else None


def _between(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        Residual(ConvNorm(dim, dim, 3, groups=dim)),
        Residual(FeedForward(dim)),
        PatchMerging(dim, out_dim),
        Residual(ConvNorm(out_dim, out_dim, 3, groups=out_dim)),
        Residual(FeedForward(out_dim)),
    )


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout (``blocks1`` ... with the merging as the first three entries) or timm's, renamed to ours.

    Raises:
        CheckpointError: the file holds a fused model and this one is not.
    """
    fused = any(key in state for key in ("patch_embed.0.weight", "patch_embed.0.bias"))
    if fused and isinstance(model.get_submodule("patch_embed.0"), ConvNorm):
        raise CheckpointError(
            "the file holds a fused SHViT (no batch norms); call fuse() on the model before loading it"
        )
    state = rename(state, _OFFICIAL)
    wanted = model.state_dict()
    for key, value in state.items():
        if value.ndim == 2 and key in wanted and wanted[key].ndim == 4:
            state[key] = value[..., None, None]
    dropped = () if getattr(model, "num_classes", 1) else ("head.", "head_dist.")
    if getattr(model, "head_dist", None) is None:
        dropped = (*dropped, "head_dist.")
    return {key: value for key, value in state.items() if not key.startswith(dropped or ("\0",))}


_OFFICIAL = [
    (r"^blocks1\.(\d+)\.", r"stages.0.blocks.\1."),
    *[(rf"^blocks{s + 1}\.0\.([01])\.", rf"stages.{s}.downsample.\1.") for s in (1, 2)],
    *[(rf"^blocks{s + 1}\.1\.", rf"stages.{s}.downsample.2.") for s in (1, 2)],
    *[(rf"^blocks{s + 1}\.2\.{k}\.", rf"stages.{s}.downsample.{3 + k}.") for s in (1, 2) for k in (0, 1)],
    *[(rf"^blocks{s + 1}\.{j + 3}\.", rf"stages.{s}.blocks.{j}.") for s in (1, 2) for j in range(64)],
]
VARIANTS = {
    "shvit_s1": {"depths": (2, 4, 5), "embed_dims": (128, 224, 320), "partial_dims": (32, 48, 68)},
    "shvit_s2": {"depths": (2, 4, 5), "embed_dims": (128, 308, 448), "partial_dims": (32, 66, 96)},
    "shvit_s3": {"depths": (3, 5, 5), "embed_dims": (192, 352, 448), "partial_dims": (48, 75, 96)},
    "shvit_s4": {"depths": (4, 7, 6), "embed_dims": (224, 336, 448), "partial_dims": (48, 72, 96)},
}
for _name, _variant in VARIANTS.items():
    _size = 256 if _name == "shvit_s4" else 224
    register(
        _name,
        SHViT,
        _variant,
        convert=checkpoint_filter_fn,
        first_conv="patch_embed.0.c",
        classifier="head.l",
        input_size=(3, _size, _size),
        pool_size=(4, 4),
        crop_pct=0.875,
    )
