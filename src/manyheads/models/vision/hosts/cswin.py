"""CSwin with exchangeable attention: four stages of cross-shaped windows, the mixer's stages reading the whole map.

    stem: Conv7x7 stride 4, LN.    Between stages: Conv3x3 stride 2, LN.    Head: LN, mean, Linear
    block:  q, k, v = Linear(LN(x));  x <- x + Linear( concat of the branches );  x <- x + MLP(LN(x))

A block has two branches, stripes of full height for one half of the channels and of full width for the other, or a
single one over the whole map. Every branch adds a depthwise convolution of its values.

Source: "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows", arXiv 2107.00652.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops.layers.torch import Rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from manyheads.engines.common import accumulation_dtype, both_sides
from manyheads.layers.agent import AgentStripeAttention
from manyheads.layers.cross_shaped import StripeAttention
from manyheads.layers.inline import InLineStripeAttention
from manyheads.models.vision.hosts.common import (
    Grid,
    Host,
    agents_of,
    check_stages,
    keep_options,
    mixed_blocks,
    path_rates,
)


class CrossBlock(nn.Module):
    """A block of one or two branches; ``branches`` make disjoint halves of the channels."""

    def __init__(
        self, dim: int, branches: list[nn.Module], mlp_ratio: int | float, qkv_bias: bool, drop: float, path: float
    ) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm1 = nn.LayerNorm(dim)
        self.attns = nn.ModuleList(branches)
        self.proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(path) if path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1)).permute(2, 0, 1, 3)
        outs = []
        for branch, part in zip(self.attns, qkv.chunk(len(self.attns), dim=-1)):
            if isinstance(branch, InLineStripeAttention):
                mean = x.mean(1, dtype=accumulation_dtype(x.dtype)).to(x.dtype)
                outs.append(branch(part, grid, mean))
            else:
                outs.append(branch(part, grid))
        x = x + self.drop_path(self.proj(outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MergeBlock(nn.Module):
    """Half the sides and a new width."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        x = self.conv(x.unflatten(1, grid).permute(0, 3, 1, 2))
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class HostCSwin(Host):
    """CSwin with agent or InLine attention in the stages that ``attn_type`` names.

    Args:
        mixer: "agent" or "inline".
        img_size: side or (height, width) of the images; splits must divide the maps it gives.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        embed_dim: width of the first stage; every further stage doubles it.
        depths: blocks in each of the four stages.
        num_heads: attention heads of each stage.
        split_size: width of the stripes of each softmax stage; the whole map in stage 4.
        mixer_split_size: the same for the mixer's stages; None means the whole map, as in all published models.
            InLine attention has no other.
        attn_type: one letter a stage, see ``manyheads.models.vision.hosts.common``.
        agent_num: agents of each stage, perfect squares.
        kernel: of InLine attention.
        mlp_ratio: hidden width of the MLP by the width.
        qkv_bias: bias of the attention's input projections.
        drop_rate: dropout in MLPs and before the classifier.
        attn_drop_rate: dropout of softmax weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, an ``attn_type`` that does not fit, splits that do not divide
            the map, InLine stripes smaller than the map; in ``forward``, another image size where stripes or biases
            belong to one.

    Source: arXiv 2107.00652; with agent attention arXiv 2312.08874, with InLine attention arXiv 2412.06590.

    >>> import torch
    >>> model = HostCSwin("inline", 32, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8),
    ...                   split_size=(1, 2, 1, 1), attn_type="IISS", num_classes=10)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    stem_pattern, block_pattern = r"^stage1_conv_embed", r"^(?:stage(\d+)\.(\d+)|merge(\d+))"

    def __init__(
        self,
        mixer: str = "agent",
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: Sequence[int] = (1, 2, 7, 7),
        mixer_split_size: Sequence[int] | None = None,
        attn_type: str = "AABB",
        agent_num: Sequence[int] = (9, 16, 49, 49),
        kernel: str = "identity",
        mlp_ratio: int | float = 4.0,
        qkv_bias: bool = True,
        drop_rate: int | float = 0.0,
        attn_drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        options = keep_options(locals())
        super().__init__()
        agent_num = agents_of(mixer, agent_num, depths)
        check_stages(depths=depths, num_heads=num_heads, split_size=split_size, agent_num=agent_num,
                     mixer_split_size=mixer_split_size or depths)  # fmt: skip
        mixed, rates = mixed_blocks(attn_type, mixer, depths), path_rates(drop_path_rate, sum(depths))
        grid = tuple((side - 3) // 4 + 1 for side in both_sides(img_size))
        self.depths, dim = tuple(depths), embed_dim
        self.stage1_conv_embed = nn.Sequential(
            nn.Conv2d(in_chans, dim, 7, stride=4, padding=2), Rearrange("b c h w -> b (h w) c"), nn.LayerNorm(dim)
        )

        def branches(s: int, dim: int, heads: int, grid: Grid, exchanged: bool) -> list[nn.Module]:
            splits = mixer_split_size if exchanged else split_size
            whole = splits is None or s == len(depths) - 1 or (splits[s] >= max(grid))
            shapes = [grid] if whole or splits is None else [(grid[0], splits[s]), (splits[s], grid[1])]
            if any(grid[0] % tall or grid[1] % wide for tall, wide in shapes):
                raise ValueError(
                    f"a split size of {splits and splits[s]} does not divide the map of {grid[0]} x {grid[1]} "
                    f"tokens in stage {s + 1}"
                )
            if len(shapes) > 1 and heads % 2:
                raise ValueError(f"num_heads={heads} of stage {s + 1} must be even to serve stripes in both directions")
            width, heads = dim // len(shapes), heads // len(shapes)
            if not exchanged:
                return [StripeAttention(width, heads, shape, attn_drop=attn_drop_rate) for shape in shapes]
            if mixer == "agent":
                return [
                    AgentStripeAttention(width, heads, shape, agents=agent_num[s], attn_drop=attn_drop_rate)
                    for shape in shapes
                ]
            if len(shapes) > 1:
                raise ValueError(
                    f"a split size of {splits and splits[s]} cuts the map of {grid[0]} x {grid[1]} tokens in stage "
                    f"{s + 1} into stripes, but InLine attention makes one kernel for the whole map"
                )
            return [InLineStripeAttention(width, heads, kernel=kernel)]

        for s, depth in enumerate(depths):
            if s:
                self.add_module(f"merge{s}", MergeBlock(dim, 2 * dim))
                dim, grid = 2 * dim, tuple((side - 1) // 2 + 1 for side in grid)
            if min(grid) < 1:
                raise ValueError(f"img_size={img_size} leaves no token in stage {s + 1}")
            blocks = [
                CrossBlock(
                    dim,
                    branches(s, dim, num_heads[s], (grid[0], grid[1]), exchanged),
                    mlp_ratio,
                    qkv_bias,
                    float(drop_rate),
                    next(rates),
                )
                for exchanged in mixed[s]
            ]
            assert len(blocks) == depth
            self.add_module(f"stage{s + 1}", nn.ModuleList(blocks))
        self.feature_info = [
            {"num_chs": embed_dim * 2**s, "reduction": 4 * 2**s, "module": f"stage{s + 1}"} for s in range(len(depths))
        ]
        self.norm = nn.LayerNorm(dim)
        self.finish(in_chans, num_classes, (dim,), options)

    def stages(self, image: Tensor, last: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Tokens and map sizes of every stage up to ``last``."""
        if min(image.shape[2:]) < 3:
            raise ValueError(f"an image of {image.shape[2]} x {image.shape[3]} pixels is smaller than one token")
        x = self.stage1_conv_embed(image)
        grid = ((image.shape[2] - 3) // 4 + 1, (image.shape[3] - 3) // 4 + 1)
        found = []
        for s in range(len(self.depths) if last is None else last + 1):
            if s:
                x, grid = self.get_submodule(f"merge{s}")(x, grid)
            x = self.through(list(self.get_submodule(f"stage{s + 1}").children()), x, grid)
            found.append((x, grid))
        return found
