"""Token merging: the tokens of a map that resemble a neighbour are averaged into it, and put back afterwards.

Destinations are one token of every cell of a grid, all others are sources. Each source has a best destination by cosine
similarity; of all sources, the r most similar ones are averaged into theirs (the destination counts as well)::

    merge(x, r)   = [ the other sources, by falling similarity | destinations, averaged, in raster order ]
    unmerge(y, r) = every merged source receives its destination's value

Source: "Token Merging for Fast Stable Diffusion", arXiv 2303.17604, as "Agent Attention" (arXiv 2312.08874) uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class TokenMatching:
    """Which source goes where, for every sample.

    Attributes:
        sources: positions of the sources by falling similarity, (batch, sources).
        best: for each of them, the index of its destination, (batch, sources).
        destinations: positions of the destinations in raster order, (destinations,).
    """

    sources: Tensor
    best: Tensor
    destinations: Tensor

    def count(self, ratio: float) -> int:
        """r: how many tokens are merged at this ratio, which the number of sources bounds."""
        return min(self.sources.shape[1], int((self.sources.shape[1] + len(self.destinations)) * ratio))

    def merge(self, x: Float[Tensor, "batch tokens dim"], count: int) -> Float[Tensor, "batch fewer dim"]:
        """``count`` tokens fewer: the sources left over, then the destinations with what was averaged into them."""
        left = _take(x, self.sources[:, count:])
        kept = x[:, self.destinations]
        gone = _take(x, self.sources[:, :count])
        index = self.best[:, :count, None].expand(-1, -1, x.shape[-1])
        return torch.cat([left, kept.scatter_reduce(1, index, gone, reduce="mean")], dim=1)

    def unmerge(self, y: Float[Tensor, "batch fewer dim"], count: int) -> Float[Tensor, "batch tokens dim"]:
        """All tokens back at their positions, merged ones as copies of their destinations."""
        here = self.sources.shape[1] - count
        left, kept = y[:, :here], y[:, here:]
        back = _take(kept, self.best[:, :count])
        index = torch.cat([self.sources, self.destinations.expand(len(y), -1)], dim=1)[..., None]
        values = torch.cat([back, left, kept], dim=1)
        return torch.empty_like(values).scatter(1, index.expand(-1, -1, y.shape[-1]), values)


def match_tokens(
    tokens: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    cell: tuple[int, int],
    *,
    generator: torch.Generator | None = None,
) -> TokenMatching:
    """Pair the tokens of a map by the cosine of ``tokens``.

    Args:
        tokens: (batch, tokens, dim) of a map (H, W) in raster order; what they are compared by.
        grid: (H, W).
        cell: (rows, columns) of the cells; each whole cell has one destination.
        generator: where in its cell the destination stands, the same for all samples; None takes the first corner.

    Raises:
        ValueError: tokens that do not fill the map, a cell that is empty or larger than the map.

    Source: "Token Merging for Fast Stable Diffusion", arXiv 2303.17604.

    >>> import torch
    >>> x = torch.randn(2, 64, 32)
    >>> matching = match_tokens(x, (8, 8), (4, 4))
    >>> matching.merge(x, 25).shape, matching.unmerge(matching.merge(x, 25), 25).shape
    (torch.Size([2, 39, 32]), torch.Size([2, 64, 32]))
    """
    (rows, columns), (tall, wide) = grid, cell
    if tokens.shape[1] != rows * columns:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a map of {rows} x {columns}")
    if not (1 <= tall <= rows and 1 <= wide <= columns):
        raise ValueError(f"cells of {tall} x {wide} tokens do not fit a map of {rows} x {columns}")
    device = tokens.device
    corners = (
        torch.arange(rows // tall, device=device)[:, None] * tall * columns
        + torch.arange(columns // wide, device=device) * wide
    )
    if generator is not None:
        place = torch.randint(tall * wide, corners.shape, generator=generator, device=generator.device).to(device)
        corners = corners + place // wide * columns + place % wide
    destinations = corners.flatten().sort().values
    others = torch.ones(rows * columns, dtype=torch.bool, device=device)
    others[destinations] = False
    sources = others.nonzero().flatten()
    # A token of zeros resembles nothing; all others are divided by exactly their length.
    direction = tokens / tokens.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny)
    similarity, best = (direction[:, sources] @ direction[:, destinations].transpose(1, 2)).max(dim=-1)
    # Stable, so that equal similarities keep the order of the map on every machine.
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    return TokenMatching(sources[order], best.gather(1, order), destinations)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
