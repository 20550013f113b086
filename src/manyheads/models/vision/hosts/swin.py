"""Swin with exchangeable attention: four stages of windows, the mixer's blocks reading the whole map.

    stem: Conv4x4 stride 4, LN.   Between stages: 2x2 tokens concatenated, LN, Linear 4C -> 2C.   Head: LN, mean, Linear
    block:  x <- x + Attn(LN(x));  x <- x + MLP(LN(x)),  softmax windows shifted in every other block

Source: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.engines.common import both_sides
from manyheads.layers.shifted_window import ShiftedWindowAttention
from manyheads.models.vision.hosts.common import (
    Block,
    Grid,
    Host,
    agents_of,
    check_stages,
    keep_options,
    mixed_blocks,
    mixer_attention,
    path_rates,
)


class PatchEmbed(nn.Module):
    """Non-overlapping patches and their LayerNorm; ``any_size`` pads the image to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch: int, any_size: bool) -> None:
        super().__init__()
        self.patch, self.any_size = patch, any_size
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        below, right = -x.shape[2] % self.patch, -x.shape[3] % self.patch
        if below or right:
            if not self.any_size:
                raise ValueError(
                    f"an image of {x.shape[2]} x {x.shape[3]} pixels does not divide into patches of {self.patch}; "
                    "allow any_size"
                )
            x = F.pad(x, (0, right, 0, below))
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class PatchMerging(nn.Module):
    """Four neighbouring tokens into one of twice the width; ``any_size`` pads odd maps with zeros."""

    def __init__(self, dim: int, any_size: bool) -> None:
        super().__init__()
        self.any_size = any_size
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        maps = x.unflatten(1, grid)
        if grid[0] % 2 or grid[1] % 2:
            if not self.any_size:
                raise ValueError(f"a map of {grid[0]} x {grid[1]} tokens cannot be merged: its sides must be even")
            maps = F.pad(maps, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        parts = [maps[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged = torch.cat(parts, dim=-1)
        return self.reduction(self.norm(merged.flatten(1, 2))), (merged.shape[1], merged.shape[2])


class Stage(nn.Module):
    """The blocks of one resolution and the merging to the next (none after the last)."""

    def __init__(self, blocks: list[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class HostSwin(Host):
    """Swin with agent or InLine attention in the blocks that ``attn_type`` names.

    Args:
        mixer: "agent" or "inline".
        img_size: side or (height, width) of the images.
        patch_size: side of the patches.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        embed_dim: width of the first stage; every further stage doubles it.
        depths: blocks in each stage.
        num_heads: attention heads of each stage.
        window_size: the mixer's window, which must cover every map (56 at 224 pixels); softmax blocks have windows
            of max(7, window_size // 8), shifted by half of it in odd blocks, or the whole map where it is no larger.
        attn_type: one letter a stage, see ``manyheads.models.vision.hosts.common``.
        agent_num: agents of each stage, perfect squares.
        agent_grids: (height, width) of agents of each stage instead, for ``any_size``.
        any_size: dense prediction: pad images, odd maps and windows with zeros, resize agent biases, and shift the
            windows of odd softmax blocks however small the map is.
        kernel: of InLine attention.
        mlp_ratio: hidden width of the MLP by the width.
        qkv_bias: bias of the attention's input projections.
        drop_rate: dropout after the patches, in attention outputs, MLPs and before the classifier.
        attn_drop_rate: dropout of softmax weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, an ``attn_type`` that does not fit, a window that does not
            cover a mixer's map, odd maps at the merging; in ``forward``, maps that agent biases do not fit.

    Source: arXiv 2103.14030; with agent attention arXiv 2312.08874, with InLine attention arXiv 2412.06590.

    >>> import torch
    >>> model = HostSwin("inline", 64, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=16, attn_type="IS",
    ...                  num_classes=10)
    >>> model(torch.randn(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """

    stem_pattern, block_pattern = r"^patch_embed", r"^layers\.(\d+)\.(?:blocks\.(\d+)|downsample)"

    def __init__(
        self,
        mixer: str = "agent",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 56,
        attn_type: str = "AAAB",
        agent_num: Sequence[int] = (9, 16, 49, 49),
        agent_grids: Sequence[tuple[int, int]] | None = None,
        any_size: bool = False,
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
        check_stages(depths=depths, num_heads=num_heads, agent_num=agent_num)
        mixed = mixed_blocks(attn_type, mixer, depths)
        drops = {"attn_drop": float(attn_drop_rate), "proj_drop": float(drop_rate)}
        rates = path_rates(drop_path_rate, sum(depths))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, any_size)
        self.pos_drop = nn.Dropout(float(drop_rate))
        height, width = both_sides(img_size)
        grid = (
            (-(-height // patch_size), -(-width // patch_size))
            if any_size
            else (height // patch_size, width // patch_size)
        )
        dims = [embed_dim * 2**s for s in range(len(depths))]

        def attention(s: int, block: int, grid: Grid) -> nn.Module:
            if mixed[s][block]:
                if window_size < max(grid) and not any_size:
                    raise ValueError(
                        f"window_size={window_size} must cover the map of {grid[0]} x {grid[1]} tokens in stage "
                        f"{s + 1}, because {mixer} attention reads the whole map"
                    )
                return mixer_attention(
                    mixer, dims[s], num_heads[s], grid, agents=agent_num[s], kernel=kernel, qkv_bias=qkv_bias,
                    any_size=any_size, agent_grid=agent_grids[s] if agent_grids is not None else None, **drops,
                )  # fmt: skip
            window = max(7, window_size // 8)
            whole = window >= min(grid) and not any_size
            shift = window // 2 if block % 2 and not whole else 0
            window = min(grid) if whole else window
            return ShiftedWindowAttention(dims[s], num_heads[s], window=window, shift=shift, qkv_bias=qkv_bias, **drops)

        stages = []
        for s, dim in enumerate(dims):
            if min(grid) < 1:
                raise ValueError(f"img_size={img_size} leaves no token in stage {s + 1}")
            blocks = [
                Block(dim, attention(s, block, grid), mlp_ratio, float(drop_rate), next(rates), 1e-5)
                for block in range(depths[s])
            ]
            more = s < len(dims) - 1
            stages.append(Stage(blocks, PatchMerging(dim, any_size) if more else None))
            if more and not any_size and (grid[0] % 2 or grid[1] % 2):
                raise ValueError(
                    f"img_size={img_size} gives an odd map of {grid[0]} x {grid[1]} tokens to merge; allow any_size"
                )
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        self.layers = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**s, "module": f"layers.{s}"} for s, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1])
        self.finish(in_chans, num_classes, dims, options)

    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions; in dense prediction the agents' biases too."""
        tables = {name for name, _ in self.named_parameters() if re.search(r"\.(an|na|ah|aw|ha|wa)_bias$", name)}
        return super().no_weight_decay() | (tables if self.options["any_size"] else set())

    def stages(self, image: Tensor, last: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Tokens, before the merging, and map sizes of every stage up to ``last``."""
        x, grid = self.patch_embed(image)
        x, found = self.pos_drop(x), []
        for index, module in enumerate(self.layers):
            stage = cast(Stage, module)
            x = self.through(stage.blocks, x, grid)
            found.append((x, grid))
            if index == last:
                break
            if stage.downsample is not None:
                x, grid = stage.downsample(x, grid)
        return found
