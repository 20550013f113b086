"""DependencyViT: a vision transformer whose tokens send to parents, so that trees of parts grow in it.

    16 x 16 patches, blocks, LN, every token times what is left of its message, mean, Linear; no class token
    block      x <- x + g1 RA(LN(x));  [keep the tokens with the largest messages];  x <- x + g2 MLP(LN(x))
    the first ``cpe_depth`` blocks end with x <- x + DWConv3x3(x), which is all that tells a token where it is

The lite variants drop tokens that have nothing left to send (dynamic pooling): the i-th of the listed blocks keeps
floor((1 - i r) / (1 - (i - 1) r) N) of its N tokens. ``DependencyViT.dependencies`` records what every token sent to
whom; ``manyheads.interpret.dependency_trees`` makes trees of it.

Source: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282. The authors
published neither code nor weights; where the paper is silent this follows the reimplementation proposed to timm (pull
request 2062), whose author reports accuracies about two points below the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.layers.davit import ConvPositionEncoding
from manyheads.layers.dependency import ReversedAttention
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register
from manyheads.models.vision.backbone import Backbone
from manyheads.models.vision.features import check_image, patch_grid
from manyheads.models.vision.spectformer import resize_positions

# Tokens (batch, n, C), their messages (batch, n) or None for one each, their places on the map (batch, n) or None
# where all are there in order, and the sides of the map.
Tokens = tuple[Tensor, Tensor | None, Tensor | None, tuple[int, int]]


@dataclass(frozen=True)
class Dependencies:
    """Who sent how much to whom, layer by layer.

    Attributes:
        masks: for every layer D, (batch, parents, children), over the n tokens that are left in that layer.
        messages: for every layer what these tokens had left to send, (batch, n).
        places: for every layer the positions (row by row) of these tokens on the map, (batch, n).
        message: the tokens that reach the end: what they have left, (batch, n).
        grid: sides of the map of all tokens.
        logits: (batch, classes).
    """

    masks: list[Tensor]
    messages: list[Tensor]
    places: list[Tensor]
    message: Tensor
    grid: tuple[int, int]
    logits: Tensor


class KeepTokens(nn.Module):
    """The tokens with the largest messages.

    Args:
        share: of the tokens to keep, rounded down, but at least one.

    Shape: messages (batch, n) to indices (batch, kept), largest message first.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def count(self, tokens: int) -> int:
        """How many of so many tokens are kept."""
        return max(1, math.floor(self.share * tokens))

    def forward(self, message: Tensor) -> Tensor:
        return message.topk(self.count(message.shape[1]), dim=1).indices


class Block(nn.Module):
    """Reversed attention, perhaps dropping of tokens, MLP, perhaps the position generator."""

    def __init__(
        self, attention: ReversedAttention, dim: int, mlp_ratio: int | float, norm_eps: float,
        init_values: int | float, keep: KeepTokens | None, peg: bool, proj_drop: int | float, drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.keep = keep
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=float(proj_drop))
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.peg = ConvPositionEncoding(dim) if peg else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, tokens: Tokens) -> Tokens:
        x, message, places, grid = tokens
        y, message = self.attn(self.norm1(x), message)
        x = x + self.drop_path(self.ls1(y))
        if self.keep is not None:
            kept = self.keep(message)
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
            message = message.gather(1, kept)
            places = kept if places is None else places.gather(1, kept)
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        if self.peg is not None:
            x = self.peg(x.unflatten(1, grid)).flatten(1, 2)
        return x, message, places, grid


