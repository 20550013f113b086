"""A trial as `manyheads try` makes it, with invented numbers in real shapes: 30 layers, 9 heads in groups of 3."""

from __future__ import annotations

import numpy as np

from manyheads.bench.trial import Measurement, Trial

TEXT = (
    "The grass is green. The sky is blue. The best thing to do in San Francisco is to eat a sandwich in Dolores Park."
    "\nThe sun is yellow. Here we go. There and back again </script><b>.\nWhat is the best thing to do? eat a sandwich"
)
LAYERS, HEADS, GROUPS = 30, 9, 3


def example_trial() -> Trial:
    tokens = [(" " if place else "") + word for place, word in enumerate(TEXT.split(" "))]
    count = len(tokens)
    random = np.random.default_rng(0)
    scores = random.random((LAYERS, HEADS)) ** 6 * 0.6
    rows, columns = np.indices((count, count))
    logits = random.normal(0, 0.6, (LAYERS, HEADS, count, count))
    logits += 4.0 * (columns == 0) + random.uniform(0, 3, (LAYERS, HEADS, 1, 1)) * (rows - columns < 4)
    logits[:, :, columns > rows] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    group_scores = scores.reshape(LAYERS, GROUPS, -1).max(-1)
    retrieval = group_scores >= np.median(group_scores)
    depths, lengths = [0.0, 25.0, 50.0, 75.0, 100.0], [256, 512, 1024, 2048]
    return Trial(
        system="duo_attention",
        model="smollm2",
        settings={"sinks": 16, "recent": 64, "sparsity": 0.5, "dtype": "float32", "device": "cpu", "seed": 0},
        head_scores=scores.tolist(),
        retrieval=retrieval.tolist(),
        depths=depths,
        lengths=lengths,
        tokens=tokens,
        patterns=np.round(weights * 255).astype(int).tolist(),
        before=Measurement(11.42, random.uniform(0.6, 1, (5, 4)).tolist(), 94_371_840, 2048, 812.0, 21.5),
        after=Measurement(11.63, random.uniform(0.3, 1, (5, 4)).tolist(), 49_283_072, 2048, 965.3, 24.1),
    )
