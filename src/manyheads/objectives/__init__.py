"""Losses and regularisers that papers add to training."""

from manyheads.objectives.diffusion import diffusion_loss
from manyheads.objectives.distillation import gate_regulariser, hidden_distillation

__all__ = ["diffusion_loss", "gate_regulariser", "hidden_distillation"]
