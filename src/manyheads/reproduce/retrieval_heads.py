"""The claims of "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, as miniatures.

They run on SmolLM2-135M-Instruct: nine tests (three needles at three depths) in haystacks of Python's documentation.
"""

from __future__ import annotations

import functools
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from manyheads.data.language_models import load_language_model
from manyheads.data.needles import NEEDLES, needle_prompt
from manyheads.interpret.masking_recall import masking_recall
from manyheads.interpret.retrieval_heads import RetrievalHeads, answer_needles, retrieval_heads
from manyheads.reproduce.claims import Claim, Finding, Verdict

LENGTH, DEPTHS, NEW_TOKENS, MASKED = 230, (20, 50, 90), 24, 5
OFFSETS = (0, 3000, 9000)


@functools.cache
def _model() -> tuple[Any, Any]:
    return load_language_model("smollm2")


@functools.cache
def _found(seed: int) -> RetrievalHeads:
    # The seed chooses the haystack.
    return retrieval_heads(
        *_model(),
        lengths=[LENGTH],
        depths=DEPTHS,
        offsets=[OFFSETS[seed % 3] + 1000 * (seed // 3)],
        buffer=0,
        max_new_tokens=NEW_TOKENS,
        batch_size=3,
        progress=False,
    )


def sparse(seed: int) -> Finding:
    """Score all heads; count those that reach 0.1."""
    found = _found(seed)
    summary = found.summary()
    share = summary["retrieval_share"]
    verdict = Verdict.INCONCLUSIVE if found.accepted < 3 else Verdict.CONFIRMED if share < 0.05 else Verdict.REFUTED
    top = [[layer, head, float(found.mean[layer, head])] for layer, head in found.top(10)]
    return Finding({"share": share}, {"paper_limit": 0.05}, verdict, summary | {"top": top})


def universal(seed: int) -> Finding:
    """Correlate the head maps that different needles give."""
    found = _found(seed)
    maps: dict[str, Tensor] = {}
    for needle in NEEDLES:
        used = [t.scores for t in found.tests if t.question == needle.question and t.recall > found.recall_threshold]
        if used:
            maps[needle.question] = torch.stack(used).mean(0).flatten()
    pairs = {
        f"{a} / {b}": float(torch.corrcoef(torch.stack([maps[a], maps[b]]))[0, 1]) for a, b in combinations(maps, 2)
    }
    if not pairs:
        return Finding({"lowest_correlation": 0.0}, None, Verdict.INCONCLUSIVE, {"accepted": found.accepted})
    lowest = min(pairs.values())
    verdict = Verdict.CONFIRMED if lowest > 0.8 else Verdict.REFUTED
    return Finding({"lowest_correlation": lowest}, {"needed": 0.8}, verdict, {"correlations": pairs})


def causal(seed: int) -> Finding:
    """Answer the first accepted test of every needle with the five best heads masked, and with five others masked."""
    model, tokenizer = _model()
    found = _found(seed)
    chosen = {}
    for test in found.tests:
        if test.recall > found.recall_threshold:
            chosen.setdefault(test.question, test)
    needles = {needle.question: needle for needle in NEEDLES}
    prompts = [
        needle_prompt(tokenizer, needles[t.question], length=LENGTH, depth=t.depth, offset=t.offset, buffer=0)
        for t in chosen.values()
    ]
    if not prompts:
        return Finding({"recall_best_masked": 0.0}, None, Verdict.INCONCLUSIVE, {"accepted": found.accepted})
    free = [score for _, score in answer_needles(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=3)]
    best, others = masking_recall(
        model, tokenizer, found, prompts, MASKED, seed=seed, max_new_tokens=NEW_TOKENS, batch_size=3
    )
    control = sum(others) / len(others)
    return Finding(
        {"recall_best_masked": best},
        {"recall_others_masked": control, "recall_unmasked": sum(free) / len(free)},
        Verdict.CONFIRMED if control - best >= 40 else Verdict.REFUTED,
        {"others": others, "masked": [list(pair) for pair in found.top(MASKED)], "tests": len(prompts)},
    )


_FULL = (
    "manyheads inspect meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16 --device cuda "
    "--lengths 1000,4000,8000,16000,32000,50000 --depths 0,11,22,33,44,56,67,78,89,100 --output retrieval-heads"
)

CLAIMS = [
    Claim(
        system="retrieval_heads",
        name="sparse",
        statement="Less than five percent of the attention heads are retrieval heads (score of at least 0.1).",
        rule="Confirmed when less than 5 % of all heads score 0.1 or more, refuted otherwise; inconclusive when fewer "
        "than three of nine tests are accepted.",
        run=sparse,
        full_scale=_FULL,
    ),
    Claim(
        system="retrieval_heads",
        name="universal",
        statement="The same heads retrieve, whatever is to be retrieved.",
        rule="Confirmed when the head maps of every two needles correlate by more than 0.8, refuted otherwise; "
        "inconclusive when fewer than two needles are ever answered.",
        run=universal,
        full_scale=_FULL,
    ),
    Claim(
        system="retrieval_heads",
        name="causal",
        statement="Masking the top retrieval heads makes the needle vanish; masking other heads does not.",
        rule="Confirmed when recall with the five best heads masked lies at least 40 points under the mean recall with "
        "five random others masked (three draws), refuted otherwise; inconclusive when no test is accepted.",
        run=causal,
        full_scale=f"{_FULL} --mask 0,10,30,50,100",
    ),
]
