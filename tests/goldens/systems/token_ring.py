"""TokenRing: the bidirectional form and the causal form with the zigzag layout."""

from __future__ import annotations

from manyheads.parallel import token_ring
from tests.goldens.systems._ranks import softmax_outputs
from tests.goldens.systems._tensors import arrays, tensors


def run(config: dict, state: dict, inputs: dict) -> dict:
    return arrays(softmax_outputs(token_ring, config, tensors(inputs)))
