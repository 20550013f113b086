"""MoH-DiT: a diffusion transformer whose tokens choose and weigh their attention heads.

With tokens x of the noisy latent, timestep t and class y::

    c = MLP(sincos(t)) + E_y
    (shift_1, scale_1, gate_1, shift_2, scale_2, gate_2) = Linear(SiLU(c))             in every block
    x <- x + gate_1 MoH( LN(x) (1 + scale_1) + shift_1 );   x <- x + gate_2 MLP( LN(x) (1 + scale_2) + shift_2 )
    noise, variance = unpatchify( Linear( LN(x) (1 + scale) + shift ) )

Layers may differ in their number of heads, and heads times head_dim need not be the width.

Source: "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842; the host is "Scalable Diffusion
Models with Transformers", arXiv 2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import GELUTanh, Mlp, PatchEmbed
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.layers.mixture_of_heads import MixtureOfHeadsAttention
from manyheads.models.checkpoints import State, rename
from manyheads.models.registry import register

TIME_WIDTH, LONGEST_PERIOD = 256, 1e4
GUIDED_CHANNELS = 3


class MoHDiT(nn.Module):
    """The MoH-DiT denoiser of class-conditional latent diffusion.

    ``manyheads.objectives.diffusion_loss`` trains it. Samplers take it as any DiT:
    ``diffusers.DDPMScheduler(variance_type="learned_range")`` steps from its output.

    Args:
        img_size: side of the latents of the training (an image's side divided by 8).
        patch_size: side of a token's patch.
        in_chans: channels of the latent.
        embed_dim: width.
        head_dim: width of a head.
        num_heads: heads of every layer.
        shared_heads: per layer, heads that every token uses.
        active_heads: per layer, how many of the other heads a token chooses.
        mlp_ratio: hidden width of the feed-forward by the width.
        num_classes: classes; one more embedding stands for "no class".
        class_dropout: share of labels that training replaces by "no class".
        learn_sigma: predict variances too: twice ``in_chans`` output channels.

    Shape: latents (batch, in_chans, height, width), timesteps (batch,), labels (batch,) to (batch, 2 in_chans, height,
    width), or in_chans channels without ``learn_sigma``.

    Raises:
        ValueError: per-layer options of different lengths, a width that is no multiple of 4, ``class_dropout`` outside
            [0, 1]; in ``forward``, a latent that the patches do not tile.

    Source: arXiv 2410.11842, section 4.3.

    >>> import torch
    >>> model = MoHDiT(img_size=8, embed_dim=32, head_dim=8, num_heads=(4, 4), shared_heads=(2, 4),
    ...                active_heads=(1, 0), num_classes=10)
    >>> model(torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 9])).shape
    torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 4,
        embed_dim: int = 384,
        head_dim: int = 64,
        num_heads: Sequence[int] = (6,) * 12,
        shared_heads: Sequence[int] = (3,) * 8 + (6,) * 4,
        active_heads: Sequence[int] = (2,) * 8 + (0,) * 4,
        mlp_ratio: int | float = 4.0,
        num_classes: int = 1000,
        class_dropout: int | float = 0.1,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        per_layer = {"num_heads": num_heads, "shared_heads": shared_heads, "active_heads": active_heads}
        if len({len(option) for option in per_layer.values()}) > 1:
            raise ValueError(f"options differ in length: {per_layer}")
        if embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of 4: sines and cosines of two coordinates")
        if not 0 <= class_dropout <= 1:
            raise ValueError(f"class_dropout={class_dropout} must lie in [0, 1]")
        self.in_chans, self.out_chans = in_chans, in_chans * (1 + learn_sigma)
        self.patch_size, self.num_classes, self.class_dropout = patch_size, num_classes, class_dropout
        self.grad_checkpointing = False
        self.x_embedder = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        side = img_size // patch_size
        self.grid: tuple[int, int] = (side, side)
        # Fixed, but part of the published files and counts.
        self.pos_embed = nn.Parameter(position_table(self.grid, embed_dim)[None], requires_grad=False)
        self.t_embedder = TimestepEmbedding(embed_dim)
        self.y_embedder = LabelEmbedding(num_classes, embed_dim)
        self.blocks = nn.ModuleList()
        for heads, shared, active in zip(num_heads, shared_heads, active_heads):
            attention = MixtureOfHeadsAttention(embed_dim, heads, head_dim=head_dim, shared=shared, active=active)
            self.blocks.append(Block(embed_dim, mlp_ratio, attention))
        self.final_layer = FinalLayer(embed_dim, patch_size**2 * self.out_chans)
        self._initialise()

    def forward(
        self, x: Float[Tensor, "batch channels height width"], t: Tensor, y: Tensor
    ) -> Float[Tensor, "batch out_channels height width"]:
        """Predicted noise and, after it, variances.

        Args:
            x: noisy latents.
            t: (batch,) timesteps, whole or not.
            y: (batch,) labels from 0 to ``num_classes``, the last meaning "no class".
        """
        p = self.patch_size
        if x.ndim != 4 or x.shape[1] != self.in_chans or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"x must be (batch, {self.in_chans}, height, width) of whole {p} x {p} patches, got {tuple(x.shape)}"
            )
        grid = (x.shape[2] // p, x.shape[3] // p)
        tokens = self.x_embedder(x)
        table = self.pos_embed if grid == self.grid else position_table(grid, tokens.shape[-1], x.device)[None]
        if self.training and self.class_dropout:
            y = y.where(torch.rand(y.shape, device=y.device) >= self.class_dropout, self.num_classes)
        tokens = tokens + table.to(tokens.dtype)
        condition = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                tokens = recompute(block, tokens, condition)
            else:
                tokens = block(tokens, condition)
        tokens = self.final_layer(tokens, condition)
        return rearrange(tokens, "b (x y) (p q c) -> b c (x p) (y q)", x=grid[0], p=p, q=p)

    def guided(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """The prediction with classifier-free guidance: as published, on the first three channels of the noise only.

        Args:
            x, t, y: as in ``forward``.
            scale: 1 is no guidance.
        """
        nobody = torch.full_like(y, self.num_classes)
        with_class, without = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nobody])).chunk(2)
        guided = without + scale * (with_class - without)
        return torch.cat([guided[:, :GUIDED_CHANNELS], with_class[:, GUIDED_CHANNELS:]], dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if ".adaLN_modulation." in name or name.startswith("final_layer.") or name.endswith(".bias"):
                # Blocks begin as the identity, and the model as zero.
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            elif name != "pos_embed":
                nn.init.xavier_uniform_(parameter.data.flatten(1))


class Block(nn.Module):
    """Mixture-of-head attention and feed-forward, both shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, mlp_ratio: int | float, attention: MixtureOfHeadsAttention) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = attention
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)


class FinalLayer(nn.Module):
    """The projection of tokens to patches."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimestepEmbedding(nn.Module):
    """Cosines and sines of the timestep, then two linear maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_WIDTH // 2
        rates = torch.exp(-math.log(LONGEST_PERIOD) / half * torch.arange(half, device=t.device))
        angles = t.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """One vector for each class and one for "no class"."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def position_table(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """(tokens, dim) sines and cosines: the first half of the channels tells the column, the second the row.

    >>> position_table((2, 3), 8)[:, 0].mul(100).round().tolist()
    [0.0, 84.0, 91.0, 0.0, 84.0, 91.0]
    """
    rates = LONGEST_PERIOD ** -(torch.arange(dim // 4, device=device, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, device=device)[:, None] * rates for side in grid)
    waves = [
        torch.cat([angles.sin(), angles.cos()], dim=-1).expand(*grid, -1) for angles in (columns[None], rows[:, None])
    ]
    return torch.cat(waves, dim=-1).flatten(0, 1).float()


def checkpoint_filter_fn(state: State, model: nn.Module) -> State:
    """The authors' layout, renamed to ours."""
    return rename(state, [(r"\.attn\.(wg(_[01])?)\.", r".attn.router.\1.")])


def _layers(*runs: tuple[int, int]) -> tuple[int, ...]:
    """(value, layers) pairs written out."""
    return tuple(value for value, count in runs for _ in range(count))


_SMALL = {"embed_dim": 384, "num_heads": _layers((6, 12))}
_BASE = {"embed_dim": 768, "num_heads": _layers((12, 12))}
_LARGE = {"embed_dim": 1024, "num_heads": _layers((8, 8), (16, 8), (24, 8))}
_XLARGE = {"embed_dim": 1152, "head_dim": 72, "num_heads": _layers((8, 9), (16, 10), (24, 9))}
# name: (sizes, shared heads of each layer, active routed heads of each layer); the last number is the percentage of
# heads at work.
_PUBLISHED = {
    "moh_dit_s_2_90": (_SMALL, _layers((3, 8), (6, 4)), _layers((2, 8), (0, 4))),
    "moh_dit_s_2_75": (_SMALL, _layers((2, 2), (3, 8), (6, 2)), _layers((1, 6), (2, 4), (0, 2))),
    "moh_dit_b_2_90": (_BASE, _layers((6, 5), (7, 5), (12, 2)), _layers((4, 10), (0, 2))),
    "moh_dit_b_2_75": (_BASE, _layers((4, 2), (6, 8), (12, 2)), _layers((2, 2), (3, 8), (0, 2))),
    "moh_dit_l_2_90": (_LARGE, _layers((8, 8), (16, 16)), _layers((0, 16), (3, 8))),
    "moh_dit_l_2_75": (_LARGE, _layers((8, 16), (12, 8)), _layers((0, 8), (4, 16))),
    "moh_dit_xl_2_90": (_XLARGE, _layers((8, 9), (16, 19)), _layers((0, 19), (3, 9))),
    "moh_dit_xl_2_75": (_XLARGE, _layers((8, 9), (10, 10), (14, 9)), _layers((0, 9), (2, 19))),
}
VARIANTS = {
    name: {**sizes, "shared_heads": shared, "active_heads": active}
    for name, (sizes, shared, active) in _PUBLISHED.items()
}
for _name, _variant in VARIANTS.items():
    register(
        _name, MoHDiT, _variant, convert=checkpoint_filter_fn, first_conv="x_embedder.proj",
        input_size=(4, 32, 32), pool_size=None, mean=(0.0,) * 4, std=(1.0,) * 4,
    )  # fmt: skip
