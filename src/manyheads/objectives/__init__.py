"""Losses and regularisers that papers add to training."""

from manyheads.objectives.diffusion import diffusion_loss
from manyheads.objectives.distillation import gate_regulariser, hidden_distillation
from manyheads.objectives.diversification import attention_diversification_loss, diversification_from_queries
from manyheads.objectives.self_distillation import self_distillation_loss
from manyheads.objectives.sparse_attention import score_reconstruction, teacher_losses

__all__ = [
    "attention_diversification_loss",
    "diffusion_loss",
    "diversification_from_queries",
    "gate_regulariser",
    "hidden_distillation",
    "score_reconstruction",
    "self_distillation_loss",
    "teacher_losses",
]
