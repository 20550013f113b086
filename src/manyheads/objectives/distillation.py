"""Distilling a model into a cheaper version of itself through hidden states, and paying for what stays expensive.

DuoAttention optimises one gate per key/value head with::

    L_distill = 1/|M| sum_{t in M} mean_over_channels (h_full[t] - h_mixed[t])^2
    L_reg     = mean over all gates of |gate|
    L         = L_distill + 0.05 * L_reg

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819,
section 2.2.
"""

from __future__ import annotations

from torch import Tensor


def hidden_distillation(student: Tensor, teacher: Tensor, supervised: Tensor | None = None) -> Tensor:
    """Mean squared difference of hidden states over the supervised positions, in float32.

    Args:
        student: (batch, tokens, channels), here the hidden states after the final norm with mixed attention.
        teacher: same shape, those of the unchanged model; no gradient flows into it.
        supervised: boolean (batch, tokens), the positions M that count; None for all.

    Returns:
        A scalar. Channels are averaged first, then positions, so that every supervised token weighs the same.

    Raises:
        ValueError: shapes that differ, or no supervised position.

    Source: arXiv 2410.10819, equation 2.

    >>> import torch
    >>> hidden_distillation(torch.ones(1, 3, 4), torch.zeros(1, 3, 4), torch.tensor([[False, True, True]]))
    tensor(1.)
    """
    if student.shape != teacher.shape or student.ndim != 3:
        raise ValueError(
            "student and teacher must share a shape (batch, tokens, channels), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    error = (student.float() - teacher.detach().float()).square().mean(dim=-1)
    if supervised is None:
        return error.mean()
    if tuple(supervised.shape) != tuple(error.shape):
        raise ValueError(f"supervised must be {tuple(error.shape)}, got {tuple(supervised.shape)}")
    supervised = supervised.to(error.device).bool()
    if not supervised.any():
        raise ValueError("supervised marks no position at all")
    return error[supervised].mean()


def gate_regulariser(gates: Tensor) -> Tensor:
    """Mean absolute gate: what a head pays for keeping its whole context.

    Source: arXiv 2410.10819, equation 3 (the paper sums; the code averages, which is done here).

    >>> import torch
    >>> gate_regulariser(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor(0.5000)
    """
    if gates.numel() == 0:
        raise ValueError("gates is empty")
    return gates.abs().mean()
