"""Merging partial results of softmax attention through their log-sum-exp.

Attention over the union of disjoint key sets s, from each set's output O_s and lse_s::

    lse = ln sum_s exp(lse_s)        O = sum_s exp(lse_s - lse) O_s

Source: the rescaling of "Online normalizer calculation for softmax", arXiv 1805.02867, as used between devices by
"Ring Attention with Blockwise Transformers", arXiv 2310.01889.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manyheads.engines.common import FLOATS, accumulation_dtype


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of key sets from the results over each set.

    The order of the sets changes the result by float32 rounding only. To merge as partial results arrive, merge the
    running pair with the next one, keeping the running output in float32.

    Args:
        outputs: tensors (..., value_dim), one a set, of one shape.
        lses: tensors (...), the natural log of each set's sum of exponentials; -inf where a row saw no key of the
            set, whose output is then ignored.

    Returns:
        The output, in the dtype of the outputs, and its lse (float32, or float64 for float64 outputs). Rows that are
        empty in every set give zeros and -inf, and no gradient.

    Raises:
        TypeError: something that is not a floating-point tensor, or outputs of different dtypes.
        ValueError: no sets, as many outputs as lses, or shapes that do not fit.

    Source: "Online normalizer calculation for softmax", arXiv 1805.02867.

    >>> import torch
    >>> from manyheads.engines.dense import attention
    >>> q, k, v = torch.randn(3, 1, 2, 6, 4)
    >>> halves = [attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 3), slice(3, 6))]
    >>> out, lse = merge(*zip(*halves))
    >>> torch.allclose(out, attention(q, k, v), atol=1e-6)
    True
    """
    _check(outputs, lses)
    wide = accumulation_dtype(outputs[0].dtype)
    logs = [lse.to(wide) for lse in lses]
    peak = logs[0].detach()
    for log in logs[1:]:
        peak = torch.maximum(peak, log.detach())
    peak = torch.where(peak == -math.inf, 0, peak)
    weights = [(log - peak).exp() for log in logs]
    total = torch.stack(weights).sum(0)
    empty = total == 0
    total = torch.where(empty, 1, total)
    # The shares are normalised while they are small, so that each output is read once.
    out = torch.zeros_like(outputs[0], dtype=wide)
    for part, log, weight in zip(outputs, logs, weights):
        # A kernel may leave anything in the output of a row without keys: 0 * nan must not get through.
        part = part.to(wide).masked_fill((log == -math.inf)[..., None], 0)
        out = torch.addcmul(out, part, (weight / total)[..., None])
    lse = torch.where(empty, -math.inf, peak + total.log())
    return out.to(outputs[0].dtype), lse


def grouped_softmax(scores: Tensor, groups: Tensor, gates: Tensor, *, own: Tensor | None = None) -> Tensor:
    """Weights in two levels: a softmax over groups by their gates, times a softmax over the keys inside each group.

    The same as merging the groups' attention outputs with the gates in the place of their log-sum-exps. With groups
    that are blocks and gates that are the scores of the blocks' landmarks, this is landmark attention.

    Args:
        scores: (..., keys), floating point.
        groups: int64, broadcasts to scores: the group of each key, negative for a key that takes no part.
        gates: (..., groups), logit of each group; -inf hides the group with its keys. A group that has no key keeps
            its share of the first level, so that the weights then sum to less than one.
        own: boolean, broadcasts to gates: True for groups whose gate is the log-sum-exp of their own scores (the
            entry in ``gates`` is not read). Keys of such groups weigh against the other gates one by one.

    Returns:
        Weights (..., keys) in the dtype of the scores; zeros where no group is left.

    Raises:
        TypeError: groups that are not int64, or scores or gates that are not floating point.
        ValueError: shapes that do not fit.

    Source: "Landmark Attention: Random-Access Infinite Context Length for Transformers", arXiv 2305.16300, section 3.1.

    >>> import torch
    >>> scores, groups = torch.zeros(4), torch.tensor([0, 0, 0, 1])
    >>> grouped_softmax(scores, groups, torch.zeros(2))
    tensor([0.1667, 0.1667, 0.1667, 0.5000])
    """
    if groups.dtype != torch.int64:
        raise TypeError(f"groups must be an int64 tensor, got {groups.dtype}")
    if scores.dtype not in FLOATS or gates.dtype not in FLOATS:
        raise TypeError(f"scores and gates must be floating point, got {scores.dtype} and {gates.dtype}")
    try:
        groups = groups.expand_as(scores)
        gates = gates.expand(*scores.shape[:-1], gates.shape[-1])
        own = None if own is None else own.expand_as(gates)
    except RuntimeError as error:
        raise ValueError(f"groups, gates or own does not broadcast to scores {tuple(scores.shape)}: {error}") from None
    result, wide = scores.dtype, accumulation_dtype(scores.dtype)
    scores, gates, member = scores.to(wide), gates.to(wide), groups >= 0
    groups = torch.where(member, groups, 0)
    member = member & (scores != -math.inf)
    low = torch.full_like(gates, -math.inf)
    peaks = low.scatter_reduce(-1, groups, torch.where(member, scores.detach(), -math.inf), "amax")
    peaks = torch.where(peaks == -math.inf, 0, peaks)
    parts = torch.where(member, (torch.where(member, scores, 0) - peaks.gather(-1, groups)).exp(), 0)
    sums = torch.zeros_like(gates).scatter_add(-1, groups, parts)
    safe = torch.where(sums == 0, 1, sums)
    if own is not None:
        gates = torch.where(own, torch.where(sums == 0, -math.inf, peaks + safe.log()), gates)
    peak = gates.detach().amax(-1, keepdim=True) if gates.shape[-1] else gates.new_zeros(())
    shares = (gates - torch.where(peak == -math.inf, 0, peak)).exp()
    total = shares.sum(-1, keepdim=True)
    factor = shares / torch.where(total == 0, 1, total) / safe
    return parts.mul(factor.gather(-1, groups)).to(result)


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(f"merge needs one lse for each output and at least one, got {len(outputs)} and {len(lses)}")
    for index, (out, lse) in enumerate(zip(outputs, lses)):
        if not isinstance(out, Tensor) or not isinstance(lse, Tensor):
            raise TypeError(f"outputs[{index}] and lses[{index}] must be tensors")
        if out.dtype not in FLOATS or lse.dtype not in FLOATS:
            raise TypeError(f"outputs[{index}] and lses[{index}] must be floating point: {out.dtype}, {lse.dtype}")
        if out.dtype != outputs[0].dtype:
            raise TypeError(f"outputs must share a dtype, got {outputs[0].dtype} and {out.dtype}")
        if out.shape != outputs[0].shape:
            raise ValueError(f"outputs must share a shape, got {tuple(outputs[0].shape)} and {tuple(out.shape)}")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"lses[{index}] must have shape {tuple(out.shape[:-1])}, got {tuple(lse.shape)}")
