"""Trees of parts that emerge in a DependencyViT: which token is a part of which, drawn on the image.

The soft dependency masks D of the chosen layers are averaged (a pair counts in the layers where both tokens are still
there), and every token j gets one parent::

    argmax         parent(j) = argmax_{i != j} D[i, j]             may run in circles
    arborescence   the tree of largest sum D[parent(j), j]         (Chu-Liu/Edmonds)

with the root at the token that receives most, argmax_i sum_j D[i, j]. The branches below the root's children are parts.

Source: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", arXiv 2304.03282; its authors
published no code for the trees, so the two rules above are this library's.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from manyheads.engines.common import check_choice
from manyheads.models.vision.dependency import DependencyViT
from manyheads.models.vision.features import stage_indices

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.table import Table

METHODS = ("arborescence", "argmax")


@dataclass
class DependencyTree:
    """The tree of one image.

    Attributes:
        parents: the parent of every token, row by row; the root is its own.
        root: the token that receives most.
        strength: how much every token sends to its parent; 0 for the root.
        message: what every token had left to send in the last layer that had it; small for leaves.
        grid: sides of the map of tokens.
    """

    parents: list[int]
    root: int
    strength: list[float]
    message: list[float]
    grid: tuple[int, int]

    def ancestors(self, token: int) -> list[int]:
        """The token, its parent and so on to the root, or until the chain runs in a circle."""
        chain = [token]
        while self.parents[chain[-1]] not in chain:
            chain.append(self.parents[chain[-1]])
        return chain

    def parts(self) -> list[int]:
        """For every token the child of the root in whose branch it is; the root is its own part.

        Tokens whose chain runs in a circle ("argmax") belong to the smallest token of the circle.
        """
        found = []
        for token in range(len(self.parents)):
            chain = self.ancestors(token)
            if chain[-1] == self.root:
                found.append(chain[-2] if len(chain) > 1 else self.root)
            else:
                found.append(min(chain[chain.index(self.parents[chain[-1]]) :]))
        return found

    def depth(self) -> int:
        """Steps from the deepest token to the end of its chain."""
        return max(len(self.ancestors(token)) for token in range(len(self.parents))) - 1

    def table(self, top: int = 8) -> Table:
        """The largest parts as a rich table."""
        from rich.table import Table

        parts = self.parts()
        sizes = {part: parts.count(part) for part in sorted(set(parts) - {self.root})}
        largest = sorted(sizes, key=lambda part: -sizes[part])[:top]
        table = Table(
            title=f"{len(sizes)} parts below the root at {self._place(self.root)}",
            caption=f"{len(parts)} tokens, {self.depth()} generations; rows and columns of {self.grid}.",
        )
        for name in ("part", "row, column", "tokens", "sends to root"):
            table.add_column(name, justify="right")
        for rank, part in enumerate(largest, 1):
            table.add_row(str(rank), self._place(part), str(sizes[part]), f"{self.strength[part]:.3f}")
        return table

    def plot(self, image: Tensor | None = None, top: int = 8) -> go.Figure:
        """The tree over the image: lines from tokens to their parents, the largest parts in colours.

        Args:
            image: (3 or 1, height, width), uint8 or in [0, 1], drawn behind the tree.
            top: parts that get a colour of their own; the others are grey.
        """
        import plotly.graph_objects as go
        from plotly.colors import qualitative

        rows, columns = self.grid
        parts = self.parts()
        order = sorted(set(parts) - {self.root}, key=lambda part: (-parts.count(part), part))
        figure = go.Figure()
        if image is not None:
            figure.add_layout_image(
                source=_as_url(image), x=-0.5, y=-0.5, sizex=columns, sizey=rows, xref="x", yref="y", sizing="stretch",
                layer="below", opacity=0.8,
            )  # fmt: skip
        groups = [(f"part {rank}", [part]) for rank, part in enumerate(order[:top], 1)]
        if order[top:]:
            groups.append((f"{len(order) - top} smaller", order[top:]))
        for index, (name, members) in enumerate(groups):
            colour = qualitative.Plotly[index % 10] if index < top else "grey"
            tokens = [token for token, part in enumerate(parts) if part in members]
            self._draw(figure, tokens, name, colour)
        figure.add_scatter(
            x=[self.root % columns], y=[self.root // columns], mode="markers", name="root",
            marker={"symbol": "star", "size": 18, "color": "black", "line": {"color": "white", "width": 1}},
        )  # fmt: skip
        axis = {"showgrid": False, "zeroline": False, "showticklabels": False}
        figure.update_layout(
            title=f"Dependency tree: {len(order)} parts, {self.depth()} generations",
            xaxis={**axis, "range": [-0.5, columns - 0.5]},
            yaxis={**axis, "range": [rows - 0.5, -0.5], "scaleanchor": "x"},
            plot_bgcolor="white",
        )
        return figure

    def save(self, path: str | Path) -> None:
        """Write the tree as json."""
        Path(path).write_text(json.dumps(vars(self)))

    @classmethod
    def load(cls, path: str | Path) -> DependencyTree:
        """Read what ``save`` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            values = json.loads(Path(path).read_text())
            return cls(**{**values, "grid": tuple(values["grid"])})
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a file of a dependency tree: {error!r}") from error

    def _place(self, token: int) -> str:
        return f"{token // self.grid[1]}, {token % self.grid[1]}"

    def _draw(self, figure: go.Figure, tokens: list[int], name: str, colour: str) -> None:
        columns = self.grid[1]
        lines: dict[str, list[float | None]] = {"x": [], "y": []}
        for token in tokens:
            ends = (token, self.parents[token])
            lines["x"] += [*(end % columns for end in ends), None]
            lines["y"] += [*(end // columns for end in ends), None]
        figure.add_scatter(**lines, mode="lines", line={"color": colour, "width": 1.5}, legendgroup=name,
                           showlegend=False, hoverinfo="skip")  # fmt: skip
        largest = max(self.message) or 1.0
        figure.add_scatter(
            x=[token % columns for token in tokens], y=[token // columns for token in tokens], mode="markers",
            marker={"color": colour, "size": [5 + 7 * self.message[token] / largest for token in tokens]},
            text=[f"sends {self.strength[token]:.3f} to {self._place(self.parents[token])}" for token in tokens],
            hovertemplate="row %{y}, column %{x}: %{text}<extra></extra>", name=name, legendgroup=name,
        )  # fmt: skip


@dataclass
class DependencyTrees:
    """The trees of some images.

    Attributes:
        trees: one for each image.
        masks: the averaged soft dependency masks they were read from, (images, parents, children).
    """

    trees: list[DependencyTree]
    masks: Tensor = field(repr=False)


def dependency_trees(
    model: DependencyViT,
    images: Tensor,
    *,
    layers: int | Sequence[int] | None = None,
    method: str = "arborescence",
) -> DependencyTrees:
    """The dependency trees of images.

    Args:
        model: a DependencyViT, with or without dynamic pooling.
        images: (batch, channels, height, width), normalised as the model wants them.
        layers: blocks whose masks are averaged: all for None, the last n for an int.
        method: "arborescence" or "argmax".

    Raises:
        TypeError: another kind of model.
        ValueError: layers that the model does not have, an unknown method, images that the model does not read.

    >>> import torch
    >>> model = DependencyViT(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=3).eval()
    >>> found = dependency_trees(model, torch.randn(1, 3, 32, 32))
    >>> len(found.trees[0].parents), found.trees[0].parents[found.trees[0].root] == found.trees[0].root
    (16, True)
    """
    if not isinstance(model, DependencyViT):
        raise TypeError(f"dependency trees are read from a DependencyViT, got {type(model).__name__}")
    check_choice("method", method, METHODS)
    with torch.no_grad():
        record = model.dependencies(images)
    batch, tokens = record.places[0].shape
    total = record.masks[0].new_zeros(batch, tokens, tokens)
    counts, message = torch.zeros_like(total), total.new_zeros(batch, tokens)
    for layer in stage_indices(len(record.masks), layers):
        mask, places = record.masks[layer], record.places[layer]
        where = (places[:, :, None] * tokens + places[:, None]).flatten(1)
        total.flatten(1).scatter_add_(1, where, mask.flatten(1))
        counts.flatten(1).scatter_add_(1, where, torch.ones_like(mask).flatten(1))
        message.scatter_(1, places, record.messages[layer])
    masks = (total / counts.clamp(min=1)).cpu()
    trees = [
        tree_of(mask, record.grid, method=method, message=left.tolist()) for mask, left in zip(masks, message.cpu())
    ]
    return DependencyTrees(trees, masks)


def tree_of(
    mask: Tensor, grid: tuple[int, int], *, method: str = "arborescence", message: list[float] | None = None
) -> DependencyTree:
    """The tree of one soft dependency mask.

    Args:
        mask: D, (parents, children), square.
        grid: sides of the map, whose product is the number of tokens.
        method: "arborescence" or "argmax".
        message: what every token had left to send; None takes the sums of D's columns.

    Raises:
        ValueError: a mask that is not square, not finite or does not fit the grid; an unknown method.

    >>> mask = torch.tensor([[0.1, 0.9, 0.2], [0.0, 0.1, 0.7], [0.9, 0.0, 0.1]])
    >>> tree_of(mask, (1, 3)).parents
    [0, 0, 1]
    """
    check_choice("method", method, METHODS)
    tokens = grid[0] * grid[1]
    if tuple(mask.shape) != (tokens, tokens) or tokens < 1:
        raise ValueError(f"mask must be (parents, children) = {(tokens, tokens)} for grid={grid}, got {mask.shape}")
    weights = mask.detach().double().cpu().numpy()
    if not np.isfinite(weights).all():
        raise ValueError("mask must be finite")
    root = int(weights.sum(1).argmax())
    if method == "argmax":
        others = np.where(np.eye(tokens, dtype=bool), -np.inf, weights)
        parents = others.argmax(0)
        parents[root] = root
    else:
        parents = spanning_arborescence(weights, root)
    strength = weights[parents, np.arange(tokens)]
    strength[root] = 0
    left: list[float] = weights.sum(0).tolist() if message is None else message
    return DependencyTree(parents.tolist(), root, strength.tolist(), left, grid)


def spanning_arborescence(weights: np.ndarray, root: int) -> np.ndarray:
    """Parents of the tree with the given root whose weights add up to most (Chu and Liu 1965; Edmonds 1967).

    Args:
        weights: (parents, children).
        root: becomes its own parent.

    >>> spanning_arborescence(np.array([[0, 5, 1], [0, 0, 8], [0, 9, 0]]), 0)
    array([0, 0, 1])
    """
    size = len(weights)
    weights = np.array(weights, dtype=float)
    np.fill_diagonal(weights, -np.inf)
    parents = weights.argmax(0)
    parents[root] = root
    circle = _circle(parents, root)
    if circle is None:
        return parents
    # The circle becomes one token: whatever enters it replaces the circle's own edge into the same token.
    inside = np.zeros(size, dtype=bool)
    inside[circle] = True
    outer = np.flatnonzero(~inside)
    gain = weights[:, circle] - weights[parents[circle], circle]
    smaller = np.full((len(outer) + 1, len(outer) + 1), -np.inf)
    smaller[:-1, :-1] = weights[np.ix_(outer, outer)]
    smaller[:-1, -1] = gain[outer].max(1)
    smaller[-1, :-1] = weights[np.ix_(circle, outer)].max(0)
    found = spanning_arborescence(smaller, int(np.flatnonzero(outer == root)[0]))
    for index, child in enumerate(outer):
        from_circle = found[index] == len(outer)
        parents[child] = circle[weights[circle, child].argmax()] if from_circle else outer[found[index]]
    entry = outer[found[-1]]
    parents[circle[gain[entry].argmax()]] = entry
    parents[root] = root
    return parents


def _circle(parents: np.ndarray, root: int) -> np.ndarray | None:
    """Some circle of the map from children to parents that does not hold the root."""
    state = np.zeros(len(parents), dtype=int)  # 0 unseen, otherwise the walk that came by
    state[root] = -1
    for start in range(len(parents)):
        token, walk = start, start + 1
        while state[token] == 0:
            state[token] = walk
            token = int(parents[token])
        if state[token] == walk:
            circle = [token]
            while parents[circle[-1]] != token:
                circle.append(int(parents[circle[-1]]))
            return np.array(circle)
    return None


def _as_url(image: Tensor) -> str:
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must be (3 or 1, height, width), got {tuple(image.shape)}")
    pixels = image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
