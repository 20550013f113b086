"""InLine attention with its projections and its local residual, a 3x3 kernel that each sample makes for itself.

    out  = proj( merge_heads(inline_attention(Q, K, V)) + DWConv3x3(V; R(z)) )
    R(z) = W_2 GELU(W_1 z),   z = mean over tokens of x,   W_1, W_2 in as many groups as there are heads

Source: "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv 2412.06590.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.engines.common import accumulation_dtype, check_choice
from manyheads.layers.cross_shaped import stripe_map
from manyheads.ops.inline import KERNELS, inline_attention

KERNEL = 3


class InLineAttention(nn.Module):
    """InLine attention as a layer on the tokens of a map.

    Args:
        dim: width C, a multiple of ``heads``.
        heads: attention heads.
        class_token: the first token stands outside of the map: it attends and enters z, but has no local term.
        fused: one projection ``qkv`` (DeiT, Swin) or ``q`` and ``kv`` (PVT).
        qkv_bias: bias of the input projections.
        kernel: phi of ``manyheads.ops.inline.inline_attention``.
        local_residual: the local term (on in all published models).
        proj_drop: dropout of the output.

    Shape: (batch, tokens, dim) of a map (H, W), one more token with ``class_token``; returned as it came.

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``, an unknown kernel; in ``forward``, another width, or tokens
            that do not fill the map.

    Source: "Bridging the Divide", arXiv 2412.06590, section 4.

    >>> import torch
    >>> InLineAttention(96, heads=3)(torch.randn(2, 35, 96), (5, 7)).shape
    torch.Size([2, 35, 96])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        class_token: bool = False,
        fused: bool = True,
        qkv_bias: bool = True,
        kernel: str = "identity",
        local_residual: bool = True,
        proj_drop: int | float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        check_choice("kernel", kernel, KERNELS)
        self.dim, self.heads, self.class_token, self.fused, self.kernel = dim, heads, class_token, fused, kernel
        if fused:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.residual = kernel_maker(dim, heads) if local_residual else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "batch tokens dim"]:
        first = int(self.class_token)
        if x.ndim != 3 or x.shape[-1] != self.dim or x.shape[1] != grid[0] * grid[1] + first:
            extra = " and a class token" if first else ""
            raise ValueError(
                f"x must be (batch, tokens, {self.dim}) with {grid[0]} x {grid[1]} tokens{extra}, got {tuple(x.shape)}"
            )
        query, key, value = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), *self.kv(x).chunk(2, -1))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (query, key, value))
        out = rearrange(inline_attention(q, k, v, kernel=self.kernel), "b h n d -> b n (h d)")
        if self.residual is not None:
            local = local_residual(value[:, first:], grid, _mean(x), self.residual)
            out = torch.cat([out[:, :1], out[:, 1:] + local], dim=1) if first else out + local
        return self.proj_drop(self.proj(out))


class InLineStripeAttention(nn.Module):
    """InLine attention on projected q, k, v over a whole map, with CSwin's local position encoding.

    The kernels belong to a sample, not to a stripe, so this branch exists only for stripes as large as the map.

    Args:
        dim: width of this branch, a multiple of ``heads``.
        heads: heads of this branch.
        kernel: as in :class:`InLineAttention`.
        local_residual: as in :class:`InLineAttention`.

    Shape: ``qkv`` (3, batch, tokens, dim) of a map (H, W) and ``mean`` (batch, dim), the mean over tokens of the
    block's input before its norm; to (batch, tokens, dim).

    Raises:
        ValueError: ``dim`` is no multiple of ``heads``, an unknown kernel.

    Source: "Bridging the Divide", arXiv 2412.06590 (InLine-CSwin).

    >>> import torch
    >>> InLineStripeAttention(32, heads=2)(torch.randn(3, 1, 64, 32), (8, 8), torch.randn(1, 32)).shape
    torch.Size([1, 64, 32])
    """

    def __init__(self, dim: int, heads: int, *, kernel: str = "identity", local_residual: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}")
        check_choice("kernel", kernel, KERNELS)
        self.heads, self.kernel = heads, kernel
        self.get_v = nn.Conv2d(dim, dim, KERNEL, padding=1, groups=dim)
        self.residual = kernel_maker(dim, heads) if local_residual else None

    def forward(
        self,
        qkv: Float[Tensor, "3 batch tokens dim"],
        grid: tuple[int, int],
        mean: Float[Tensor, "batch dim"],
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = rearrange(qkv, "slot b n (h d) -> slot b h n d", h=self.heads).unbind(0)
        out = rearrange(inline_attention(q, k, v, kernel=self.kernel), "b h n d -> b n (h d)")
        out = out + self.get_v(stripe_map(qkv[2], grid)).flatten(2).transpose(1, 2)
        return out if self.residual is None else out + local_residual(qkv[2], grid, mean, self.residual)


def kernel_maker(dim: int, heads: int) -> nn.Sequential:
    """R: from a mean token to one 3x3 kernel a channel; a group sees the channels of one head."""
    return nn.Sequential(
        nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, dim * KERNEL**2, 1, groups=heads)
    )


def local_residual(
    value: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    mean: Float[Tensor, "batch dim"],
    residual: nn.Module,
) -> Float[Tensor, "batch tokens dim"]:
    """The values convolved, zero padded, with the kernels that ``residual`` makes of the mean token.

    >>> import torch
    >>> local_residual(torch.randn(2, 12, 8), (3, 4), torch.randn(2, 8), kernel_maker(8, 2)).shape
    torch.Size([2, 12, 8])
    """
    kernels = rearrange(residual(mean[:, :, None])[:, :, 0], "b (c k) -> k b 1 1 c", k=KERNEL**2)
    maps = F.pad(value.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    # A convolution with batch x dim groups is slow everywhere; nine shifted products are not, and compile to one loop.
    rows, columns = grid
    out = maps[:, :rows, :columns] * kernels[0]
    for place in range(1, KERNEL**2):
        row, column = divmod(place, KERNEL)
        out = torch.addcmul(out, maps[:, row : row + rows, column : column + columns], kernels[place])
    return out.flatten(1, 2)


def _mean(x: Tensor) -> Tensor:
    return x.mean(1, dtype=accumulation_dtype(x.dtype)).to(x.dtype)
