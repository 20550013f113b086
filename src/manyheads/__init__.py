"""The attention systems of 59 papers, working side by side on today's PyTorch and Hugging Face stack.

Rooms (import what you need; nothing heavy is loaded before)::

    manyheads.ops        attention operators: pure functions on tensors
    manyheads.layers     nn.Module attention layers
    manyheads.models     complete models, checkpoints, registry
    manyheads.adapt      changes to pretrained Hugging Face models
    manyheads.interpret  analyses of attention heads
    manyheads.parallel   sequence parallelism
    manyheads.objectives losses and regularisers
    manyheads.bench      tasks, speed, memory
    manyheads.cost       cost formulas
    manyheads.catalog    the 59 systems
"""

from __future__ import annotations

import importlib
from types import ModuleType

__version__ = "0.1.0"

_ROOMS = (
    "adapt",
    "bench",
    "catalog",
    "cost",
    "data",
    "engines",
    "interpret",
    "layers",
    "models",
    "objectives",
    "ops",
    "parallel",
    "report",
    "reproduce",
)

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> ModuleType:
    # Rooms load on first use, so that `import manyheads` (and `manyheads --help`) never waits for torch.
    if name in _ROOMS:
        return importlib.import_module(f"manyheads.{name}")
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
