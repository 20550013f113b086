"""The parts of a MaxViT block: an inverted-bottleneck convolution, then attention in blocks, then attention in grids.

    MBConv:     x <- shortcut(x) + W_3 SE( act BN DW3x3( act BN W_1 BN(x) ) )
    half block: x <- x + g_1 Attn( LN(x) );   x <- x + g_2 MLP( LN(x) )          once in blocks, once in grids

Maps whose sides are no multiples of the partition are padded with zeros at the bottom and the right before a half
block; padded positions are no keys, and are cropped afterwards.

The authors' ("tf") and timm's ("rw", "rmlp") models differ in details that no shape gives away, see ``Flavour``.

Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, LayerScale, Mlp, SqueezeExcite
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.engines.dense import attention
from manyheads.layers.activations import TanhGELU
from manyheads.layers.conv_norm import normed
from manyheads.layers.fused import add, convolve_norm, excite, perceive, project
from manyheads.layers.relative_bias import RelativeBiasMlp, RelativeBiasTable
from manyheads.ops.multi_axis import partition_sizes


@dataclass(frozen=True)
class Flavour:
    """What distinguishes the authors' arithmetic from timm's own variants.

    Attributes:
        bias: how relative positions are learned, see ``manyheads.layers.relative_bias``.
        tanh_gelu: GELU by its tanh approximation everywhere; else SiLU in convolutions and exact GELU in the MLPs.
        heads_last: rows of the fused projection are q of all heads, then k, then v; else q, k, v of head after head.
        expand_output: the bottleneck's hidden width is 4 times its output width; else 4 times its input width.
        same_padding: TensorFlow's "SAME" (stride 2 on even sides pads only right and below); else 1 on every side.
        output_bias: bias on the stem, the shortcut and the last convolution.
        squeeze: width of the squeeze-excitation by the output width ("tf") or the hidden width.
        bn_eps, ln_eps: of the norms.
    """

    bias: str
    tanh_gelu: bool
    heads_last: bool
    expand_output: bool
    same_padding: bool
    output_bias: bool
    squeeze: float
    bn_eps: float
    ln_eps: float

    @property
    def conv_act(self) -> type[nn.Module]:
        """Constructor of the convolutions' activation."""
        return TanhGELU if self.tanh_gelu else nn.SiLU

    @property
    def mlp_act(self) -> type[nn.Module]:
        """Constructor of the MLPs' activation."""
        return TanhGELU if self.tanh_gelu else nn.GELU


_RW = Flavour("table", False, False, False, False, False, 1 / 16, 1e-5, 1e-6)
FLAVOURS = {
    "tf": Flavour("tf", True, True, True, True, True, 1 / 4, 1e-3, 1e-5),
    "rw": _RW,
    "rmlp": Flavour("mlp", False, False, False, False, False, 1 / 16, 1e-5, 1e-6),
}
AXES = ("block", "grid")


