"""What a search for retrieval heads found: scores per test, their mean, the ranking; tables, plots, files.

The authors publish their scores as json, ``{"layer-head": [score of each accepted test]}``; ``read_scores`` and
``RetrievalHeads.write_scores`` read and write that format.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manyheads.data.files import write_atomically
from manyheads.interpret.attach import Geometry
from manyheads.interpret.retrieval_scores import aggregate

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.table import Table

RETRIEVAL, STRONG = 0.1, 0.5


@dataclass(frozen=True)
class NeedleTest:
    """One needle test.

    Attributes:
        question, length, depth, offset: which test.
        prompt_tokens: tokens of the whole prompt.
        answer: what the model generated.
        recall: its ROUGE-1 recall against the expected answer, in percent.
        found: the expected answer was located in the prompt; without that no head can score.
        scores: (layers, heads) retrieval scores.
    """

    question: str
    length: int
    depth: float
    offset: int
    prompt_tokens: int
    answer: str
    recall: float
    found: bool
    scores: Tensor = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """The test as a json object."""
        return {**vars(self), "scores": self.scores.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NeedleTest:
        """The test that ``to_json`` wrote."""
        return cls(**{**values, "scores": torch.tensor(values["scores"])})


@dataclass
class RetrievalHeads:
    """Retrieval scores of every head of a model.

    Attributes:
        model: name of the model.
        geometry: its head counts.
        tests: every test that ran, in order.
        recall_threshold: a test is accepted when its answer was located and its recall, in percent, is greater.
    """

    model: str
    geometry: Geometry
    tests: list[NeedleTest]
    recall_threshold: int | float = 50.0

    @functools.cached_property
    def _aggregate(self) -> tuple[Tensor, int, list[tuple[int, int]]]:
        shape = (0, self.geometry.layers, self.geometry.heads)
        located = [test for test in self.tests if test.found]
        raw = torch.stack([test.scores for test in located]) if located else torch.zeros(shape)
        return aggregate(raw, [test.recall for test in located], self.recall_threshold)

    @property
    def mean(self) -> Tensor:
        """(layers, heads) mean score over the accepted tests; zero where none was accepted."""
        return self._aggregate[0]

    @property
    def accepted(self) -> int:
        """Number of tests that entered the mean."""
        return self._aggregate[1]

    @property
    def dropped(self) -> int:
        """Number of tests whose answer could not be located in the prompt."""
        return sum(not test.found for test in self.tests)

    @property
    def ranking(self) -> list[tuple[int, int]]:
        """All (layer, head) pairs by descending mean, equal ones in (layer, head) order."""
        return self._aggregate[2]

    @property
    def recall(self) -> float:
        """Mean recall over all tests, in percent."""
        return sum(test.recall for test in self.tests) / max(len(self.tests), 1)

    def top(self, count: int) -> list[tuple[int, int]]:
        """The ``count`` best heads."""
        return self.ranking[:count]

    def mask(self, *, threshold: int | float = RETRIEVAL, top: int | None = None) -> Tensor:
        """Boolean (layers, heads), True for retrieval heads: mean >= threshold, or the ``top`` best.

        Raises:
            ValueError: ``top`` is negative or more than there are heads.
        """
        if top is None:
            return self.mean >= threshold
        if not 0 <= top <= self.mean.numel():
            raise ValueError(f"top={top} must be 0 to {self.mean.numel()}, the heads of this model")
        chosen = torch.zeros_like(self.mean, dtype=torch.bool)
        for layer, head in self.top(top):
            chosen[layer, head] = True
        return chosen

    def kv_scores(self) -> Tensor:
        """(layers, kv_heads): the best score among the query heads that share a key/value head."""
        return self.mean.view(self.geometry.layers, self.geometry.kv_heads, self.geometry.group).amax(-1)

    def summary(self) -> dict[str, Any]:
        """The findings in numbers, JSON-serialisable."""
        count = self.mean.numel()
        return {
            "model": self.model,
            "layers": self.geometry.layers,
            "heads": self.geometry.heads,
            "tests": len(self.tests),
            "accepted": self.accepted,
            "dropped": self.dropped,
            "recall": self.recall,
            "retrieval_heads": int((self.mean >= RETRIEVAL).sum()),
            "retrieval_share": float((self.mean >= RETRIEVAL).sum()) / count,
            "strong_heads": int((self.mean >= STRONG).sum()),
            "never_active_share": float((self.mean == 0).sum()) / count,
        }

    def table(self, top: int = 10) -> Table:
        """The best heads as a rich table that fits 80 columns."""
        from rich.table import Table

        found = self.summary()
        table = Table(
            title=f"Retrieval heads of {self.model}",
            caption=(
                f"{found['retrieval_heads']} of {self.mean.numel()} heads score >= {RETRIEVAL} "
                f"({found['retrieval_share']:.1%}), {found['strong_heads']} >= {STRONG}; "
                f"{found['never_active_share']:.0%} never active. "
                f"{self.accepted} of {len(self.tests)} tests accepted, {self.dropped} dropped, "
                f"mean recall {self.recall:.0f} %."
            ),
        )
        for name in ("rank", "layer", "head", "score"):
            table.add_column(name, justify="right")
        table.add_column("")
        for rank, (layer, head) in enumerate(self.top(top), 1):
            score = float(self.mean[layer, head])
            table.add_row(str(rank), str(layer), str(head), f"{score:.3f}", "█" * round(20 * min(score, 1.0)))
        return table

    def plot(self) -> go.Figure:
        """The map of all heads as a plotly figure: layers x heads, coloured by score."""
        import plotly.graph_objects as go

        figure = go.Figure(
            go.Heatmap(
                z=self.mean.tolist(),
                zmin=0,
                zmax=1,
                colorscale="Viridis",
                colorbar={"title": "score"},
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
            )
        )
        figure.update_layout(title=f"Retrieval heads of {self.model}", xaxis_title="head", yaxis_title="layer")
        return figure

    def save(self, path: str | Path) -> None:
        """Write everything to one json file; an interrupted write leaves the old file."""
        sizes = vars(self.geometry)
        values = {"model": self.model, "geometry": sizes, "recall_threshold": self.recall_threshold}
        write_atomically(Path(path), json.dumps({**values, "tests": [test.to_json() for test in self.tests]}))

    @classmethod
    def load(cls, path: str | Path) -> RetrievalHeads:
        """Read what ``save`` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            values = json.loads(Path(path).read_text())
            tests = [NeedleTest.from_json(test) for test in values["tests"]]
            return cls(values["model"], Geometry(**values["geometry"]), tests, values["recall_threshold"])
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a file of retrieval heads: {error!r}") from error

    def write_scores(self, path: str | Path) -> None:
        """Write the accepted tests' scores in the authors' format, ``{"layer-head": [score of each test]}``."""
        used = [test.scores for test in self.tests if test.found and test.recall > self.recall_threshold]
        scores = {
            f"{layer}-{head}": [float(test[layer, head]) for test in used]
            for layer in range(self.geometry.layers)
            for head in range(self.geometry.heads)
        }
        write_atomically(Path(path), json.dumps(scores))


