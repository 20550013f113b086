"""Losses and regularisers that papers add to training."""

from manyheads.objectives.distillation import gate_regulariser, hidden_distillation

__all__ = ["gate_regulariser", "hidden_distillation"]
