"""NiNformer: blocks in which an inner MLP-Mixer gates the tokens, where a ViT has attention.

    image -> patches (convolution) -> blocks -> mean over tokens -> Linear      no position embedding, no final norm
    block    x <- x + MGU(n(x));  x <- x + FF(n(x))                             n is one norm with one set of weights

MGU is ``manyheads.ops.mixer_gate.mixer_gating``; its token mixing belongs to one number of tokens, hence to one image
size. The residual stream is kept in float32 under autocast, because nothing norms it and it grows from block to block.

Source: "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function", arXiv 2403.02411.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.layers.conv_ffn import ConvFeedForward
from manyheads.layers.mixer_gate import MixerGating, TokenMixer
from manyheads.layers.spectral import FullAttention
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import patch_grid
from manyheads.ops.mixer_gate import resize_token_mixing

MIXERS = ("gated", "mlp", "attention", "local")


class GatedBlock(nn.Module):
    """The paper's block: gating unit and feed-forward read through the same norm."""

    def __init__(
        self, dim: int, tokens: int, token_dim: int, mlp_dim: int, dropout: int | float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mgu = MixerGating(dim, tokens, token_dim, mlp_dim, dropout)
        self.ffn = Mlp(dim, mlp_dim, drop=float(dropout))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mgu(self.norm(x)))
        return x + self.drop_path(self.ffn(self.norm(x)))


class LocalFeedForward(nn.Module):
    """A convolutional feed-forward on the tokens of a map, with dropout."""

    def __init__(self, dim: int, hidden: int, grid: tuple[int, int], dropout: int | float) -> None:
        super().__init__()
        self.grid, self.ffn, self.drop = grid, ConvFeedForward(dim, hidden), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.ffn(x.unflatten(1, self.grid)).flatten(1, 2))


class AttentionBlock(nn.Module):
    """A ViT's block, to compare with."""

    def __init__(self, dim: int, heads: int, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = FullAttention(dim, heads, fused=True)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)[:, None])[:, 0])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Blocks(nn.Module):
    """All blocks, on maps (batch, X, Y, channels): the one stage of a model of a single resolution."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        grid, x = x.shape[1:3], x.flatten(1, 2)
        for block in self.blocks:
            x = recompute(block, x) if self.grad_checkpointing and self.training else block(x)
        return x.unflatten(1, grid)


class NiNformer(Backbone):
    """The image classifier of the paper; for MNIST with ``in_chans=1``.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled features.
        img_size: side of the images in pixels, or (height, width); multiples of ``patch_size``.
        patch_size: side of the patches in pixels.
        embed_dim: width C.
        depth: blocks.
        mlp_dim: hidden width of both feed-forwards over channels.
        token_dim: hidden width of the feed-forward over tokens, where there is one; None takes ``mlp_dim``, as the
            authors do.
        mixer: "gated"; or, for the paper's comparisons at equal width and depth, "mlp" (the inner mixer alone as
            block, an MLP-Mixer), "attention" (a ViT with position embedding) or "local" (the same with a depthwise
            convolution in its feed-forward, as in LocalViT, arXiv 2104.05707).
        num_heads: heads of "attention" and "local"; the others have none.
        dropout: inside every feed-forward; 0.5 is the authors' value.
        drop_rate: dropout before the classifier, not in the paper.
        drop_path_rate: stochastic depth of the last block, not in the paper; rises linearly from 0. "mlp" has none.

    Shape: images (batch, in_chans, height, width), as ``img_size`` says, to logits (batch, num_classes).

    Raises:
        ValueError: sizes below one, an image size that patches do not divide, ``dropout`` outside [0, 1), an unknown
            ``mixer``; in ``forward``, an image of another size or number of channels.

    Source: "NiNformer", arXiv 2403.02411.

    >>> import torch
    >>> model = NiNformer(img_size=16, embed_dim=24, depth=2, mlp_dim=40, num_classes=5)
    >>> model(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 5])
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        img_size: int | Sequence[int] = 32,
        patch_size: int = 4,
        embed_dim: int = 256,
        depth: int = 4,
        mlp_dim: int = 512,
        token_dim: int | None = None,
        mixer: str = "gated",
        num_heads: int = 4,
        dropout: int | float = 0.5,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("mixer", mixer, MIXERS)
        token_dim = mlp_dim if token_dim is None else token_dim
        sizes = {"in_chans": in_chans, "embed_dim": embed_dim, "depth": depth, "mlp_dim": mlp_dim}
        for name, size in (sizes | {"token_dim": token_dim}).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must be in [0, 1)")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.patch_size, self.grid = patch_size, patch_grid(img_size, patch_size)
        if mixer == "mlp" and drop_path_rate:
            raise ValueError(f"drop_path_rate={drop_path_rate}: blocks of mixer='mlp' have no stochastic depth")
        tokens = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.pos_embed = None
        if mixer in ("attention", "local"):
            self.pos_embed = nn.Parameter(torch.zeros(1, *self.grid, embed_dim))
            trunc_normal_(self.pos_embed, std=0.02)

        def block(drop_path: float) -> nn.Module:
            if mixer == "attention":
                return AttentionBlock(embed_dim, num_heads, Mlp(embed_dim, mlp_dim, drop=float(dropout)), drop_path)
            if mixer == "local":
                mlp = LocalFeedForward(embed_dim, mlp_dim, self.grid, dropout)
                return AttentionBlock(embed_dim, num_heads, mlp, drop_path)
            if mixer == "mlp":
                return TokenMixer(embed_dim, tokens, token_dim, mlp_dim, dropout)
            return GatedBlock(embed_dim, tokens, token_dim, mlp_dim, dropout, drop_path)

        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.stages = nn.ModuleList([Blocks([block(rate) for rate in rates])])
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": "stages.0"}]
        self.num_features = self.head_hidden_size = embed_dim
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """The position embedding, where there is one."""
        return {"pos_embed"} if self.pos_embed is not None else set()

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize the token mixing for good, for images of ``img_size`` pixels; not in the paper.

        Raises:
            ValueError: sides that patches do not divide.
        """
        old, self.grid = self.grid, patch_grid(img_size, self.patch_size)
        for module in self.modules():
            if isinstance(module, TokenMixer):
                module.set_grid(old, self.grid)
            if isinstance(module, LocalFeedForward):
                module.grid = self.grid
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed = nn.Parameter(_resize_positions(self.pos_embed, self.grid))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        return {"stem": r"^pos_embed|patch_embed", "blocks": [(r"^stages\.0\.blocks\.(\d+)", None)]}

    def embed(self, image: Tensor) -> Tensor:
        wanted = tuple(side * self.patch_size for side in self.grid)
        if tuple(image.shape[2:]) != wanted:
            tokens = self.grid[0] * self.grid[1]
            raise ValueError(
                f"the model is for images of {wanted[0]} x {wanted[1]} ({tokens} tokens), got {image.shape[2]} x "
                f"{image.shape[3]} ({(image.shape[2] // self.patch_size) * (image.shape[3] // self.patch_size)} "
                "tokens); set_input_size changes the model"
            )
        x = self.patch_embed(image).permute(0, 2, 3, 1)
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        return x if self.pos_embed is None else x + self.pos_embed


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout renamed to ours; the token mixing resized where the image size differs."""
    state = rename(state, OFFICIAL)
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    grid: tuple[int, int] = model.grid  # pyright: ignore[reportAssignmentType]
    fitted = dict(state)
    for key, weight in state.items():
        prefix, name, _ = key.rpartition("token_in.weight")
        parts = [f"{prefix}token_{part}" for part in ("in.weight", "in.bias", "out.weight", "out.bias")]
        if not name or weight.ndim != 2 or weight.shape[1] == grid[0] * grid[1] or not set(parts) <= set(state):
            continue
        side, shapes = round(weight.shape[1] ** 0.5), [tuple(state[part].shape) for part in parts]
        hidden, tokens = shapes[0]
        if side * side == tokens and shapes[1:] == [(hidden,), (tokens, hidden), (tokens,)]:
            first, second = [(state[parts[i]], state[parts[i + 1]]) for i in (0, 2)]
            resized = resize_token_mixing(first, second, (side, side), grid)
            fitted.update(zip(parts, (*resized[0], *resized[1]), strict=True))
    positions = fitted.get("pos_embed")
    if positions is not None and positions.ndim == 4:
        fitted["pos_embed"] = _resize_positions(positions, grid)
    return fitted