class MultiAxisAttention(nn.Module):
    """Block or grid attention with its projections and relative position bias.

    Args:
        dim: width C, a multiple of ``head_dim``.
        partition: (p_x, p_y) tokens of a set, or one integer for both.
        axis: "block" or "grid".
        head_dim: width of a head, 32 in all published models.
        flavour: "tf", "rw" or "rmlp", see ``Flavour``.
        attn_drop: dropout on the attention weights in training, 0 in all published models.
        pad: pad maps that the partition does not divide; False refuses them.

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    Raises:
        ValueError: ``dim`` is not a multiple of ``head_dim``, an unknown axis or flavour, an input of another width,
            and with ``pad=False`` a map that the partition does not divide (the nearest sizes are named).

    Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697, section 3.2.

    >>> import torch
    >>> MultiAxisAttention(64, 7, axis="grid")(torch.randn(2, 14, 20, 64)).shape
    torch.Size([2, 14, 20, 64])
    """

    def __init__(
        self,
        dim: int,
        partition: int | tuple[int, int],
        *,
        axis: str = "block",
        head_dim: int = 32,
        flavour: str = "tf",
        attn_drop: int | float = 0.0,
        pad: bool = True,
    ) -> None:
        super().__init__()
        check_choice("axis", axis, AXES)
        check_choice("flavour", flavour, tuple(FLAVOURS))
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"dim={dim} is not a multiple of head_dim={head_dim}")
        sides = (partition, partition) if isinstance(partition, int) else (int(partition[0]), int(partition[1]))
        self.partition = partition_sizes(sides, sides)
        self.axis, self.heads, self.pad = axis, dim // head_dim, pad
        self.heads_last, kind = FLAVOURS[flavour].heads_last, FLAVOURS[flavour].bias
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = (
            RelativeBiasMlp(sides, self.heads) if kind == "mlp" else RelativeBiasTable(sides, self.heads, flavour=kind)
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        sets, mask = self.divide(x)
        return self.merge(self.attend(sets, mask), x.shape)

    def divide(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sets of a map, (batch * sets, tokens, dim), and which tokens are no padding (None: all of them).

        Raises:
            ValueError: an input of another width or rank, or a map that may not be padded.
        """
        if x.ndim != 4 or x.shape[-1] != self.proj.in_features:
            raise ValueError(f"input must be (batch, X, Y, {self.proj.in_features}), got {tuple(x.shape)}")
        below, right = (-side % part for side, part in zip(x.shape[1:3], self.partition))
        mask = None
        if below or right:
            if not self.pad:
                partition_sizes(self.partition, x.shape[1:3])
            mask = F.pad(x.new_ones(1, *x.shape[1:3], 1, dtype=torch.bool), (0, 0, 0, right, 0, below))
            mask = self._sets(mask.expand(x.shape[0], -1, -1, -1))[..., 0]
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return self._sets(x), mask

    def attend(self, sets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention inside each set of (sets, tokens, dim); ``mask`` (sets, tokens) says which tokens are keys."""
        order = "s n (slot h d) -> slot s h n d" if self.heads_last else "s n (h slot d) -> slot s h n d"
        query, key, value = rearrange(project(self.qkv, sets), order, slot=3, h=self.heads).unbind(0)
        bias = self.rel_pos().to(query.dtype)
        keys = None if mask is None else mask[:, None, None]
        if self.training and self.attn_drop:
            out = _with_dropout(query, key, value, keys, bias, self.attn_drop)
        else:
            out = attention(query, key, value, mask=keys, bias=bias)
        assert isinstance(out, Tensor)
        return project(self.proj, rearrange(out, "s h n d -> s n (h d)"))

    def merge(self, sets: Tensor, shape: torch.Size) -> Tensor:
        """The map of the given (batch, X, Y, dim) again, without its padding."""
        (tall, wide), (_, height, width, _) = self.partition, shape
        down, across = -(-height // tall), -(-width // wide)
        if self.axis == "block":
            order = "(b sx sy) (px py) d -> b (sx px) (sy py) d"
        else:
            order = "(b sx sy) (px py) d -> b (px sx) (py sy) d"
        x = rearrange(sets, order, sx=down, sy=across, px=tall, py=wide)
        return x[:, :height, :width] if x.shape[1:3] != shape[1:3] else x

    def set_partition(self, partition: tuple[int, int]) -> None:
        """Another partition from now on, with the bias resized."""
        self.partition = partition_sizes(partition, partition)
        self.rel_pos.set_partition(self.partition)

    def _sets(self, x: Tensor) -> Tensor:
        if self.axis == "block":
            order = "b (sx px) (sy py) d -> (b sx sy) (px py) d"
        else:
            order = "b (px sx) (py sy) d -> (b sx sy) (px py) d"
        return rearrange(x, order, px=self.partition[0], py=self.partition[1])


class PartitionAttention(nn.Module):
    """Half a block: pre-norm attention in blocks or grids, then a pre-norm MLP, both residual.

    Args:
        dim, partition, axis, head_dim, flavour, attn_drop, pad: as in ``MultiAxisAttention``.
        layer_scale: initial value of the learned factor on both branches; None has none.
        drop_path: stochastic depth of both branches.

    Shape: channels-last (batch, X, Y, dim), returned as it came.

    >>> import torch
    >>> PartitionAttention(64, (3, 5))(torch.randn(2, 6, 10, 64)).shape
    torch.Size([2, 6, 10, 64])
    """

    def __init__(
        self,
        dim: int,
        partition: int | tuple[int, int],
        *,
        axis: str = "block",
        head_dim: int = 32,
        flavour: str = "tf",
        layer_scale: int | float | None = None,
        attn_drop: int | float = 0.0,
        drop_path: int | float = 0.0,
        pad: bool = True,
    ) -> None:
        super().__init__()
        self.attn = MultiAxisAttention(
            dim, partition, axis=axis, head_dim=head_dim, flavour=flavour, attn_drop=attn_drop, pad=pad
        )
        style = FLAVOURS[flavour]
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=style.ln_eps), nn.LayerNorm(dim, eps=style.ln_eps)
        self.mlp = Mlp(dim, 4 * dim, act_layer=style.mlp_act)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, init_values=layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "batch X Y dim"]) -> Float[Tensor, "batch X Y dim"]:
        # Norms and MLP see single tokens, so the whole half runs in the order of the sets: one way in, one way out.
        sets, mask = self.attn.divide(x)
        branch = self.ls1(self.attn.attend(self.norm1(sets), mask))
        sets = add(sets, self._drop(self.drop_path1, branch, x.shape[0]))
        branch = self.ls2(perceive(self.mlp, self.norm2(sets)))
        sets = add(sets, self._drop(self.drop_path2, branch, x.shape[0]))
        return self.attn.merge(sets, x.shape)

    @staticmethod
    def _drop(drop: nn.Module, branch: Tensor, batch: int) -> Tensor:
        """Stochastic depth drops images, not sets of an image."""
        return branch if isinstance(drop, nn.Identity) else drop(branch.unflatten(0, (batch, -1))).flatten(0, 1)


