"""Golden adapter of retrieval heads: scores of one test, the mean over tests, needle search, masked heads."""

from __future__ import annotations

import numpy as np

from manyheads.interpret.retrieval_heads import aggregate, find_needle, score_heads
from tests.goldens.systems._tensors import tensors


def run(config: dict, state: dict, inputs: dict) -> dict:
    given = tensors(inputs)
    if "raw" in given:
        return _aggregate(config, given)
    if "needle_ids" in given:
        span = find_needle(given["prompt_ids"], given["needle_ids"], overlap=config.get("overlap", 0.9))
        return {"span": np.array(span)}
    return _score(config, given)


def _score(config: dict, given: dict) -> dict:
    score, hits = score_heads(
        given["attn_logits"],
        given["prompt_ids"],
        given["generated_ids"],
        config["needle_start"],
        config["needle_end"],
        topk=config.get("topk", 1),
        unique=config.get("unique", False),
    )
    return {"score": score.numpy(), "hits": hits.long().numpy()}


def _aggregate(config: dict, given: dict) -> dict:
    # The case draws its scores from a normal distribution; a score is never negative.
    mean, used, ranking = aggregate(given["raw"].clamp(min=0), config["recall_percent"], config.get("threshold", 50.0))
    return {
        "mean_score": mean.numpy(),
        "used": np.array([used]),
        "ranking": np.array(ranking[: config.get("top", len(ranking))]),
    }
