"""The clock of claims on how time grows: CPU time of one thread, which other programs do not lengthen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch


def thread_seconds(run: Callable[[], object], *, repeats: int = 5, at_least: int | float = 0.5) -> float:
    """Seconds of the fastest run, in CPU time of one thread.

    Runs go on until there were ``repeats`` and they lasted ``at_least`` seconds together: a few runs of two
    milliseconds would measure the machine's mood.

    >>> thread_seconds(lambda: sum(range(1000)), at_least=0) > 0
    True
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run()
        best, spent, runs = math.inf, 0.0, 0
        while runs < repeats or spent < at_least:
            start = time.thread_time()
            run()
            took = time.thread_time() - start
            best, spent, runs = min(best, took), spent + took, runs + 1
    finally:
        torch.set_num_threads(threads)
    return best


def growth(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms: 1 is linear growth, 2 quadratic.

    >>> round(growth((1, 2, 4), (3.0, 12.0, 48.0)), 6)
    2.0
    """
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
