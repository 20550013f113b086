"""Are the best retrieval heads needed? Recall of hidden needles with them masked, against other heads masked.

Source: "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, section 4.1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import nn

from manyheads.data.needles import NeedlePrompt
from manyheads.interpret.mask_heads import mask_heads
from manyheads.interpret.retrieval_heads import answer_needles
from manyheads.interpret.retrieval_result import RETRIEVAL, RetrievalHeads


def masking_recall(
    model: nn.Module,
    tokenizer: Any,
    found: RetrievalHeads,
    prompts: Sequence[NeedlePrompt],
    count: int,
    *,
    draws: int = 3,
    seed: int = 0,
    mode: str = "uniform",
    max_new_tokens: int = 50,
    batch_size: int = 1,
) -> tuple[float, list[float]]:
    """Mean recall in percent with the ``count`` best heads masked, and with as many others masked, per random draw.

    Other heads score below 0.1 and lie outside the first layer, whose heads a model of any size needs. (The authors'
    script means to leave the best heads out of its control, but compares tuples with lists, so that none is left out.)

    Args:
        model, tokenizer: the model that ``found`` is about.
        found: scores of its heads.
        prompts: the tests to answer.
        count: heads to mask; 0 masks none.
        draws: random controls.
        seed: of the controls.
        mode: see ``mask_heads``.
        max_new_tokens, batch_size: see ``answer_needles``.

    Raises:
        ValueError: more heads than the control can be drawn from, no prompt, or no draw.

    Source: arXiv 2404.15574, section 4.1.
    """
    others = [(layer, head) for layer, head in found.ranking if layer > 0 and found.mean[layer, head] < RETRIEVAL]
    if not 0 <= count <= len(others):
        raise ValueError(f"count={count} must be 0 to {len(others)}, the heads that a control can be drawn from")
    if not prompts or draws < 1:
        raise ValueError("need at least one prompt and one draw")

    def recall(heads: list[tuple[int, int]]) -> float:
        with mask_heads(model, heads, mode=mode):
            answers = answer_needles(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        return sum(score for _, score in answers) / len(answers)

    draw = random.Random(seed)
    controls = [draw.sample(others, count) for _ in range(draws)]
    return recall(found.top(count)), [recall(heads) for heads in controls]