class MBConv(nn.Module):
    """The inverted bottleneck with squeeze-excitation, normed before, in front of the two attentions.

    Args:
        dim: input width.
        out_dim: output width.
        stride: 1 or 2; with 2 the shortcut is a 2 x 2 average pool (ceil(side / 2), padding not counted).
        flavour: as in ``MultiAxisAttention``.
        drop_path: stochastic depth of the branch.
        squeeze: False leaves the squeeze-excitation away (for looking at receptive fields).

    Shape: (batch, dim, X, Y) to (batch, out_dim, ceil(X / stride), ceil(Y / stride)).

    Raises:
        ValueError: another stride, or stride 1 with a change of width.

    >>> import torch
    >>> MBConv(32, 64, stride=2)(torch.randn(2, 32, 9, 12)).shape
    torch.Size([2, 64, 5, 6])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        stride: int = 1,
        flavour: str = "tf",
        drop_path: int | float = 0.0,
        squeeze: bool = True,
    ) -> None:
        super().__init__()
        check_choice("flavour", flavour, tuple(FLAVOURS))
        if stride not in (1, 2) or (stride == 1 and dim != out_dim):
            raise ValueError(f"stride={stride} with widths {dim} -> {out_dim}: stride is 2, or 1 at equal widths")
        style = FLAVOURS[flavour]
        hidden = 4 * (out_dim if style.expand_output else dim)
        self.stride = stride
        self.shortcut = Shortcut(dim, out_dim, bias=style.output_bias) if stride == 2 else nn.Identity()
        self.pre_norm = nn.BatchNorm2d(dim, eps=style.bn_eps)
        self.conv1_1x1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden, eps=style.bn_eps)
        self.conv2_kxk = Conv3x3(hidden, hidden, stride=stride, groups=hidden, bias=False, same=style.same_padding)
        self.norm2 = nn.BatchNorm2d(hidden, eps=style.bn_eps)
        rd = int(style.squeeze * (out_dim if style.expand_output else hidden))
        self.se = SqueezeExcite(hidden, rd_channels=rd, act_layer=nn.SiLU) if squeeze else nn.Identity()
        self.conv3_1x1 = nn.Conv2d(hidden, out_dim, 1, bias=style.output_bias)
        self.act = style.conv_act()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Float[Tensor, "batch dim X Y"]) -> Float[Tensor, "batch out_dim rows columns"]:
        y = convolve_norm(self.conv1_1x1, self.norm1, x, self.act, before=self.pre_norm)
        y = normed(self.conv1_1x1, self.norm1, self.pre_norm(x), self.act) if y is None else y
        y = excite(self.se, self.conv2_kxk(y, self.norm2, self.act))
        return add(self.shortcut(x), self.drop_path(normed(self.conv3_1x1, None, y)))


class Shortcut(nn.Module):
    """2 x 2 average pooling that leaves padding out of the mean, then a 1 x 1 convolution if the width changes."""

    def __init__(self, dim: int, out_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.expand = nn.Conv2d(dim, out_dim, 1, bias=bias) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, ceil_mode=True)
        return normed(self.expand, None, x) if isinstance(self.expand, nn.Conv2d) else x


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution padded by 1, or as TensorFlow's "SAME" pads: on even sides with stride 2 only at the end."""

    def __init__(
        self, dim: int, out_dim: int, *, stride: int = 1, groups: int = 1, bias: bool = True, same: bool = False
    ) -> None:
        super().__init__(dim, out_dim, 3, stride=stride, padding=1, groups=groups, bias=bias)
        self.same = same

    def forward(self, input: Tensor, norm: nn.Module | None = None, act: nn.Module | None = None) -> Tensor:
        even = [self.same and self.stride[0] == 2 and side % 2 == 0 for side in input.shape[2:]]
        # With padding 2 the second output reads what "SAME" gives the first: dropping one is cheaper than padding the
        # end only, which copies the map.
        tall, wide = even
        padding = (1 + tall, 1 + wide)
        out = convolve_norm(self, norm, input, act, padding=padding)
        if out is not None:
            return out[:, :, int(tall) :, int(wide) :]
        out = F.conv2d(input, self.weight, self.bias, self.stride, padding, 1, self.groups)
        out = out[:, :, int(tall) :, int(wide) :]
        out = norm(out) if norm else out
        return act(out) if act else out


def _with_dropout(query, key, value, keys, bias, rate) -> Tensor:
    scores = (query.float() * query.shape[-1] ** -0.5) @ key.float().mT + bias.float()
    if keys is not None:
        # A set of padding alone gets equal scores first and zero weights after, so that no row is all -inf.
        scores = torch.where(keys | ~keys.any(-1, keepdim=True), scores, -torch.inf)
    weights = scores.softmax(dim=-1)
    if keys is not None:
        weights = weights.masked_fill(~keys, 0)
    return (F.dropout(weights, rate) @ value.float()).to(query.dtype)
