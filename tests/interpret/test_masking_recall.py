"""The control of masked heads leaves retrieval heads and the first layer out."""

from __future__ import annotations

import pytest
import torch

from manyheads.data.needles import Needle, needle_prompt
from manyheads.interpret import masking_recall as module
from manyheads.interpret.masking_recall import masking_recall
from manyheads.interpret.retrieval_heads import retrieval_heads
from tests.interpret.conftest import tiny

NEEDLE = Needle("The magic word is plum.", "What is the magic word?", "plum")


def test_controls_are_drawn_from_other_heads(tokenizer, monkeypatch) -> None:
    model = tiny("llama", num_hidden_layers=3)
    grid = dict(lengths=[80], depths=[50], needles=[NEEDLE], buffer=0, max_new_tokens=2, text="Rain fell. " * 40)
    found = retrieval_heads(model, tokenizer, progress=False, **grid)
    found.recall_threshold = -1.0
    found.tests[0].scores.copy_(torch.tensor([[0.0] * 4, [0.9, 0.0, 0.0, 0.5], [0.0, 0.0, 0.05, 0.3]]))
    prompt = needle_prompt(tokenizer, NEEDLE, length=80, depth=50, buffer=0, text="Rain fell. " * 40)
    masked, mask_heads = [], module.mask_heads

    def note(model, heads, **options):
        masked.append(list(heads))
        return mask_heads(model, heads, **options)

    monkeypatch.setattr(module, "mask_heads", note)
    best, others = masking_recall(model, tokenizer, found, [prompt], 2, draws=4, max_new_tokens=2)
    assert 0 <= best <= 100
    assert len(others) == 4
    assert masked[0] == [(1, 0), (1, 3)]
    assert all(set(heads) <= {(1, 1), (1, 2), (2, 0), (2, 1), (2, 2)} and len(set(heads)) == 2 for heads in masked[1:])
    with pytest.raises(ValueError, match="count=6 must be 0 to 5"):
        masking_recall(model, tokenizer, found, [prompt], 6)
    with pytest.raises(ValueError, match="at least one prompt"):
        masking_recall(model, tokenizer, found, [], 1)
