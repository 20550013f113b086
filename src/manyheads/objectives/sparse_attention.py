"""What trains predicted sparse attention: the predictor against real attention, then the model against its teacher.

    phase 1   0.01 mean over layers of sum (S - A_teacher)^2                       predictors only
    phase 2   CE + 0.5 KL(teacher || student) + 0.5 mean (token_s - token_t)^2     all but the predictors
              [ + 0.002 mean over layers of sum (S - A)^2 ]                        self-distillation, predictors too

Source: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv 2303.13755.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def score_reconstruction(scores: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """Squared differences of predicted and real attention, summed over all entries, averaged over layers.

    Args:
        scores: of each layer, (batch, heads, N - 1, N).
        attention: of each layer, (batch, heads, N, N), row 0 the class token's; no gradient flows into it.

    Raises:
        ValueError: no layers, or other numbers or shapes of both.

    >>> import torch
    >>> score_reconstruction([torch.zeros(1, 1, 1, 2)], [torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])])
    tensor(0.5000)
    """
    if not scores or len(scores) != len(attention):
        raise ValueError(f"{len(scores)} layers of scores and {len(attention)} of attention do not go together")
    losses = []
    for guess, real in zip(scores, attention, strict=True):
        if guess.shape != real[:, :, 1:].shape:
            raise ValueError(f"scores {tuple(guess.shape)} do not fit attention {tuple(real.shape)} without row 0")
        losses.append((guess.float() - real[:, :, 1:].detach().float()).square().sum())
    return torch.stack(losses).mean()


def teacher_losses(
    logits: Tensor, teacher_logits: Tensor, features: Tensor, teacher_features: Tensor, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(KL of the teacher's classes to the student's, mean over the batch; mean squared difference of patch tokens).

    Args:
        logits, teacher_logits: (batch, classes).
        features, teacher_features: normed patch tokens (batch, N - 1, channels).
        kept: boolean (batch, N - 1), the only tokens that count; None for all.

    >>> import torch
    >>> same, tokens = torch.randn(2, 5), torch.randn(2, 4, 3)
    >>> [round(float(loss), 4) for loss in teacher_losses(same, same, tokens, tokens + 1)]
    [0.0, 1.0]
    """
    target = teacher_logits.detach().float().log_softmax(-1)
    divergence = F.kl_div(logits.float().log_softmax(-1), target, reduction="batchmean", log_target=True)
    error = (features.float() - teacher_features.detach().float()).square().mean(-1)
    return divergence, (error if kept is None else error[kept]).mean()
