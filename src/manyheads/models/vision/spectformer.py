"""SpectFormer: the first blocks mix positions by filters in the Fourier domain, the later ones by attention.

    vanilla:       16 x 16 patches plus position embedding, 4 spectral blocks, attention blocks, LN, mean, Linear
        spectral   x <- x + MLP(LN(Filter(LN(x))))                    one residual around both
        attention  x <- x + Attention(LN(x));  x <- x + MLP(LN(x))
    hierarchical:  a convolutional stem and four stages, two spectral and two with attention, see ``SpectFormerPyramid``

Inside, a map is (batch, X, Y, channels). A filter and a position embedding belong to one image size; for another one
they are resized when a checkpoint is loaded, or at each call with ``resize``.

Source: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.spectral import FullAttention, SpectralGating
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import patch_grid
from manyheads.ops.spectral import resize_filter

ORDERS = ("spectral_first", "attention_first")
EPS = 1e-6


class SpectralBlock(nn.Module):
    """Filter and MLP inside one residual, as in the authors' code."""

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        mlp_ratio: int | float,
        drop_path: float,
        resize: bool,
        norm_eps: float = EPS,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.filter = SpectralGating(dim, grid, resize=resize)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(x)))))


class AttentionBlock(nn.Module):
    """Attention and MLP, each with its residual."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int | float, drop_path: float, norm_eps: float = EPS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = FullAttention(dim, heads, fused=True)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Blocks(nn.Module):
    """All blocks: the one stage of a model of a single resolution."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x


