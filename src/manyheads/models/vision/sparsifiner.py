"""DeiT and LV-ViT whose attention is computed only where a predictor says.

    image -> patches -> class token, position embedding -> blocks -> LN -> head on the class token
    block    x <- x + Attn(LN(x)) / lam;  x <- x + MLP(LN(x)) / lam;  tokens that were dropped are set to zero

DeiT has lam = 1 and one convolution that cuts patches; LV-ViT has lam = 2, a stem of three convolutions before it, and
a second head on the patches whose largest logits are added by half. Dropped tokens stay in place as zeros.

Source: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755;
LV-ViT is "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import checkpoint as recompute
from torch import Tensor, nn

from manyheads.engines.common import both_sides, check_choice
from manyheads.layers.sparsifiner import AttentionDetails, ConnectivityPredictor, SparsifiedAttention
from manyheads.models.checkpoints import State
from manyheads.models.registry import register
from manyheads.models.vision.features import check_image
from manyheads.models.vision.hosts.common import Grid, Host, keep_options, path_rates, resize_state
from manyheads.models.vision.hosts.deit import PatchEmbed
from manyheads.ops.sparse_connectivity import PairRule, sparsities

STEMS = ("patch", "conv")


class Outputs(NamedTuple):
    """What ``Sparsifiner.inspect`` returns.

    Attributes:
        logits: (batch, classes).
        features: the patches' tokens after the last norm, (batch, N - 1, channels).
        layers: one for each block.
    """

    logits: Tensor
    features: Tensor
    layers: list[AttentionDetails]

    def sparsities(self) -> dict[str, Tensor]:
        """Fractions of zeros in basis, coefficients and masks, averaged over the layers with a predictor."""
        found = [
            sparsities(layer.prediction, layer.mask)
            for layer in self.layers
            if layer.prediction is not None and layer.mask is not None
        ]
        return {name: torch.stack([one[name] for one in found]).mean() for name in (found[0] if found else ())}


class ConvStem(nn.Module):
    """LV-ViT's patches: convolutions of 7 x 7 (stride 2), 3 x 3, 3 x 3, then patches of the half-size map."""

    def __init__(self, in_chans: int, dim: int, patch: int, hidden: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_chans, hidden, 7, 2, 3, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden)
        self.proj = nn.Conv2d(hidden, dim, patch // 2, stride=patch // 2)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class SparseBlock(nn.Module):
    """Attention and MLP, each after a LayerNorm; dropped tokens leave as zeros."""

    def __init__(
        self, dim: int, attention: SparsifiedAttention, mlp_ratio: int | float, drop: float, path: float, eps: float,
        skip_lam: int | float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(path) if path else nn.Identity()
        self.skip_lam = skip_lam

    def forward(
        self, x: Tensor, token_mask: Tensor | None = None, kept: int | None = None, details: bool = False
    ) -> tuple[Tensor, Tensor | None, AttentionDetails | None]:
        out, token_mask, found = self.attn.attend(self.norm1(x), token_mask, kept, details)
        x = x + self.drop_path(out) / self.skip_lam
        x = x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam
        if token_mask is not None:
            x = x * F.pad(token_mask, (1, 0), value=True)[..., None]
        return x, token_mask, found


class Sparsifiner(Host):
    """A vision transformer with predicted sparse attention.

    Args:
        img_size: side or (height, width) of the images, to which position embedding and predictors belong.
        patch_size: side of the patches; even with a "conv" stem.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 leaves it away.
        embed_dim: width.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP by the width.
        qkv_bias: bias of the attention's input projections.
        norm_eps: of every LayerNorm.
        stem: "patch" (DeiT) or "conv" (LV-ViT).
        skip_lam: divides both residual branches (2 in LV-ViT).
        aux_head: a second classifier on the patches (LV-ViT).
        sparse: False has no predictors and attends to all pairs: the teacher, and what is trained first.
        attn_keep_rate: share of the keys that a query keeps, one for all blocks or one for each; see ``PairRule``.
        token_keep_rate: share of the patches that the layers of ``token_pruning_loc`` let go on; a number r makes r
            for the second quarter of the blocks, r^2 for the third, r^3 for the fourth; or one for each block.
        token_pruning_loc: blocks that drop tokens.
        reduce_n_factor: tokens by the predictor's reduced tokens.
        reduce_c_factor: a head's channels by the predictor's channels.
        share_inout_proj: one matrix for both of the predictor's token projections.
        basis_threshold, coefficient_top, coefficient_threshold, score_threshold, prune_rows: see ``PairRule``.
        backend: how the pairs are computed, see ``SparsifiedAttention``.
        block: block size of ``backend="blocks"``.
        drop_rate: dropout in MLPs and before the classifier.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Shape: images (batch, in_chans, height, width) to logits (batch, num_classes).

    Raises:
        ValueError: an image size that patches do not divide, rates outside (0, 1], rates for another number of
            blocks, factors that leave the predictor nothing, dropped tokens in a model with an auxiliary head; in
            ``forward``, an image of another size or number of channels.

    Source: arXiv 2303.13755.

    >>> import torch
    >>> model = Sparsifiner(img_size=32, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=10)
    >>> model(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    class_token = True
    stem_pattern, block_pattern = r"^cls_token|^pos_embed|^patch_embed", r"^blocks\.(\d+)"

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: int | float = 4.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        stem: str = "patch",
        skip_lam: int | float = 1.0,
        aux_head: bool = False,
        sparse: bool = True,
        attn_keep_rate: int | float | Sequence[int | float] = 0.25,
        token_keep_rate: int | float | Sequence[int | float] = 1.0,
        token_pruning_loc: Sequence[int] = (),
        reduce_n_factor: int = 6,
        reduce_c_factor: int = 2,
        share_inout_proj: bool = False,
        basis_threshold: int | float = 0.02,
        coefficient_top: int | None = 8,
        coefficient_threshold: int | float = 0.05,
        score_threshold: int | float | None = None,
        prune_rows: bool = False,
        backend: str = "auto",
        block: int = 16,
        drop_rate: int | float = 0.0,
        drop_path_rate: int | float = 0.0,
    ) -> None:
        options = keep_options(locals())
        super().__init__()
        check_choice("stem", stem, STEMS)
        self.image = both_sides(img_size)
        if any(side < patch_size or side % patch_size for side in self.image):
            raise ValueError(f"img_size={img_size} must consist of whole patches of {patch_size} pixels")
        if stem == "conv" and patch_size % 2:
            raise ValueError(f"patch_size={patch_size} must be even with a 'conv' stem, which halves the image")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        if aux_head and token_pruning_loc:
            raise ValueError(f"token_pruning_loc={token_pruning_loc}: a model with an auxiliary head drops no tokens")
        if any(not 0 <= place < depth for place in token_pruning_loc):
            raise ValueError(f"token_pruning_loc={token_pruning_loc} must name blocks below {depth}")
        pair_rates = _per_block("attn_keep_rate", attn_keep_rate, depth)
        if isinstance(token_keep_rate, (int, float)):
            token_keep_rate = [token_keep_rate ** (4 * index // depth) for index in range(depth)]
        token_rates = _per_block("token_keep_rate", token_keep_rate, depth)
        self.patch_grid: Grid = (self.image[0] // patch_size, self.image[1] // patch_size)
        tokens = self.patch_grid[0] * self.patch_grid[1] + 1
        self.patch_embed = (PatchEmbed if stem == "patch" else ConvStem)(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, tokens, embed_dim), std=0.02))

        def attention(index: int) -> SparsifiedAttention:
            rule = PairRule(
                pair_rates[index], score_threshold, basis_threshold, coefficient_top, coefficient_threshold, prune_rows
            )
            predictor = ConnectivityPredictor(
                embed_dim // num_heads, tokens, reduce_channels=reduce_c_factor, reduce_tokens=reduce_n_factor,
                share=share_inout_proj, rule=rule,
            ) if sparse else None  # fmt: skip
            rate = token_rates[index] if index in token_pruning_loc else 1.0
            return SparsifiedAttention(
                embed_dim, num_heads, predictor, token_keep_rate=rate, qkv_bias=qkv_bias, backend=backend, block=block
            )

        self.blocks = nn.ModuleList(
            SparseBlock(embed_dim, attention(index), mlp_ratio, float(drop_rate), path, norm_eps, skip_lam)
            for index, path in enumerate(path_rates(drop_path_rate, depth))
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.aux_head = nn.Linear(embed_dim, num_classes) if aux_head and num_classes else None
        self.finish(in_chans, num_classes, (embed_dim,), options)

    def stages(self, image: Tensor, last: int | None = None) -> list[tuple[Tensor, Grid]]:
        """Tokens, class token in front, after every block up to ``last``, and the sizes of the map."""
        return [(x, self.patch_grid) for x, _ in self._run(image, last, details=False)]

    def inspect(self, image: Tensor) -> Outputs:
        """Logits with everything that the training losses and a look at the masks need."""
        check_image(image, self.in_chans)
        ran = self._run(image, None, details=True)
        x = self.norm(ran[-1][0])
        return Outputs(self.forward_head(x), x[:, 1:], [found for _, found in ran if found is not None])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The class token's logits and, with an auxiliary head, half of each class's best logit over the patches."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or self.aux_head is None:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh classifiers of another width."""
        super().reset_classifier(num_classes, global_pool)
        if self.options["aux_head"]:
            fresh = nn.Linear(self.num_features, num_classes).to(self.cls_token.device) if num_classes else None
            self.aux_head = fresh

    def train_predictors(self, reconstruct: bool) -> None:
        """Choose the phase: True learns the predictors only, by dense attention; False all but the predictors."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(("mask_predictor" in name) == reconstruct)
        for module in self.modules():
            if isinstance(module, SparsifiedAttention):
                module.reconstruct = reconstruct

    def resize(self, state: State, model: nn.Module) -> State:
        """As ``checkpoint_filter_fn``: the predictors belong to one image size too."""
        return checkpoint_filter_fn(state, model, self.position_grids())

    def position_grids(self) -> dict[str, Grid]:
        """The map of the position embedding (behind the class token's)."""
        return {"pos_embed": self.patch_grid}

    def _run(self, image: Tensor, last: int | None, details: bool) -> list[tuple[Tensor, AttentionDetails | None]]:
        if tuple(image.shape[2:]) != self.image:
            raise ValueError(
                f"the model is for images of {self.image[0]} x {self.image[1]}, got {image.shape[2]} x "
                f"{image.shape[3]}; set_input_size changes the model"
            )
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        ran, token_mask, kept = [], None, None
        for block in list(self.blocks)[: None if last is None else last + 1]:
            again = self.grad_checkpointing and self.training
            arguments = (x, token_mask, kept, details)
            x, token_mask, found = recompute(block, *arguments) if again else block(*arguments)
            rate = cast(SparseBlock, block).attn.token_keep_rate
            kept = math.ceil(rate * (x.shape[1] - 1)) if rate < 1 else kept
            ran.append((x, found))
        return ran


def _per_block(name: str, rate: int | float | Sequence[int | float], depth: int) -> list[int | float]:
    rates = [rate] * depth if isinstance(rate, (int, float)) else list(rate)
    if len(rates) != depth:
        raise ValueError(f"{name}={rates} must be one rate or {depth}, one for each block")
    if any(not 0 < value <= 1 for value in rates):
        raise ValueError(f"{name}={rates} must be in (0, 1]")
    return rates


def checkpoint_filter_fn(state: State, model: nn.Module, grids: dict[str, Grid] | None = None) -> State:
    """The authors' layout, or a dense DeiT's or LV-ViT's: predictors that a file lacks stay as they are.

    A predictor of another image size is resized bicubically over its patches, the class token's row kept; not in the
    authors' code. ``grids`` says which map position embeddings belong to; without it, those of another size are square.
    """
    wanted, grid = model.state_dict(), getattr(model, "patch_grid", (1, 1))
    if getattr(model, "num_classes", 1) == 0:
        state = {name: value for name, value in state.items() if not name.startswith(("head.", "aux_head."))}
    if not any("mask_predictor" in name for name in wanted):
        state = {name: value for name, value in state.items() if "mask_predictor" not in name}
    elif not any("mask_predictor" in name for name in state):
        state = state | {name: value for name, value in wanted.items() if "mask_predictor" in name}
    for name in [name for name in state if name.endswith(("proj_n", "proj_back_n"))]:
        value, target = state[name], wanted.get(name)
        side = math.isqrt(max(value.shape[0] - 1, 0))
        old = (grids or {}).get(
            "pos_embed", grid if target is not None and target.shape == value.shape else (side, side)
        )
        if target is None or value.ndim != 2 or old == grid or old[0] * old[1] + 1 != value.shape[0]:
            continue
        # The reduced tokens are as many as N allows, so both axes change.
        image = value[1:].mT.unflatten(1, old)[None].float()
        maps = F.interpolate(image, grid, mode="bicubic", align_corners=False)[0].flatten(1)
        resized = torch.cat([value[:1].float(), maps.mT])
        if target.shape[1] != value.shape[1]:
            resized = F.interpolate(resized[None], target.shape[1], mode="linear", align_corners=False)[0]
        state = state | {name: resized.to(value.dtype)}
    return resize_state(state, model, grids)


VARIANTS = {
    "sparsifiner_deit_small": {},
    "sparsifiner_lvvit_small": {
        "depth": 16, "mlp_ratio": 3.0, "qkv_bias": False, "norm_eps": 1e-5, "stem": "conv", "skip_lam": 2.0,
        "aux_head": True,
    },
}  # fmt: skip
for _name, _options in VARIANTS.items():
    register(
        _name,
        Sparsifiner,
        _options,
        convert=checkpoint_filter_fn,
        stages=_options.get("depth", 12),
        feature_cls="getter",
        crop_pct=0.875,
        fixed_input_size=True,
        min_input_size=(3, 112, 112),
        first_conv="patch_embed.proj" if "stem" not in _options else "patch_embed.conv1",
        classifier="head",
    )
