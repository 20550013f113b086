"""Losses and regularisers that papers add to training."""

from manyheads.objectives.distillation import gate_regulariser, hidden_distillation
from manyheads.objectives.sparse_attention import score_reconstruction, teacher_losses

__all__ = ["gate_regulariser", "hidden_distillation", "score_reconstruction", "teacher_losses"]
