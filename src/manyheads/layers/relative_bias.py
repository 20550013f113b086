"""The learned bias of relative positions, stored as a table of offsets or produced by a small network.

    "tf":    table[head, key - query], one entry for every offset (the authors' MaxViT)
    "table": the same with offsets query - key, stored flat with heads last (timm's variants, Swin)
    "mlp":   W_2 ReLU( W_1 c ),   c = sign(d) ln(1 + |d|) of the offset d = query - key ("rmlp" variants)

All three answer ``forward()`` with the bias of every (query, key) pair of a set of p_x x p_y tokens.

Sources: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697; "Swin Transformer V2", arXiv 2111.09883.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn

from manyheads.engines.common import check_choice
from manyheads.ops.multi_axis import relative_bias, resize_relative_table

HIDDEN = 512
DROPOUT = 0.125


class RelativeBiasTable(nn.Module):
    """A bias for every head and offset.

    Args:
        partition: (p_x, p_y).
        heads: attention heads.
        flavour: "tf" stores (heads, 2 p_x - 1, 2 p_y - 1) by key - query; "table" stores the offsets flattened,
            (offsets, heads), by query - key.

    Source: "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697.

    >>> RelativeBiasTable((3, 5), heads=2)().shape
    torch.Size([2, 15, 15])
    """

    def __init__(self, partition: tuple[int, int], heads: int, *, flavour: str = "tf") -> None:
        super().__init__()
        check_choice("flavour", flavour, ("tf", "table"))
        self.partition, self.heads, self.flavour = partition, heads, flavour
        rows, columns = (2 * side - 1 for side in partition)
        shape = (heads, rows, columns) if flavour == "tf" else (rows * columns, heads)
        self.relative_position_bias_table = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)

    def offsets(self) -> Float[Tensor, "heads rows columns"]:
        """The table by key - query, whatever way it is stored."""
        table = self.relative_position_bias_table
        if self.flavour == "tf":
            return table
        return flat_to_offsets(table, self.partition)

    def forward(self) -> Float[Tensor, "heads tokens tokens"]:
        return relative_bias(self.offsets(), self.partition)

    @torch.no_grad()
    def set_partition(self, partition: tuple[int, int]) -> None:
        """Resize the table bilinearly to another partition."""
        resized = resize_relative_table(self.offsets(), partition)
        if self.flavour == "table":
            resized = offsets_to_flat(resized)
        self.partition = partition
        self.relative_position_bias_table = nn.Parameter(resized.clone())


class RelativeBiasMlp(nn.Module):
    """A bias computed from the logarithm of the offset, which therefore fits any partition without resizing.

    Args:
        partition: (p_x, p_y).
        heads: attention heads.
        hidden: width between its two linear maps; an eighth of it is dropped in training.

    Source: "Swin Transformer V2", arXiv 2111.09883, without its sigmoid and gain, as in timm's MaxViT variants.

    >>> RelativeBiasMlp((3, 5), heads=2)().shape
    torch.Size([2, 15, 15])
    """

    def __init__(self, partition: tuple[int, int], heads: int, *, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.partition, self.heads = partition, heads
        self.mlp = Mlp(2, hidden, heads, act_layer=nn.ReLU, drop=(DROPOUT, 0.0))

    def forward(self) -> Float[Tensor, "heads tokens tokens"]:
        weight = self.mlp.fc1.weight
        rows, columns = (_log_offsets(side, weight) for side in self.partition)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        table = self.mlp(grid).permute(2, 0, 1)
        return relative_bias(table.flip(1, 2), self.partition)

    def set_partition(self, partition: tuple[int, int]) -> None:
        """Answer for another partition from now on."""
        self.partition = partition


def flat_to_offsets(table: Tensor, partition: tuple[int, int]) -> Tensor:
    """(offsets query - key, heads) as (heads, rows, columns) by key - query."""
    rows, columns = (2 * side - 1 for side in partition)
    return table.view(rows, columns, -1).permute(2, 0, 1).flip(1, 2)


def offsets_to_flat(table: Tensor) -> Tensor:
    """The inverse of :func:`flat_to_offsets`."""
    return table.flip(1, 2).permute(1, 2, 0).flatten(0, 1)


def _log_offsets(side: int, like: Tensor) -> Tensor:
    offsets = torch.arange(1 - side, side, device=like.device, dtype=torch.float32)
    return (offsets.sign() * offsets.abs().log1p()).to(like.dtype)
