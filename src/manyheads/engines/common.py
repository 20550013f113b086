"""What every engine checks and how every engine counts heads: one place, so that all of them agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# A predicate says which pairs attend: ``predicate(batch, head, query, key) -> bool tensor``, all four arguments being
# integer tensors that broadcast against each other (the convention of FlexAttention's mask_mod).
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """``head_dim ** -0.5`` for None; any number, zero included, is taken as it is."""
    return head_dim**-0.5 if scale is None else float(scale)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: float64 stays, everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_qkv(query: Tensor, key: Tensor, value: Tensor, *, ndim: int = 4, same_width: bool = True) -> None:
    """Raise unless query, key, value fit together as (batch, heads, tokens, head_dim) tensors.

    Grouped-query heads are allowed: the heads of key and value divide those of query, head h of the query reading
    key/value head ``h // (query_heads / key_heads)``. ``same_width=False`` drops the demand that query and key have
    the same head_dim.

    Raises:
        TypeError: not tensors, nested tensors, an integer dtype, or mixed dtypes.
        ValueError: ranks, batches, heads, lengths, widths or devices that do not fit.
    """
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise TypeError(f"{name} is a nested tensor; pass packed tokens with cumulative lengths instead")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key, value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"query, key, value must share a device, got {query.device}, {key.device}, {value.device}")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"batch sizes differ: query {query.shape[0]}, key {key.shape[0]}, value {value.shape[0]}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key has {key.shape[1]} heads but value has {value.shape[1]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"key heads ({key.shape[1]}) must divide query heads ({query.shape[1]})")
    if key.shape[2:-1] != value.shape[2:-1]:
        raise ValueError(f"key has {tuple(key.shape[2:-1])} tokens but value has {tuple(value.shape[2:-1])}")
    if same_width and query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query has head_dim {query.shape[-1]} but key has {key.shape[-1]}")


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated to ``heads`` query heads (a view where nothing is repeated)."""
    groups = heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float, dropout: float = 0.0
) -> Tensor:
    """torch's fused attention (SDPA), with as many query heads to a key head as there are."""
    grouped = shares_keys(query, key)
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=grouped)


def shares_keys(query: Tensor, key: Tensor) -> bool:
    """Whether several query heads read one key head, as a plain bool even where the compiler leaves heads open.

    >>> shares_keys(torch.zeros(1, 4, 3, 2), torch.zeros(1, 2, 3, 2))
    True
    """
    # torch's fused attention takes no symbolic bool, which the comparison alone would be; a branch settles it.
    return True if query.shape[1] != key.shape[1] else False  # noqa: SIM210


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) where one number stands for both, or where two are given.

    Raises:
        ValueError: another number of sides.

    >>> both_sides(7), both_sides([7, 14])
    ((7, 7), (7, 14))
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"a size is one number or (height, width), got {sides}")
    return int(sides[0]), int(sides[1])
