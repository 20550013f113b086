"""PVT with exchangeable attention: a pyramid of four stages, each with its own patches and position embedding.

    stage:  Conv k x k stride k, LN;  + position embedding;  blocks  x <- x + Attn(LN(x));  x <- x + MLP(LN(x))
    head:   mean over the last stage's tokens, Linear (no final norm)

Source: "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions", arXiv 2102.12122.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from manyheads.engines.common import both_sides
from manyheads.layers.spatial_reduction import SpatialReductionAttention
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
    """Non-overlapping patches and their LayerNorm; rows and columns left over are dropped."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class HostPVT(Host):
    """PVT with agent or InLine attention in the stages that ``attn_type`` names.

    Position embeddings are resized bilinearly to the map that comes. Agent biases belong to ``img_size`` unless
    ``any_size``.

    Args:
        mixer: "agent" or "inline".
        img_size: side or (height, width) of the images.
        patch_size: side of the first patches; the later ones are 2 x 2.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        embed_dims: width of each stage.
        num_heads: attention heads of each stage.
        mlp_ratios: hidden width of the MLP by the width.
        depths: blocks in each stage.
        attn_type: one letter a stage, see ``manyheads.models.vision.hosts.common``.
        sr_ratios: key reduction of softmax stages.
        mixer_sr_ratios: key reduction of agent stages (1 in all published models); InLine attention has none.
        agent_num: agents of each stage, perfect squares.
        agent_grids: (height, width) of agents of each stage instead, for ``any_size``.
        any_size: resize agent biases to the map that comes (dense prediction).
        kernel: of InLine attention.
        qkv_bias: bias of the attention's input projections.
        drop_rate: dropout after position embeddings, in attention outputs, MLPs and before the classifier.
        attn_drop_rate: dropout of softmax weights.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: stage options of different lengths, an ``attn_type`` that does not fit, reductions with InLine
            attention; in ``forward``, maps that agent biases do not fit.

    Source: arXiv 2102.12122; with agent attention arXiv 2312.08874, with InLine attention arXiv 2412.06590.

    >>> import torch
    >>> model = HostPVT("inline", 64, embed_dims=(16, 32), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(1, 1),
    ...                 attn_type="IS", sr_ratios=(8, 4), mixer_sr_ratios=(1, 1), num_classes=10)
    >>> model(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 10])
    """

    stem_pattern, block_pattern = r"^patch_embed1|^pos_embed1", r"^block(\d+)\.(\d+)"

    def __init__(
        self,
        mixer: str = "agent",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[int | float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        attn_type: str = "AAAA",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mixer_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        agent_num: Sequence[int] = (9, 16, 49, 49),
        agent_grids: Sequence[tuple[int, int]] | None = None,
        any_size: bool = False,
        kernel: str = "identity",
        qkv_bias: bool = True,
        drop_rate: int | float = 0.0,
        attn_drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        options = keep_options(locals())
        super().__init__()
        agent_num = agents_of(mixer, agent_num, depths)
        check_stages(embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, depths=depths,
                     sr_ratios=sr_ratios, mixer_sr_ratios=mixer_sr_ratios, agent_num=agent_num)  # fmt: skip
        mixed = mixed_blocks(attn_type, mixer, depths)
        drops = {"attn_drop": float(attn_drop_rate), "proj_drop": float(drop_rate)}
        rates = path_rates(drop_path_rate, sum(depths))
        grid, self.grids, self.depths = both_sides(img_size), [], tuple(depths)
        for s, dim in enumerate(embed_dims):
            patch = patch_size if s == 0 else 2
            grid = (grid[0] // patch, grid[1] // patch)
            if min(grid) < 1:
                raise ValueError(f"img_size={img_size} leaves no token in stage {s + 1}")
            self.grids.append(grid)
            self.add_module(f"patch_embed{s + 1}", PatchEmbed(embed_dims[s - 1] if s else in_chans, dim, patch))
            embedding = nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))
            self.register_parameter(f"pos_embed{s + 1}", embedding)

            def attention(exchanged: bool, s: int = s, dim: int = dim, grid: Grid = grid) -> nn.Module:
                if not exchanged:
                    return SpatialReductionAttention(
                        dim, num_heads[s], reduction=sr_ratios[s], qkv_bias=qkv_bias, **drops
                    )
                return mixer_attention(
                    mixer, dim, num_heads[s], grid, agents=agent_num[s], kernel=kernel, fused=False, qkv_bias=qkv_bias,
                    reduction=mixer_sr_ratios[s], any_size=any_size,
                    agent_grid=agent_grids[s] if agent_grids is not None else None, **drops,
                )  # fmt: skip

            blocks = [
                Block(dim, attention(exchanged), mlp_ratios[s], float(drop_rate), next(rates), 1e-6)
                for exchanged in mixed[s]
            ]
            self.add_module(f"block{s + 1}", nn.ModuleList(blocks))
        self.pos_drop = nn.Dropout(float(drop_rate))
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**s, "module": f"block{s + 1}"}
            for s, dim in enumerate(embed_dims)
        ]
        self.norm = nn.Identity()
        self.finish(in_chans, num_classes, embed_dims, options)

    def no_weight_decay(self) -> set[str]:
        """None: in PVT, position embeddings decay."""
        return set()

    def position_grids(self) -> dict[str, Grid]:
        """The map of every stage's position embedding."""
        return {f"pos_embed{s}": grid for s, grid in enumerate(self.grids, 1)}

    def stages(self, image: Tensor, last: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Tokens and map sizes of every stage up to ``last``."""
        x, found = image, []
        for s in range(len(self.depths) if last is None else last + 1):
            if s:
                tokens, grid = found[-1]
                x = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
            if min(x.shape[2:]) < self.get_submodule(f"patch_embed{s + 1}.proj").stride[0]:  # pyright: ignore
                raise ValueError(
                    f"an image of {image.shape[2]} x {image.shape[3]} pixels leaves no token in stage {s + 1}"
                )
            x, grid = self.get_submodule(f"patch_embed{s + 1}")(x)
            embedding = self.get_parameter(f"pos_embed{s + 1}")
            if grid != self.grids[s]:
                maps = embedding.unflatten(1, self.grids[s]).permute(0, 3, 1, 2)
                maps = F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
                embedding = maps.flatten(2).transpose(1, 2)
            x = self.pos_drop(x + embedding)
            found.append((self.through(list(self.get_submodule(f"block{s + 1}").children()), x, grid), grid))
        return found
