"""The hierarchical SpectFormer: two spectral stages, two attention stages, class attention, dense token labels.

    stem:    Conv7x7 stride 2, BN, ReLU, twice (Conv3x3, BN, ReLU), Conv3x3 stride 2, LN
    stages:  (Conv3x3 stride 2, LN before stages 2 to 4), blocks, LN
    block:   x <- x + Mixer(LN(x));  x <- x + FFN(LN(x))        Mixer: spectral in stages 1, 2, attention in 3, 4
    head:    c = mean of all tokens, then c <- c + ClassAttention(LN([c, x])), c <- c + MLP(LN(c)), LN of all tokens
    logits:  head(c) + 0.5 max over tokens of aux_head(x)       (head(c) without token labels)

Source: "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446; token labels:
"All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import both_sides, check_choice
from manyheads.layers.conv_ffn import ConvFeedForward, initialise_convolution
from manyheads.layers.spectral import ClassAttention, FullAttention, SpectralGating
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image
from manyheads.models.vision.spectformer import EPS, fit_to_size
from manyheads.objectives.token_label import Box, mix_tokens, unmix_tokens

MIXERS = ("spectral", "attention")


class Block(nn.Module):
    """A mixer and a convolutional FFN, on (batch, X, Y, channels)."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: int | float, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = mixer
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = ConvFeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """The first token reads all tokens and goes through an MLP; the others stay, on (batch, tokens, channels)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int | float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = ClassAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        token = x[:, :1] + self.attn(self.norm1(x))
        token = token + self.mlp(self.norm2(token))
        return torch.cat([token, x[:, 1:]], dim=1)


class Embed(nn.Module):
    """A strided convolution, behind further ones in the stem, and LN: (batch, X, Y, channels) to a coarser map."""

    def __init__(self, in_chans: int, dim: int, stem: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if stem:
            layers = [nn.Conv2d(in_chans, stem, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
            for _ in range(2):
                layers += [nn.Conv2d(stem, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(stem or in_chans, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Embedding, blocks and, but for the last stage, LN, on (batch, X, Y, channels)."""

    def __init__(self, patch_embed: Embed, blocks: list[Block], norm: nn.Module) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.after_embedding(self.patch_embed(x))

    def after_embedding(self, x: Tensor) -> Tensor:
        """The blocks and the norm."""
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return self.norm(x)


