"""Bi-level routing attention: regions choose regions, then tokens attend to the tokens of the chosen regions.

A map of X x Y positions is cut into regions. With q-bar and k-bar the means of query and key over the real positions of
a region (heads concatenated), for query region i and the tokens t in it::

    S = q-bar k-bar^T                                  (regions x regions)
    I[i] = the top-k columns of S[i]                   (one choice for all heads)
    out[t] = softmax( scale * q[t] K_I[i]^T ) V_I[i]   (keys and values of the chosen regions, concatenated)

Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyheads.engines.common import accumulation_dtype, check_choice, check_qkv

POOLINGS = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")
# Gathered keys (and as many values) that may exist at once, in numbers: 64 MiB in float32. Beyond it, query regions go
# in chunks that are gathered again in the backward pass.
GATHER_LIMIT = 1 << 24
# Below this many tokens a region, three batched products beat the start-up cost of a fused kernel per region.
SMALL_REGION = 16


class Routing(NamedTuple):
    """What the first level decided.

    Attributes:
        index: (batch, query regions, topk) chosen key regions, row-major, best first.
        scores: (batch, query regions, key regions) unscaled products of the descriptors.
    """

    index: Int[Tensor, "batch query_regions topk"]
    scores: Float[Tensor, "batch query_regions key_regions"]


def bilevel_routing_attention(
    query: Float[Tensor, "batch heads x y head_dim"],
    key: Float[Tensor, "batch key_heads key_x key_y head_dim"],
    value: Float[Tensor, "batch key_heads key_x key_y value_dim"],
    *,
    regions: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    descriptors: tuple[Tensor, Tensor] | None = None,
    soft_routing: bool = False,
    diff_routing: bool = False,
    kv_downsample: str = "identity",
    kv_size: int | None = None,
    return_routing: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Routing]:
    """Attention to the ``topk`` most related regions of a map, chosen anew for every region of the query.

    A region measures ``floor(X / regions) x floor(Y / regions)``. Where that does not divide the map, there are more
    regions than asked for and the last ones are filled up with zeros: as in the authors' current code the filling
    keys are not masked (each adds exp(0) to the denominator), but the descriptors average real positions only.

    Args:
        query: (batch, heads, X, Y, head_dim).
        key: (batch, heads, X', Y', head_dim); another map than the query's is the cross form, cut into regions of
            its own size.
        value: (batch, heads, X', Y', value_dim); value_dim may differ from head_dim (the paper's own qk width).
        regions: n, regions per side, or (n_x, n_y).
        topk: k, regions that each query region attends to.
        scale: sigma, factor on the token scores; None means ``(heads * head_dim) ** -0.5``, the full width: that is
            what the released models use, although the paper divides by the root of a head's width.
        descriptors: routing descriptors (batch, query regions, width) and (batch, key regions, width) to use instead
            of the region means, for a learnt router ("param_routing").
        soft_routing: multiply the gathered keys and values of a region by its weight, a softmax over the ``topk``
            chosen scores times ``scale``.
        diff_routing: let gradients pass from the soft weights into the descriptors; needs ``soft_routing``.
        kv_downsample: pooling of key and value inside each region, after the routing: "identity"; "ada_avgpool" or
            "ada_maxpool", to ``kv_size`` x ``kv_size`` tokens a region; "avgpool" or "maxpool", by a ratio ``kv_size``.
        kv_size: see ``kv_downsample``.
        return_routing: also return the ``Routing``.
        backend: "reference" (the equation, region by region), "gather" (batched gather and fused attention; memory
            bounded by ``GATHER_LIMIT`` gathered numbers, beyond which chunks are recomputed in the backward pass) or
            "auto", the fastest that serves, which is "gather".

    Returns:
        (batch, heads, X, Y, value_dim); with ``return_routing`` a pair of it and the ``Routing``.

    Raises:
        TypeError: mixed or integer dtypes.
        ValueError: shapes that do not fit; grouped key/value heads (routing concatenates the heads of query and key,
            so both need the same); more regions than positions; ``topk`` outside 1 ... number of key regions;
            ``diff_routing`` without ``soft_routing``; pooling that is unknown, lacks ``kv_size`` or leaves no token.

    Source: "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810, section 3.2.

    >>> import torch
    >>> x = torch.randn(1, 2, 14, 14, 8)
    >>> out, routing = bilevel_routing_attention(x, x, x, regions=7, topk=4, return_routing=True)
    >>> out.shape, routing.index.shape
    (torch.Size([1, 2, 14, 14, 8]), torch.Size([1, 49, 4]))
    """
    check_choice("backend", backend, ("auto", "reference", "gather"))
    check_choice("kv_downsample", kv_downsample, POOLINGS)
    _check_maps(query, key, value)
    if diff_routing and not soft_routing:
        raise ValueError("diff_routing=True needs soft_routing=True: hard differentiable routing is not defined")
    if (kv_downsample == "identity") != (kv_size is None):
        raise ValueError(f"kv_downsample={kv_downsample!r} with kv_size={kv_size}: a pooling, and only it, has a size")
    sigma = (query.shape[1] * query.shape[-1]) ** -0.5 if scale is None else float(scale)
    query_size, key_size = _region_size(query, regions, "query"), _region_size(key, regions, "key")

    if descriptors is None:
        descriptors = region_means(query, regions), region_means(key, regions)
    scores, index, weights = _route(*descriptors, topk=topk, scale=sigma, differentiable=diff_routing)
    query_tiles, grid = _tiles(query, query_size)
    tiles = [_tiles(tensor, key_size) for tensor in (key, value)]
    _check_descriptors(scores, math.prod(grid), math.prod(tiles[0][1]))
    key_tiles, value_tiles = (_pool(tile, key_size, kv_downsample, kv_size) for tile, _ in tiles)

    attend = _reference if backend == "reference" else _gathered
    out = attend(query_tiles, key_tiles, value_tiles, index, weights if soft_routing else None, sigma)
    pattern = "b h (gx gy) (rx ry) d -> b h (gx rx) (gy ry) d"
    out = rearrange(out, pattern, gx=grid[0], gy=grid[1], rx=query_size[0], ry=query_size[1])
    out = out[:, :, : query.shape[2], : query.shape[3]]
    return (out, Routing(index, scores)) if return_routing else out


def region_means(
    tensor: Float[Tensor, "batch heads x y head_dim"], regions: int | tuple[int, int]
) -> Float[Tensor, "batch regions width"]:
    """The descriptor of every region, row-major: the mean of its real positions, heads concatenated.

    Summed in float32 (float64 stays) and returned so.

    >>> import torch
    >>> region_means(torch.ones(1, 2, 23, 20, 4), 5).shape
    torch.Size([1, 30, 8])
    """
    size = _region_size(tensor, regions, "tensor")
    tiles, _ = _tiles(tensor.to(accumulation_dtype(tensor.dtype)), size)
    real, _ = _tiles(tensor.new_ones(1, 1, *tensor.shape[2:4], 1, dtype=tiles.dtype), size)
    return rearrange(tiles.sum(3) / real.sum(3), "b h r d -> b r (h d)")


def _route(
    query: Tensor, key: Tensor, *, topk: int, scale: float, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not differentiable:
        query, key = query.detach(), key.detach()
    scores = query @ key.transpose(-2, -1)
    if not 1 <= topk <= scores.shape[-1]:
        raise ValueError(f"topk={topk} does not fit {scores.shape[-1]} key regions; it must be 1 ... that number")
    best, index = scores.topk(topk, dim=-1)
    return scores, index, (scale * best).softmax(dim=-1)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, weights: Tensor | None, scale: float
) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    samples = []
    for b in range(query.shape[0]):
        rows = []
        for i in range(query.shape[2]):
            keys, values = (tensor[b][:, index[b, i]].to(wide) for tensor in (key, value))
            if weights is not None:
                soft = weights[b, i][None, :, None, None]
                keys, values = keys * soft, values * soft
            tokens = scale * query[b, :, i].to(wide) @ keys.flatten(1, 2).transpose(-2, -1)
            rows.append(tokens.softmax(dim=-1) @ values.flatten(1, 2))
        samples.append(torch.stack(rows, dim=1))
    if not samples:
        return query.new_zeros(*query.shape[:-1], value.shape[-1])
    return torch.stack(samples).to(query.dtype)


def _gathered(query: Tensor, key: Tensor, value: Tensor, index: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    batch, heads, count = query.shape[:3]
    topk = index.shape[-1]
    width = max(key.shape[-1], value.shape[-1])
    chunk = max(1, GATHER_LIMIT // max(1, batch * heads * topk * key.shape[3] * width))
    if chunk >= count:
        return _attend(query, key, value, index, weights, scale)
    again = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    parts = []
    for start in range(0, count, chunk):
        some = slice(start, start + chunk)
        soft = None if weights is None else weights[:, some]
        arguments = (query[:, :, some], key, value, index[:, some], soft, scale)
        parts.append(checkpoint(_attend, *arguments, use_reentrant=False) if again else _attend(*arguments))
    return torch.cat(parts, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, index: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    batch, heads, count, tokens = query.shape[:4]
    keys, values = _gather(key, index, weights), _gather(value, index, weights)
    # Half precision goes through the fused kernels whatever the size, because they sum in float32.
    if tokens < SMALL_REGION and query.dtype in (torch.float32, torch.float64) and query.device.type == "cpu":
        return torch.matmul((query * scale).matmul(keys.transpose(-2, -1)).softmax(dim=-1), values)
    query, keys, values = (tensor.reshape(batch, heads * count, *tensor.shape[3:]) for tensor in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values, scale=scale).unflatten(1, (heads, count))


def _gather(tiles: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """(batch, heads, query regions, topk * tokens, width): the chosen tiles side by side."""
    batch, heads, count, tokens, width = tiles.shape
    first = torch.arange(batch * heads, device=tiles.device).view(batch, heads, 1, 1) * count
    # Whole tiles as rows of a table: index_select and its backward beat advanced indexing by far.
    rows = (index[:, None] + first).flatten()
    table = tiles.reshape(batch * heads * count, tokens * width)
    chosen = table.index_select(0, rows).view(batch, heads, *index.shape[1:], tokens, width)
    if weights is not None:
        chosen = (chosen * weights[:, None, :, :, None, None]).to(tiles.dtype)
    return chosen.flatten(3, 4)


def _tiles(tensor: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """(batch, heads, regions, tokens, width) after filling up with zeros, and how many regions lie along each axis."""
    x, y = tensor.shape[2:4]
    below, right = -x % size[0], -y % size[1]
    if below or right:
        tensor = F.pad(tensor, (0, 0, 0, right, 0, below))
    tiles = rearrange(tensor, "b h (gx rx) (gy ry) d -> b h (gx gy) (rx ry) d", rx=size[0], ry=size[1])
    return tiles, ((x + below) // size[0], (y + right) // size[1])


def _pool(tiles: Tensor, size: tuple[int, int], mode: str, amount: int | None) -> Tensor:
    if amount is None:
        return tiles
    if amount < 1 or (not mode.startswith("ada") and amount > min(size)):
        raise ValueError(f"kv_size={amount} leaves no token of a region of {size[0]} x {size[1]}")
    batch, heads, count = tiles.shape[:3]
    images = rearrange(tiles, "b h r (x y) d -> (b h r) d x y", x=size[0], y=size[1])
    pool = {
        "ada_avgpool": F.adaptive_avg_pool2d,
        "ada_maxpool": F.adaptive_max_pool2d,
        "avgpool": F.avg_pool2d,
        "maxpool": F.max_pool2d,
    }[mode]
    return rearrange(pool(images, amount), "(b h r) d x y -> b h r (x y) d", b=batch, h=heads, r=count)


def _region_size(tensor: Tensor, regions: int | tuple[int, int], name: str) -> tuple[int, int]:
    n_x, n_y = (regions, regions) if isinstance(regions, int) else regions
    x, y = tensor.shape[2:4]
    if not (1 <= n_x <= x and 1 <= n_y <= y):
        raise ValueError(f"regions={regions} does not fit {name} of {x} x {y} positions: a region would be empty")
    return x // n_x, y // n_y


def _check_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_qkv(query, key, value, ndim=5)
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads but query {query.shape[1]}: routing compares regions over all heads, so "
            "grouped key/value heads are not defined; repeat them first"
        )


def _check_descriptors(scores: Tensor, query_regions: int, key_regions: int) -> None:
    if tuple(scores.shape[1:]) != (query_regions, key_regions):
        raise ValueError(
            f"descriptors are of {scores.shape[1]} and {scores.shape[2]} regions, the maps have {query_regions} "
            f"and {key_regions}"
        )
