"""From gates or scores to the map of retrieval heads, and the authors' files that hold gates.

    threshold = p-quantile of all gates, clipped to [0, 1];   retrieval  iff  gate >= threshold

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819,
section 2.3; files as in the repository mit-han-lab/duo-attention.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from manyheads.data.files import write_atomically

GATES_FILE = "full_attention_heads.tsv"


def binarize(gates: Tensor, *, sparsity: float | None = None, threshold: float | None = None) -> Tensor:
    """Which key/value heads are retrieval heads, from their gates.

    Args:
        gates: (layers, key/value heads); values are clipped to [0, 1] first.
        sparsity: share of streaming heads p: the threshold is the p-quantile (linear interpolation) over all layers
            and heads. Gates equal to the threshold count as retrieval, so ties may leave fewer streaming heads; 0
            keeps every head, 1 none. (The authors break ties with random noise; this is the same on every run.)
        threshold: a fixed threshold instead, 0.5 for example.

    Returns:
        Boolean (layers, key/value heads).

    Raises:
        ValueError: both or neither of sparsity and threshold, values outside [0, 1], gates that are not a finite table.

    Source: arXiv 2410.10819, section 2.3.

    >>> import torch
    >>> binarize(torch.tensor([[0.9, 0.1], [0.0, 1.2]]), sparsity=0.5)
    tensor([[ True, False],
            [False,  True]])
    """
    if (sparsity is None) == (threshold is None):
        raise ValueError("give either sparsity or threshold, and not both")
    gates = check_table(gates, "gates").clamp(0, 1)
    if sparsity is None:
        return gates >= _share("threshold", threshold)
    share = _share("sparsity", sparsity)
    if share in (0.0, 1.0):
        return torch.full(gates.shape, share == 0.0)
    return gates >= torch.quantile(gates.flatten(), share)


def strongest(scores: Tensor, kv_heads: int, *, sparsity: float) -> Tensor:
    """The ``round((1 - sparsity) * heads)`` key/value heads with the best query head, ties in (layer, head) order.

    Args:
        scores: (layers, query heads).
        kv_heads: key/value heads of a layer; query head h reads key/value head ``h // (query heads / kv_heads)``.
        sparsity: share of streaming heads in [0, 1].

    Returns:
        Boolean (layers, key/value heads).

    >>> import torch
    >>> strongest(torch.tensor([[0.0, 0.7, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]]), 2, sparsity=0.25)
    tensor([[ True,  True],
            [ True, False]])
    """
    share = _share("sparsity", sparsity)
    scores = check_table(scores, "scores")
    if kv_heads < 1 or scores.shape[1] % kv_heads:
        raise ValueError(f"kv_heads={kv_heads} does not divide the {scores.shape[1]} query heads of scores")
    grouped = scores.reshape(len(scores), kv_heads, -1).amax(dim=2)
    order = grouped.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(grouped.numel(), dtype=torch.bool)
    keep[order[: round((1 - share) * grouped.numel())]] = True
    return keep.reshape(grouped.shape)


def load_pattern(folder: str | Path) -> tuple[Tensor, dict]:
    """Gates (layers, key/value heads) and options of a folder in the authors' layout.

    ``full_attention_heads.tsv`` has one line per layer and one tab-separated column per key/value head;
    ``config.json`` beside it has sink_size, recent_size and the options of the training.

    Raises:
        FileNotFoundError: the folder lacks the table.
        ValueError: lines of different lengths, or text that is no number.
    """
    path = Path(folder) / GATES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {GATES_FILE}")
    rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path}: every line needs as many columns, found {sorted({len(row) for row in rows})}")
    try:
        gates = torch.tensor([[float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = Path(folder) / "config.json"
    return check_table(gates, str(path)), json.loads(config.read_text()) if config.is_file() else {}


def save_pattern(folder: str | Path, gates: Tensor, *, sinks: int, recent: int, **options) -> None:
    """Write gates as the authors do; ``options`` go into config.json beside sink_size and recent_size."""
    gates = check_table(gates, "gates")
    table = "\n".join("\t".join(f"{gate:.6f}" for gate in row) for row in gates.tolist()) + "\n"
    write_atomically(Path(folder) / GATES_FILE, table)
    config = {"sink_size": sinks, "recent_size": recent, **options}
    write_atomically(Path(folder) / "config.json", json.dumps(config, indent=2) + "\n")


def check_table(values: Tensor, name: str) -> Tensor:
    """``values`` as a float32 CPU table, or ValueError."""
    values = torch.as_tensor(values).detach().float().cpu()
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"{name} must be a table (layers, heads), got shape {tuple(values.shape)}")
    if not values.isfinite().all():
        layer, head = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite, got {values[layer, head]} at layer {layer}, head {head}")
    return values


def _share(name: str, value: float | None) -> float:
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1]")
    return float(value)