class SpectFormerPyramid(Backbone):
    """The hierarchical SpectFormer classifier and backbone.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves the heads away and returns the normed class token.
        img_size: side, or (height, width), of the images in pixels; filters of spectral stages belong to it.
        stem_hidden_dim: width inside the stem.
        embed_dims: width of each stage.
        depths: blocks in each stage.
        num_heads: heads of each stage; spectral stages do not read theirs.
        mlp_ratios: hidden width of the FFN by the block's width, of each stage.
        mixers: "spectral" or "attention" for each stage.
        token_label: have a second head that classifies every token; its largest logits count half.
        resize: read images of other sizes, with filters resized at each call; False makes them an error where a
            stage is spectral.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        norm_eps: of the norms of blocks and stages; those of the embeddings have 1e-5.

    Shape: images (batch, in_chans, height, width) of ``img_size`` to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, widths that heads do not divide, an unknown mixer; in
            ``forward``, an image of another size (unless ``resize``) or number of channels.

    Source: "SpectFormer", arXiv 2304.06446.

    >>> import torch
    >>> model = SpectFormerPyramid(img_size=32, stem_hidden_dim=8, embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2),
    ...                            mlp_ratios=(2, 2), mixers=("spectral", "attention"), num_classes=10)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        stem_hidden_dim: int = 32,
        embed_dims: Sequence[int] = (64, 128, 320, 448),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (2, 4, 10, 14),
        mlp_ratios: Sequence[int | float] = (8, 8, 4, 4),
        mixers: Sequence[str] = ("spectral", "spectral", "attention", "attention"),
        token_label: bool = True,
        resize: bool = False,
        drop_path_rate: int | float = 0.0,
        norm_eps: float = EPS,
    ) -> None:
        super().__init__()
        per_stage = {"embed_dims": embed_dims, "depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        if len({len(option) for option in (*per_stage.values(), mixers)}) > 1:
            raise ValueError(f"options differ in length: {per_stage | {'mixers': mixers}}")
        for mixer in mixers:
            check_choice("mixers", mixer, MIXERS)
        self.in_chans, self.num_classes, self.token_label = in_chans, num_classes, token_label
        self.num_features = self.head_hidden_size = embed_dims[-1]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages, grid = [], halved(both_sides(img_size))
        for s, (dim, depth, heads, ratio, mixer) in enumerate(zip(embed_dims, depths, num_heads, mlp_ratios, mixers)):
            grid = halved(grid)
            blocks = [
                Block(
                    dim,
                    SpectralGating(dim, grid, resize=resize)
                    if mixer == "spectral"
                    else FullAttention(dim, heads, fused=False),
                    ratio,
                    next(rates),
                    norm_eps,
                )
                for _ in range(depth)
            ]
            embed = Embed(embed_dims[s - 1], dim, 0) if s else Embed(in_chans, dim, stem_hidden_dim)
            last = s == len(embed_dims) - 1
            stages.append(Stage(embed, blocks, nn.Identity() if last else nn.LayerNorm(dim, eps=norm_eps)))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**s, "module": f"stages.{s}"} for s, dim in enumerate(embed_dims)
        ]
        self.class_block = ClassBlock(embed_dims[-1], num_heads[-1], mlp_ratios[-1], norm_eps)
        self.norm = nn.LayerNorm(embed_dims[-1], eps=norm_eps)
        self.head = nn.Identity()
        self.aux_head = nn.Identity()
        self.reset_classifier(num_classes)
        self.apply(_initialise)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh heads of another width; what is pooled is always the class token."""
        check_choice("global_pool", global_pool or "token", ("token", "avg"))
        self.num_classes = num_classes
        device = self.norm.weight.device
        for name in ("head", "aux_head"):
            wanted = num_classes and (name == "head" or self.token_label)
            head = nn.Linear(self.num_features, num_classes, device=device) if wanted else nn.Identity()
            self.add_module(name, head)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resize all filters for good, for images of ``img_size`` pixels."""
        grid = halved(img_size)
        for stage in self.stages:
            grid = halved(grid)
            for module in stage.modules():
                if isinstance(module, SpectralGating):
                    module.set_grid(grid)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        blocks = (
            r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (999,))]
        )
        return {"stem": r"^stages\.0\.patch_embed", "blocks": blocks}

    def embed(self, image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """The class token and the image tokens, normed, (batch, 1 + tokens, channels)."""
        check_image(x, self.in_chans)
        x = self.embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.class_tokens(x)

    def class_tokens(self, x: Tensor) -> Tensor:
        """The last stage's map (batch, X, Y, channels) as tokens behind their mean, which reads them, then normed."""
        x = x.flatten(1, 2)
        return self.norm(self.class_block(torch.cat([x.mean(1, keepdim=True), x], dim=1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of tokens from ``forward_features``; ``pre_logits`` stops before the classifier."""
        if pre_logits or not self.num_classes:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1) if self.token_label else logits

    def forward_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (batch, classes) and dense logits (batch, tokens, classes), for training with token labels.

        ``manyheads.objectives.token_label`` has the loss.

        Raises:
            ValueError: the model has no head for tokens.
        """
        self._check_token_head()
        tokens = self.forward_features(x)
        return self.head(tokens[:, 0]), self.aux_head(tokens[:, 1:])

    def forward_mixed(self, x: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Box]:
        """``forward_dense`` with images mixed after the stem, as the hierarchical models are trained (mix-token).

        Returns:
            Class logits of the mixed images, dense logits back at their own images, and the box that was swapped, in
            places of the last map: what ``token_label_loss`` asks for.

        Raises:
            ValueError: the model has no head for tokens, or its last map's places are no whole cells of the stem's.
        """
        self._check_token_head()
        check_image(x, self.in_chans)
        first, *others = self.stages
        maps, box = mix_tokens(
            cast(Stage, first).patch_embed(self.embed(x)), cell=2 ** len(others), generator=generator
        )
        maps = cast(Stage, first).after_embedding(maps)
        for stage in others:
            maps = stage(maps)
        tokens = self.class_tokens(maps)
        dense = unmix_tokens(self.aux_head(tokens[:, 1:]), box, (maps.shape[1], maps.shape[2]))
        return self.head(tokens[:, 0]), dense, box

    def _check_token_head(self) -> None:
        if not self.token_label or not self.num_classes:
            raise ValueError("dense logits need token_label=True and a classifier")


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The sides of a map behind a convolution with stride 2 that pads it.

    >>> halved((7, 4))
    (4, 2)
    """
    return -(-grid[0] // 2), -(-grid[1] // 2)


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout renamed to ours; filters resized where the image size differs.

    A model without token labels leaves the file's second head aside.
    """
    last = len(model.get_submodule("stages")._modules)
    state = rename(state, [(rf"^norm{last}\.", "norm."), *_OFFICIAL])
    heads = ("head.", "aux_head.") if getattr(model, "num_classes", 1) == 0 else ("aux_head.",)
    if len(heads) == 2 or not getattr(model, "token_label", True):
        state = {key: value for key, value in state.items() if not key.startswith(heads)}
    return fit_to_size(state, model)


_OFFICIAL = [
    *((rf"^patch_embed{s + 1}\.", f"stages.{s}.patch_embed.") for s in range(4)),
    *((rf"^block{s + 1}\.", f"stages.{s}.blocks.") for s in range(4)),
    *((rf"^norm{s + 1}\.", f"stages.{s}.norm.") for s in range(4)),
    (r"^post_network\.0\.", "class_block."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        initialise_convolution(module)


VARIANTS = {
    "spectformer_s": {"stem_hidden_dim": 32, "drop_path_rate": 0.1},
    "spectformer_b": {
        "stem_hidden_dim": 64,
        "embed_dims": (64, 128, 320, 512),
        "num_heads": (2, 4, 10, 16),
        "depths": (3, 4, 12, 3),
        "drop_path_rate": 0.1,
    },
    "spectformer_l": {
        "stem_hidden_dim": 64,
        "embed_dims": (96, 192, 384, 512),
        "num_heads": (3, 6, 12, 16),
        "depths": (3, 6, 18, 3),
        "drop_path_rate": 0.3,
    },
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        SpectFormerPyramid,
        {"img_size": 224, **_variant},
        convert=checkpoint_filter_fn,
        feature_cls="getter",
        first_conv="stages.0.patch_embed.conv.0",
        fixed_input_size=True,
        classifier=("head", "aux_head"),
    )
