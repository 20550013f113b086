"""What the catalog says about one attention system, and the words that it may use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

KINDS = (
    "operator",
    "layer",
    "vision backbone",
    "vision model",
    "detector",
    "language model",
    "adaptation",
    "analysis",
    "parallel scheme",
    "objective",
    "benchmark",
    "cost model",
)
PATTERNS = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")
ROOMS = ("ops", "layers", "models", "adapt", "interpret", "parallel", "objectives", "bench", "cost")
STATES = ("works", "planned")


@dataclass(frozen=True)
class System:
    """One published attention system.

    Attributes:
        slug: the name used everywhere else ("biformer").
        title: title of the paper.
        year: year of its first public version.
        arxiv: arXiv identifier, "" where the paper has none.
        kind: what it mainly is, one of ``KINDS``.
        patterns: which of the four attention patterns of CAB (arXiv 2210.07661) it serves, from ``PATTERNS``;
            empty for systems that compute no attention of their own.
        rooms: the rooms of manyheads where its parts live, from ``ROOMS``.
        why: one line on why somebody wants it.
        state: "works" or "planned".
        public: dotted names of its public objects; filled for systems that work.
    """

    slug: str
    title: str
    year: int
    arxiv: str
    kind: str
    patterns: tuple[str, ...]
    rooms: tuple[str, ...]
    why: str
    state: str = "planned"
    public: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Address of the paper's abstract, "" where it has no arXiv identifier."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self)