def read_scores(path: str | Path, geometry: Geometry | None = None) -> Tensor:
    """(tests, layers, heads) scores from a file in the authors' format, ``{"layer-head": [score of each test]}``.

    Args:
        path: the json file; the authors publish one for each model they studied.
        geometry: of the model that the scores are for; None takes the shape from the file.

    Raises:
        ValueError: not such a file, heads with different numbers of tests, missing heads, or another model's shape.
    """
    try:
        values = json.loads(Path(path).read_text())
        scores = {tuple(int(part) for part in name.split("-")): list(map(float, row)) for name, row in values.items()}
        layers, heads = (1 + max(numbers) for numbers in zip(*scores))
    except (AttributeError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not a score file {{"layer-head": [scores]}}: {error}') from error
    if geometry is not None and (layers, heads) != (geometry.layers, geometry.heads):
        raise ValueError(
            f"{path} has scores of {layers} layers x {heads} heads, the model {geometry.layers} x {geometry.heads}"
        )
    counts = {len(row) for row in scores.values()}
    absent = [f"{i}-{j}" for i in range(layers) for j in range(heads) if (i, j) not in scores]
    if absent or len(counts) != 1:
        raise ValueError(f"{path}: heads missing: {absent[:5]}; numbers of tests: {sorted(counts)}, need one")
    rows = [[scores[i, j] for j in range(heads)] for i in range(layers)]
    return torch.tensor(rows).permute(2, 0, 1)
