"""DeiT with exchangeable attention: a plain vision transformer with a class token.

    tokens: Conv p x p stride p, class token in front, learned position embedding      head: LN, class token, Linear
    block:  x <- x + Attn(LN(x));  x <- x + MLP(LN(x))

Source: "Training data-efficient image transformers & distillation through attention", arXiv 2012.12877.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.layers import Attention, trunc_normal_
from torch import Tensor, nn

from manyheads.engines.common import both_sides
from manyheads.models.vision.hosts.common import Block, Grid, Host, keep_options, mixer_attention, path_rates

# Which entry of the list of agent counts two blocks at a time take.
AGENT_ENTRIES = (0, 1, 2, 2, 2, 3)


class PatchEmbed(nn.Module):
    """The convolution that cuts an image into patches."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    """timm's attention, called like the mixers with the map's sizes, and with its parameters under the same names."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        inner = Attention(dim, heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop)
        self.qkv, self.proj = inner.qkv, inner.proj
        self.__dict__["inner"] = inner  # not a child, or its parameters would have two names

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return cast(nn.Module, self.inner)(x)


class HostDeiT(Host):
    """DeiT, the first ``mixed`` blocks with agent or InLine attention and the others with softmax attention.

    Args:
        mixer: "agent" or "inline".
        img_size: side or (height, width) of the images, to which position embedding and agent biases belong.
        patch_size: side of the patches.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        embed_dim: width.
        depth: blocks.
        num_heads: attention heads.
        mixed: how many first blocks have the mixer ("agent_layer"); None means all.
        agent_num: agents of the blocks 0-1, 2-3, 4-9 and the rest; one number for all. Perfect squares.
        kernel: of InLine attention, see ``manyheads.ops.inline.inline_attention``.
        mlp_ratio: hidden width of the MLP by the width.
        qkv_bias: bias of the attention's input projections.
        drop_rate: dropout after the position embedding, in attention outputs, MLPs and before the classifier.
        attn_drop_rate: dropout of softmax weights (InLine attention has none).
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: an image size that patches do not divide, widths that heads do not divide, a number of agents that
            is no square; in ``forward``, an image of another size or number of channels.

    Source: arXiv 2012.12877; with agent attention arXiv 2312.08874, with InLine attention arXiv 2412.06590.

    >>> import torch
    >>> model = HostDeiT("inline", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=10)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    class_token, num_prefix_tokens = True, 1
    stem_pattern, block_pattern = r"^cls_token|^pos_embed|^patch_embed", r"^blocks\.(\d+)"

    def __init__(
        self,
        mixer: str = "agent",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mixed: int | None = None,
        agent_num: int | Sequence[int] = 49,
        kernel: str = "identity",
        mlp_ratio: int | float = 4.0,
        qkv_bias: bool = True,
        drop_rate: int | float = 0.0,
        attn_drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        options = keep_options(locals())
        super().__init__()
        self.image = both_sides(img_size)
        self.patch_grid: Grid = (self.image[0] // patch_size, self.image[1] // patch_size)
        if any(side % patch_size for side in self.image) or min(self.image) < 1:
            raise ValueError(f"img_size={img_size} must consist of whole patches of {patch_size} pixels")
        numbers = (agent_num,) * 4 if isinstance(agent_num, int) else tuple(agent_num)
        if len(numbers) != 4:
            raise ValueError(f"agent_num={agent_num} must be one number or four")
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        places = self.patch_grid[0] * self.patch_grid[1] + 1
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, places, embed_dim), std=0.02))
        self.pos_drop = nn.Dropout(float(drop_rate))
        drops = (float(attn_drop_rate), float(drop_rate))

        def attention(block: int) -> nn.Module:
            if block >= (depth if mixed is None else mixed):
                return SoftmaxAttention(embed_dim, num_heads, qkv_bias, *drops)
            agents = numbers[AGENT_ENTRIES[min(block // 2, len(AGENT_ENTRIES) - 1)]]
            return mixer_attention(
                mixer, embed_dim, num_heads, self.patch_grid, agents=agents, kernel=kernel, class_token=True,
                qkv_bias=qkv_bias, attn_drop=drops[0], proj_drop=drops[1],
            )  # fmt: skip

        self.blocks = nn.ModuleList(
            Block(embed_dim, attention(block), mlp_ratio, drops[1], path, 1e-6)
            for block, path in enumerate(path_rates(drop_path_rate, depth))
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{block}"} for block in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.finish(in_chans, num_classes, (embed_dim,), options)

    def position_grids(self) -> dict[str, Grid]:
        """The map of the position embedding (behind the class token's)."""
        return {"pos_embed": self.patch_grid}

    def stages(self, image: Tensor, last: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Every block is a stage: its tokens, the class token first, and the sizes of the map."""
        if tuple(image.shape[2:]) != self.image:
            raise ValueError(
                f"image of {image.shape[2]} x {image.shape[3]} pixels, but the position embedding is of "
                f"{self.image[0]} x {self.image[1]}: set_input_size resizes it"
            )
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        found = []
        for block in self.blocks[: None if last is None else last + 1]:
            x = self.through([block], x, self.patch_grid)
            found.append((x, self.patch_grid))
        return found
