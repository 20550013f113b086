"""The arithmetic of retrieval heads: hits, scores, the mean over accepted tests, the ranking.

At decode step s a head *hits* when one of its ``topk`` most attended positions i lies in the needle and holds the token
that is generated at this step::

    hit[s, l, h] = any over i in top(row[s, l, h]) of  start <= i < end  and  prompt[i] == generated[s]
    score[l, h]  = sum_s hit[s, l, h] / (end - start)

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def score_heads(
    attention: Float[Tensor, "steps layers heads keys"],
    prompt_ids: Tensor | Sequence[int],
    generated_ids: Tensor | Sequence[int],
    start: int,
    end: int,
    *,
    topk: int = 1,
    unique: bool = False,
) -> tuple[Float[Tensor, "layers heads"], Bool[Tensor, "steps layers heads"]]:
    """Retrieval scores of one test from its attention rows.

    Args:
        attention: (steps, layers, heads, keys) attention weights or logits; row s of a head is read over its first
            ``len(prompt_ids) + s`` keys: the prompt, then what was generated before.
        prompt_ids: (prompt,) token ids.
        generated_ids: (steps,) token ids; token s is generated at step s.
        start, end: the needle's tokens are ``prompt_ids[start:end]``; -1, -1 (not found) gives no hit.
        topk: how many of the largest entries may hit; a step counts once, whatever ``topk``.
        unique: count different tokens instead of steps, as the paper's formula does: copied needle tokens as a set,
            divided by the needle's tokens as a set. The authors' code counts steps, so a token that is repeated counts
            again and a score may exceed 1.

    Returns:
        (scores, hits): scores (layers, heads) float32, hits (steps, layers, heads).

    Raises:
        ValueError: rows shorter than the prompt and its continuation, a span outside the prompt, ``topk`` below 1.

    Source: arXiv 2404.15574, section 2.1, and the authors' ``retrieval_head_detection.py``.

    >>> rows = torch.zeros(2, 1, 1, 5)
    >>> rows[0, 0, 0, 1] = rows[1, 0, 0, 2] = 1.0
    >>> score_heads(rows, [7, 8, 9, 7], [8, 9], 1, 3)[0]
    tensor([[1.]])
    """
    prompt, generated = _ids("prompt_ids", prompt_ids), _ids("generated_ids", generated_ids)
    if topk < 1:
        raise ValueError(f"topk={topk} must be at least 1")
    steps, layers, heads, keys = attention.shape
    if steps != len(generated):
        raise ValueError(f"attention has rows of {steps} steps but {len(generated)} tokens were generated")
    if steps and keys < len(prompt) + steps - 1:
        raise ValueError(
            f"attention rows have {keys} keys, but a prompt of {len(prompt)} and {steps} steps need "
            f"{len(prompt) + steps - 1}"
        )
    top = torch.full((steps, layers, heads, topk), -1, dtype=torch.long, device=attention.device)
    for step in range(steps):
        row = attention[step, ..., : len(prompt) + step]
        width = min(topk, row.shape[-1])
        top[step, ..., :width] = row.topk(width, dim=-1).indices if width > 1 else row.argmax(-1, keepdim=True)
    return score_positions(top, prompt, generated, start, end, unique=unique)


def score_positions(
    top: Int[Tensor, "steps layers heads topk"],
    prompt_ids: Tensor | Sequence[int],
    generated_ids: Tensor | Sequence[int],
    start: int,
    end: int,
    *,
    unique: bool = False,
) -> tuple[Float[Tensor, "layers heads"], Bool[Tensor, "steps layers heads"]]:
    """As ``score_heads``, from the positions of the largest entries (-1 for none) instead of whole rows."""
    prompt, generated = (
        _ids("prompt_ids", prompt_ids).to(top.device),
        _ids("generated_ids", generated_ids).to(top.device),
    )
    if (start, end) == (-1, -1):
        return torch.zeros(top.shape[1:3]), torch.zeros(top.shape[:3], dtype=torch.bool)
    if not 0 <= start < min(end, len(prompt)):
        raise ValueError(f"the needle's span [{start}, {end}) does not start in a prompt of {len(prompt)} tokens")
    inside = (top >= start) & (top < min(end, len(prompt)))
    same = prompt[top.clamp(0, len(prompt) - 1)] == generated[:, None, None, None]
    hits = (inside & same).any(-1)
    if not unique:
        return (hits.sum(0).float() / (end - start)).cpu(), hits.cpu()
    copied = torch.stack([hits[generated == token].any(0) for token in generated.unique()]) if len(generated) else hits
    return (copied.sum(0).float() / len(prompt[start:end].unique())).cpu(), hits.cpu()


def aggregate(
    raw: Float[Tensor, "tests layers heads"],
    recall: Tensor | Sequence[int | float],
    threshold: int | float = 50.0,
) -> tuple[Float[Tensor, "layers heads"], int, list[tuple[int, int]]]:
    """Mean score of every head over the accepted tests, and the ranking.

    Args:
        raw: (tests, layers, heads) score of each test.
        recall: (tests,) ROUGE-1 recall of each test's answer, in percent.
        threshold: a test is accepted when its recall is greater.

    Returns:
        (mean, used, ranking): mean (layers, heads), zero where no test was accepted; the number of accepted tests; all
        (layer, head) pairs by descending mean, equal ones in (layer, head) order.

    Raises:
        ValueError: as many recalls as tests are needed.

    >>> mean, used, ranking = aggregate(torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]), [90.0, 20.0])
    >>> used, ranking
    (1, [(0, 1), (0, 0)])
    """
    recalls = torch.as_tensor(recall, dtype=torch.float64)
    if recalls.shape != raw.shape[:1]:
        raise ValueError(f"{raw.shape[0]} tests need as many recalls, got shape {tuple(recalls.shape)}")
    accepted = recalls > threshold
    used = int(accepted.sum())
    mean = raw[accepted].double().mean(0).to(raw.dtype) if used else torch.zeros_like(raw[:0].sum(0))
    order = mean.flatten().sort(descending=True, stable=True).indices.tolist()
    return mean, used, [(index // mean.shape[1], index % mean.shape[1]) for index in order]


def find_needle(
    prompt_ids: Tensor | Sequence[int], needle_ids: Tensor | Sequence[int], *, overlap: int | float = 0.9
) -> tuple[int, int]:
    """[start, end) of the first stretch of the prompt that holds the needle's tokens, or (-1, -1).

    Stretches are compared as sets: the first with ``len(set(stretch) & set(needle)) / len(set(needle)) > overlap``
    counts, so the start may be a few tokens early.

    Raises:
        ValueError: an empty needle, or an overlap outside [0, 1).

    >>> find_needle([5, 1, 2, 3, 5], [1, 2, 3])
    (1, 4)
    """
    prompt, needle = _ids("prompt_ids", prompt_ids).tolist(), _ids("needle_ids", needle_ids).tolist()
    if not needle:
        raise ValueError("needle_ids is empty: there is nothing to find")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} must lie in [0, 1)")
    wanted = set(needle)
    # Stretches at the end of the prompt are cut short, as in the authors' slices.
    for first in range(len(prompt)):
        if len(wanted.intersection(prompt[first : first + len(needle)])) / len(wanted) > overlap:
            return first, first + len(needle)
    return -1, -1


def answer_span(tokenizer: Any, prompt_ids: Sequence[int], answer: str) -> tuple[int, int]:
    """Where an answer stands in a prompt, or (-1, -1): searched as the authors do, then with a leading space.

    A word tokenises differently at the start of a text and inside it; for a short answer that alone can hide the
    needle, which in the authors' code counts as a score of zero.
    """
    for text in (answer, f" {answer}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        start, end = find_needle(prompt_ids, ids)
        if start >= 0:
            return start, end
    return -1, -1


def rouge_recall(answer: str, generated: str) -> float:
    """ROUGE-1 recall with stemming of a generated text against the answer, in percent.

    >>> rouge_recall("eat a sandwich", "You should be eating the sandwich")
    66.66666666666666
    """
    from rouge_score import rouge_scorer

    return 100 * rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True).score(answer, generated)["rouge1"].recall


def _ids(name: str, ids: Tensor | Sequence[int]) -> Tensor:
    tensor = torch.as_tensor(ids, dtype=None if len(ids) else torch.long)
    if tensor.ndim != 1 or tensor.is_floating_point():
        raise ValueError(f"{name} must be a list of token ids, got shape {tuple(tensor.shape)} {tensor.dtype}")
    return tensor
