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
    total, out = torch.zeros_like(peak), torch.zeros_like(outputs[0], dtype=wide)
    for part, log in zip(outputs, logs):
        weight = (log - peak).exp()
        total = total + weight
        # A kernel may leave anything in the output of a row without keys: 0 * nan must not get through.
        out = out + torch.where((log == -math.inf)[..., None], 0, part.to(wide) * weight[..., None])
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -math.inf, peak + total.log())
    return (out / total[..., None]).to(outputs[0].dtype), lse


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
