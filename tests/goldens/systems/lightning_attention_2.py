"""Lightning Attention-2: the same operator; block size, states and flash-linear-attention's layout by config."""

from __future__ import annotations

from tests.goldens.systems._tensors import arrays, tensors
from tests.goldens.systems.lightning_attention import operator


def run(config: dict, state: dict, inputs: dict) -> dict:
    return arrays(operator(config, tensors(inputs)))
