"""The page of `manyheads try`: what the heads do, and what the change of attention cost and saved."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from manyheads import catalog
from manyheads.bench.trial import Trial
from manyheads.report.page import bytes_text, number_text, percent, write_page


@dataclass(frozen=True)
class _Figure:
    name: str
    before: str
    after: str
    change: str
    better: str  # "better", "worse" or "same": how the change reads
    before_share: float  # of the larger of the two, for the bars
    after_share: float


def write_trial_report(trial: Trial, folder: str | Path) -> Path:
    """Write ``folder/index.html``, one self-contained page about a trial, and return its path.

    Raises:
        ValueError: the trial's grids do not fit each other (scores, heads, depths, lengths, patterns).
    """
    _check(trial)
    kept = sum(sum(row) for row in trial.retrieval)
    total = sum(len(row) for row in trial.retrieval)
    before, after = trial.before, trial.after
    costs = [
        _figure("KV cache", before.cache_bytes, after.cache_bytes, bytes_text, less=True),
        _figure("Prefill, tokens/s", before.prefill_tokens_per_second, after.prefill_tokens_per_second),
        _figure("Decode, tokens/s", before.decode_tokens_per_second, after.decode_tokens_per_second),
    ]
    summary = [
        _figure("Perplexity", before.perplexity, after.perplexity, less=True),
        _figure("Needle found", _mean(before.needle), _mean(after.needle), percent, points=True),
        *costs,
    ]
    return write_page(
        "trial.html",
        folder,
        trial=trial,
        paper=catalog.get(trial.system),
        sentence=trial.sentence,
        words=trial.words,
        kept=kept,
        total=total,
        summary=summary,
        costs=costs,
        needles=[("before", before.needle), ("after", after.needle)],
        payload=_payload(trial),
    )


def _payload(trial: Trial) -> dict:
    patterns = np.asarray(trial.patterns, dtype=np.uint8)
    return {
        "scores": [[round(score, 4) for score in row] for row in trial.head_scores],
        "retrieval": trial.retrieval,
        "words": asdict(trial.words),
        "tokens": trial.tokens,
        "patterns": base64.b64encode(patterns.tobytes()).decode(),
    }


def _figure(
    name: str, before: float | int, after: float | int, text=number_text, *, less=False, points=False
) -> _Figure:
    top = max(before, after) or 1
    if points:
        difference = 100 * (after - before)
        change = f"{difference:+.0f} points" if round(difference) else "unchanged"
    else:
        relative = after / before - 1 if before else 0.0
        change = f"{100 * relative:+.1f} %" if abs(relative) >= 0.0005 else "unchanged"
    change = change.replace("-", "−")
    better = "same" if change == "unchanged" else "better" if (after < before) == less else "worse"
    return _Figure(name, text(before), text(after), change, better, before / top, after / top)


def _mean(grid: list[list[float]]) -> float:
    values = [value for row in grid for value in row]
    return sum(values) / len(values) if values else 0.0


def _check(trial: Trial) -> None:
    layers = len(trial.head_scores)
    heads = {len(row) for row in trial.head_scores}
    groups = {len(row) for row in trial.retrieval}
    if layers == 0 or len(heads) != 1 or len(groups) != 1 or len(trial.retrieval) != layers:
        raise ValueError(
            f"head_scores has {layers} layers of {sorted(heads)} heads, retrieval {len(trial.retrieval)} layers of "
            f"{sorted(groups)} key/value heads; both need the same layers and one number of heads in all of them"
        )
    (head_count,), (group_count,) = heads, groups
    if group_count == 0 or head_count % group_count:
        raise ValueError(f"{head_count} query heads are not a multiple of {group_count} key/value heads")
    tokens = len(trial.tokens)
    shape, wanted = np.shape(trial.patterns), (layers, head_count, tokens, tokens)
    if shape != wanted:
        raise ValueError(f"patterns has shape {shape}, expected (layers, heads, tokens, tokens) = {wanted}")
    wanted = (len(trial.depths), len(trial.lengths))
    for when, measured in (("before", trial.before), ("after", trial.after)):
        if np.shape(measured.needle) != wanted:
            raise ValueError(
                f"{when}.needle has shape {np.shape(measured.needle)}, expected (depths, lengths) = {wanted}"
            )