class SpectFormer(Backbone):
    """The vanilla SpectFormer: a ViT whose first ``alpha`` blocks are spectral.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled, normed features.
        img_size: side, or (height, width), of the images in pixels, multiples of ``patch_size``.
        patch_size: side of the patches in pixels.
        embed_dim: width C.
        depth: blocks.
        num_heads: heads of the attention blocks (the authors' code has 6 whatever the width).
        alpha: how many blocks are spectral; 0 is a ViT without class token, ``depth`` a purely spectral network.
        order: "spectral_first", or "attention_first" with the spectral blocks last (the ablation).
        mlp_ratio: hidden width of the MLP by the block's width.
        norm_eps: of all norms.
        representation_size: width of an extra Linear and tanh before the classifier; 0 has none.
        resize: read images of other sizes, with filters and position embedding resized at each call; False makes
            them an error.
        drop_rate: dropout after the position embedding and before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        uniform_drop: give all blocks ``drop_path_rate`` instead.

    Shape: images (batch, in_chans, height, width) of ``img_size`` to logits (batch, num_classes).

    Raises:
        ValueError: a width that heads do not divide, ``alpha`` outside 0 ... depth, an image size that patches do not
            divide; in ``forward``, an image of another size (unless ``resize``) or number of channels.

    Source: "SpectFormer", arXiv 2304.06446.

    >>> import torch
    >>> model = SpectFormer(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2, alpha=1, num_classes=10)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        alpha: int = 4,
        order: str = "spectral_first",
        mlp_ratio: int | float = 4.0,
        norm_eps: float = EPS,
        representation_size: int = 0,
        resize: bool = False,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
        uniform_drop: bool = False,
    ) -> None:
        super().__init__()
        check_choice("order", order, ORDERS)
        if not 0 <= alpha <= depth:
            raise ValueError(f"alpha={alpha} spectral blocks must be between 0 and depth={depth}")
        self.grid = patch_grid(img_size, patch_size)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.patch_size, self.resize = patch_size, resize
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        trunc_normal_(self.pos_embed, std=0.02)
        rates = torch.linspace(drop_path_rate if uniform_drop else 0, drop_path_rate, depth, device="cpu").tolist()
        spectral = range(alpha) if order == "spectral_first" else range(depth - alpha, depth)
        blocks = [
            SpectralBlock(embed_dim, self.grid, mlp_ratio, rate, resize, norm_eps)
            if index in spectral
            else AttentionBlock(embed_dim, num_heads, mlp_ratio, rate, norm_eps)
            for index, rate in enumerate(rates)
        ]
        self.stages = nn.ModuleList([Blocks(blocks)])
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": "stages.0"}]
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.pre_logits = nn.Identity()
        if representation_size:
            self.pre_logits = nn.Sequential(nn.Linear(embed_dim, representation_size), nn.Tanh())
        self.num_features = self.head_hidden_size = representation_size or embed_dim
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """The position embedding."""
        return {"pos_embed"}

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resize filters and position embedding for good, for images of ``img_size`` pixels.

        Raises:
            ValueError: sides that patches do not divide.
        """
        grid = patch_grid(img_size, self.patch_size)
        with torch.no_grad():
            self.pos_embed = nn.Parameter(resize_positions(self.pos_embed, self.grid, grid).clone())
        self.grid = grid
        for module in self.modules():
            if isinstance(module, SpectralGating):
                module.set_grid(grid)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        return {"stem": r"^pos_embed|patch_embed", "blocks": [(r"^stages\.0\.blocks\.(\d+)", None), (r"^norm", (999,))]}

    def embed(self, image: Tensor) -> Tensor:
        wanted = tuple(side * self.patch_size for side in self.grid)
        if tuple(image.shape[2:]) != wanted and not self.resize:
            size = f"{image.shape[2]} x {image.shape[3]}"
            raise ValueError(f"the model is for images of {wanted[0]} x {wanted[1]}, got {size}; allow resize")
        if min(image.shape[2:]) < self.patch_size:
            raise ValueError(f"an image of {tuple(image.shape[2:])} pixels holds no patch of {self.patch_size}")
        x = self.patch_embed(image).permute(0, 2, 3, 1)
        position = resize_positions(self.pos_embed, self.grid, (x.shape[1], x.shape[2]))
        return F.dropout(x + position.view(1, *x.shape[1:]), self.drop_rate, self.training)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over positions, then classify; ``pre_logits`` stops before the classifier."""
        pooled = F.dropout(self.pre_logits(x.mean((1, 2))), self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)


def resize_positions(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position embedding (1, tokens, C) for another grid, interpolated bicubically.

    >>> resize_positions(torch.ones(1, 16, 4), (4, 4), (6, 5)).shape
    torch.Size([1, 30, 4])
    """
    if old == new:
        return embedding
    image = embedding.float().unflatten(1, old).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return resized.flatten(2).mT.to(embedding.dtype).contiguous()


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout renamed to ours; filters and position embedding resized where the image size differs."""
    state = rename(state, _OFFICIAL)
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    return fit_to_size(state, model)


def fit_to_size(state: State, model: nn.Module) -> State:
    """Filters and position embedding of another image size, resized to the model's."""
    wanted = model.state_dict()
    fitted = dict(state)
    for key, value in state.items():
        if key not in wanted or value.shape == wanted[key].shape:
            continue
        if key.endswith("complex_weight") and value.ndim == 4 and value.shape[2:] == wanted[key].shape[2:]:
            filtered = model.get_submodule(key.rpartition(".")[0])
            fitted[key] = resize_filter(value, filtered.grid)  # pyright: ignore[reportArgumentType]
        elif key == "pos_embed" and value.ndim == 3 and value.shape[2] == wanted[key].shape[2]:
            side = round(value.shape[1] ** 0.5)
            if side * side == value.shape[1]:
                fitted[key] = resize_positions(value, (side, side), model.grid)  # pyright: ignore[reportArgumentType]
    return fitted


_OFFICIAL = [
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"^blocks\.", "stages.0.blocks."),
    (r"^pre_logits\.fc\.", "pre_logits.0."),
]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS = {
    "spectformer_vanilla_ti": {"embed_dim": 256, "depth": 12, "num_heads": 4},
    "spectformer_vanilla_xs": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "spectformer_vanilla_s": {"embed_dim": 384, "depth": 19, "num_heads": 6, "drop_path_rate": 0.15},
    "spectformer_vanilla_b": {"embed_dim": 512, "depth": 19, "num_heads": 8, "drop_path_rate": 0.25},
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        SpectFormer,
        {"img_size": 224, **_variant},
        convert=checkpoint_filter_fn,
        stages=1,
        feature_cls="getter",
        first_conv="patch_embed",
        fixed_input_size=True,
        classifier="head",
    )