OFFICIAL = [
    (r"^patcher\.", "patch_embed."),
    (r"^classifier\.", "head."),
    (r"^model\.(?=\d)", "stages.0.blocks."),
    (r"\bMixer\.token_mix\.0\.", "mixer.token_norm."),
    (r"\bMixer\.token_mix\.2\.net\.0\.", "mixer.token_in."),
    (r"\bMixer\.token_mix\.2\.net\.3\.", "mixer.token_out."),
    (r"\bMixer\.channel_mix\.0\.", "mixer.channel_norm."),
    (r"\bMixer\.channel_mix\.1\.net\.0\.", "mixer.channel_in."),
    (r"\bMixer\.channel_mix\.1\.net\.3\.", "mixer.channel_out."),
    (r"\bffn\.net\.0\.", "ffn.fc1."),
    (r"\bffn\.net\.3\.", "ffn.fc2."),
]


def _resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    if tuple(positions.shape[1:3]) == grid:
        return positions
    image = positions.permute(0, 3, 1, 2).float()
    resized = nn.functional.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous().to(positions.dtype)


# Name to classes and channels; MNIST's digits are enlarged to the same 32 pixels.
VARIANTS = {"ninformer_cifar10": (10, 3), "ninformer_cifar100": (100, 3), "ninformer_mnist": (10, 1)}
for _name, (_classes, _channels) in VARIANTS.items():
    register(
        _name,
        NiNformer,
        {"num_classes": _classes, "in_chans": _channels, "img_size": 32},
        convert=checkpoint_filter_fn,
        stages=1,
        feature_cls="getter",
        num_classes=_classes,
        input_size=(_channels, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        mean=(0.5,) * _channels,
        std=(0.5,) * _channels,
        first_conv="patch_embed",
        fixed_input_size=True,
        classifier="head",
    )
