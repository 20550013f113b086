"""How the learning rate changes: a linear warm-up, half a cosine, some epochs at the lowest rate.

::

    rate(t) = warmup_lr + (lr - warmup_lr) t / W                   t < W
              min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2       W <= t < T
              min_lr                                               T <= t
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_schedule(
    optimizer: Optimizer, *, steps: int, warmup: int = 0, cooldown: int = 0, warmup_lr: float = 0.0, min_lr: float = 0.0
) -> LambdaLR:
    """The schedule of most vision recipes, step by step.

    Args:
        optimizer: its rates are the peaks; groups with a smaller one follow in proportion.
        steps: all of them, ``T + cooldown``.
        warmup: first steps, W.
        cooldown: last steps, at the lowest rate.
        warmup_lr, min_lr: where the rate starts and ends, as shares of the peak.

    Raises:
        ValueError: no step left between warm-up and cool-down.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    >>> schedule = cosine_schedule(optimizer, steps=6, warmup=2, cooldown=2, min_lr=0.1)
    >>> [round(2 * schedule.lr_lambdas[0](step), 2) for step in range(6)]
    [0.0, 1.0, 1.1, 0.46, 0.2, 0.2]
    """
    falling = steps - cooldown
    if warmup < 0 or cooldown < 0 or warmup >= max(falling, 1):
        raise ValueError(f"warmup={warmup} and cooldown={cooldown} leave none of steps={steps}")

    def share(step: int) -> float:
        if step < warmup:
            return warmup_lr + (1 - warmup_lr) * step / warmup
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * min(step / falling, 1.0)))

    return LambdaLR(optimizer, share)
