"""Training the exits of a model together: the early ones also learn from the last.

Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def self_distillation_loss(
    exits: Sequence[Tensor],
    targets: Tensor,
    *,
    weights: Sequence[float] = (0.5, 0.5, 1.0, 1.0),
    alpha: int | float = 0.5,
    temperature: int | float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of every exit, and the early ones taught by the last::

        sum_k w_k CE(y_k, target) + alpha sum_{k < K} T^2 KL( softmax(y_K / T) || softmax(y_k / T) )

    The teacher's gradient is stopped; the divergence is the mean over the batch.

    Args:
        exits: logits (batch, classes) of the exits, the last one being the teacher.
        targets: classes (batch,) or probabilities (batch, classes).
        weights: w_k, one for each exit.
        alpha: weight of the divergence; 0 leaves it away.
        temperature: T; the published commands take 1.
        label_smoothing: of the cross entropy.

    Raises:
        ValueError: not one weight for each exit, or a temperature that is not positive.

    Source: "Dynamic Perceiver for Efficient Visual Recognition", arXiv 2306.11248, section 3.4.

    >>> import torch
    >>> same = [torch.zeros(2, 4)] * 4
    >>> self_distillation_loss(same, torch.tensor([0, 3])) / torch.tensor(4.0).log()
    tensor(3.)
    """
    if len(exits) != len(weights):
        raise ValueError(f"weights={tuple(weights)} must be {len(exits)}, one for each exit")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be positive")
    logits = [exit.float() for exit in exits]
    losses = [
        weight * F.cross_entropy(y, targets, label_smoothing=label_smoothing) for weight, y in zip(weights, logits)
    ]
    if alpha:
        teacher = (logits[-1].detach() / temperature).log_softmax(dim=-1)
        for student in logits[:-1]:
            taught = (student / temperature).log_softmax(dim=-1)
            divergence = F.kl_div(taught, teacher, reduction="batchmean", log_target=True)
            losses.append(alpha * temperature**2 * divergence)
    return torch.stack(losses).sum()