class Blocks(nn.Module):
    """All blocks: the one stage of a model of a single resolution."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tokens]:
        tokens: Tokens = (x.flatten(1, 2), None, None, (x.shape[1], x.shape[2]))
        for block in self.blocks:
            tokens = recompute(block, tokens) if self.grad_checkpointing and self.training else block(tokens)
        return on_map(tokens[0], tokens[2], tokens[3]), tokens


class DependencyViT(Backbone):
    """A vision transformer of reversed attention.

    Args:
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away and returns the pooled features.
        img_size: side of the images in pixels, or (height, width); matters only with ``pos_embed``, made for it.
        patch_size: side of the patches in pixels.
        embed_dim: width C.
        depth: blocks.
        num_heads: heads.
        mlp_ratio: hidden width of the MLP by C.
        qkv_bias, qk_norm, head_selector_temperature, message_hidden_ratio, message_bias: see ``ReversedAttention``.
        init_values: where the layer scales begin; 0 has none.
        norm_eps: of all norms.
        cpe_depth: how many of the first blocks end with a position generator.
        pos_embed: add a learned position embedding to the patches, interpolated for images of another size.
        prune_layers: numbers of the blocks that drop tokens; repeated ones count once.
        prune_ratio: r, the share of the *original* tokens that each of them drops.
        drop_rate: dropout of the embedded patches and before the classifier.
        attn_drop_rate, proj_drop_rate: dropout of the shares A, and of projections and MLPs.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width), any multiples of ``patch_size``, to logits (batch, num_classes).
    Feature maps have zeros where a token was dropped.

    Raises:
        ValueError: heads that do not divide the width, a temperature that is not positive, blocks to prune that the
            model does not have or that come before a position generator, ratios that leave no token; in ``forward``, an
            image whose sides are no multiples of the patches'.

    Source: "Visual Dependency Transformers", arXiv 2304.03282.

    >>> import torch
    >>> model = DependencyViT(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=10)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    channels_last = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: int | float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        head_selector_temperature: int | float = 0.1,
        message_hidden_ratio: int | float = 0.5,
        message_bias: int | float | None = None,
        init_values: int | float = 1e-6,
        norm_eps: float = 1e-6,
        cpe_depth: int = 1,
        pos_embed: bool = False,
        prune_layers: Sequence[int] = (),
        prune_ratio: int | float = 0.16,
        drop_rate: int | float = 0.0,
        attn_drop_rate: int | float = 0.0,
        proj_drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        super().__init__()
        keeps = _keeps(depth, cpe_depth, prune_layers, prune_ratio)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.patch_size, self.grid = patch_size, patch_grid(img_size, patch_size)
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.pos_embed = None
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
            trunc_normal_(self.pos_embed, std=0.02)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        attention = {
            "qkv_bias": qkv_bias, "qk_norm": qk_norm, "norm_eps": norm_eps, "temperature": head_selector_temperature,
            "message_hidden_ratio": message_hidden_ratio, "message_bias": message_bias, "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
        }  # fmt: skip
        blocks = [
            Block(
                ReversedAttention(embed_dim, num_heads, **attention), embed_dim, mlp_ratio, norm_eps, init_values,
                keeps.get(index), index < cpe_depth, proj_drop_rate, rate,
            )
            for index, rate in enumerate(rates)
        ]  # fmt: skip
        self.stages = nn.ModuleList([Blocks(blocks)])
        self.feature_info = [{"num_chs": embed_dim, "reduction": patch_size, "module": "stages.0"}]
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.num_features = self.head_hidden_size = embed_dim
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if message_bias is not None:
            for block in blocks:
                nn.init.constant_(block.attn.message_controller.fc2.bias, message_bias)

    def no_weight_decay(self) -> set[str]:
        """The position embedding, where there is one."""
        return set() if self.pos_embed is None else {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from stem to head, for timm's layer-wise learning rate decay."""
        return {"stem": r"^pos_embed|patch_embed", "blocks": [(r"^stages\.0\.blocks\.(\d+)", None), (r"^norm", (999,))]}

    def kept_tokens(self, tokens: int) -> int:
        """How many of so many tokens reach the end."""
        for module in self.stages.modules():
            tokens = module.count(tokens) if isinstance(module, KeepTokens) else tokens
        return tokens

    def embed(self, image: Tensor) -> Tensor:
        size = tuple(image.shape[2:])
        if size[0] % self.patch_size or size[1] % self.patch_size:
            raise ValueError(f"an image of {size[0]} x {size[1]} pixels is not made of patches of {self.patch_size}")
        x = self.patch_embed(image).permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            grid = (x.shape[1], x.shape[2])
            x = x + resize_positions(self.pos_embed, self.grid, grid).view(1, *grid, -1)
        return F.dropout(x, self.drop_rate, self.training)

    def finish(self, x: Any) -> Tensor:
        tokens, message, places, grid = x
        return on_map(self.norm(tokens) * message[..., None], places, grid)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the tokens that were kept, then classify; ``pre_logits`` stops before the classifier."""
        mean = x.sum((1, 2)) / self.kept_tokens(x.shape[1] * x.shape[2])
        pooled = F.dropout(mean, self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def dependencies(self, image: Tensor) -> Dependencies:
        """Run the model and record who sends how much to whom in every layer.

        Attention is computed once more for the record, with all pairs held: for looking, not for training.
        """
        check_image(image, self.in_chans)
        x = self.embed(image)
        tokens: Tokens = (x.flatten(1, 2), None, None, (x.shape[1], x.shape[2]))
        everywhere = torch.arange(tokens[0].shape[1], device=x.device).expand(len(image), -1)
        masks, messages, places = [], [], []
        for block in self.stages[0].blocks:  # pyright: ignore[reportGeneralTypeIssues]
            mask = block.attn.dependency(block.norm1(tokens[0]), tokens[1])
            masks.append(mask)
            messages.append(mask.sum(1))
            places.append(everywhere if tokens[2] is None else tokens[2])
            tokens = block(tokens)
        logits = self.forward_head(self.finish(tokens))
        message = tokens[1]
        assert message is not None
        return Dependencies(masks, messages, places, message, tokens[3], logits)


def on_map(tokens: Tensor, places: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Tokens (batch, n, C) at their places on a map (batch, X, Y, C) that is zero elsewhere."""
    if places is not None:
        everywhere = tokens.new_zeros(tokens.shape[0], grid[0] * grid[1], tokens.shape[2])
        tokens = everywhere.scatter(1, places[..., None].expand_as(tokens), tokens)
    return tokens.unflatten(1, grid)


def _keeps(depth: int, cpe_depth: int, layers: Sequence[int], ratio: int | float) -> dict[int, KeepTokens]:
    """Block number to what it keeps."""
    numbers = sorted(set(layers))
    if numbers and (numbers[0] < 0 or numbers[-1] >= depth):
        raise ValueError(f"prune_layers={tuple(layers)} names blocks that a model of depth={depth} does not have")
    if numbers and numbers[0] < cpe_depth:
        raise ValueError(
            f"prune_layers={tuple(layers)}: block {numbers[0]} would drop tokens before a position generator "
            f"(cpe_depth={cpe_depth}), which needs the whole map"
        )
    if ratio < 0 or (numbers and ratio * len(numbers) >= 1):
        raise ValueError(f"prune_ratio={ratio} at {len(numbers)} blocks must be at least 0 and below 1 in all")
    return {number: KeepTokens((1 - (i + 1) * ratio) / (1 - i * ratio)) for i, number in enumerate(numbers)}


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The layout of timm's pull request (there is none of the authors) renamed to ours; positions resized."""
    state = rename(state, [(r"^patch_embed\.proj\.", "patch_embed."), (r"^blocks\.", "stages.0.blocks.")])
    if getattr(model, "num_classes", 1) == 0:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    wanted, found = getattr(model, "pos_embed", None), state.get("pos_embed")
    if wanted is not None and found is not None and found.shape != wanted.shape:
        side = math.isqrt(found.shape[1])
        if side * side == found.shape[1] and found.shape[2] == wanted.shape[2]:
            state["pos_embed"] = resize_positions(found, (side, side), model.grid)  # pyright: ignore[reportArgumentType]
    return state


_TINY = {"embed_dim": 192, "depth": 12, "num_heads": 12}
VARIANTS = {
    "dependency_vit_tiny": _TINY,
    "dependency_vit_small": {**_TINY, "embed_dim": 384},
    "dependency_vit_lite_tiny": {**_TINY, "prune_layers": (2, 5, 8, 11), "prune_ratio": 0.16},
}
for _name, _variant in VARIANTS.items():
    register(
        _name,
        DependencyViT,
        _variant,
        convert=checkpoint_filter_fn,
        stages=1,
        feature_cls="getter",
        first_conv="patch_embed",
        classifier="head",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
