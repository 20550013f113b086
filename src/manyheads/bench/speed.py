"""Timing functions against each other: same inputs, one process, interleaved, medians, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """What one function cost: median seconds of a call, and peak bytes allocated during a call beyond its inputs."""

    seconds: float
    peak_bytes: int


def with_backward(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """``function`` followed by its gradients for all inputs, for a fixed gradient of ones."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return run


def measure(
    functions: dict[str, Callable[..., object]],
    inputs: Sequence[Tensor] = (),
    *,
    repeats: int = 7,
    budget: float = 20.0,
    memory: bool = True,
) -> dict[str, Timing]:
    """Medians of all functions on the same inputs, called in turn so that a slow moment of the machine hits all.

    Args:
        functions: name to function; every one is called as ``f(*inputs)``.
        inputs: tensors given to every function; their device decides how time is taken.
        repeats: calls of each function after one warm-up call.
        budget: seconds for all repeats together; at least two rounds are made.
        memory: also measure the peak of one further call (about twice as slow, not timed).

    >>> import torch
    >>> timing = measure({"add": lambda x: x + x}, [torch.ones(1000)], repeats=3)["add"]
    >>> timing.seconds > 0, timing.peak_bytes
    (True, 4000)
    """
    cuda = any(x.is_cuda for x in inputs)
    for function in functions.values():
        function(*inputs)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 2 and time.perf_counter() - started > budget:
            break
        for name, function in functions.items():
            seconds[name].append(_time(function, inputs, cuda))
    return {
        name: Timing(statistics.median(seconds[name]), peak_bytes(function, inputs) if memory else 0)
        for name, function in functions.items()
    }


def _time(function: Callable[..., object], inputs: Sequence[Tensor], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*inputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(function: Callable[..., object], inputs: Sequence[Tensor] = ()) -> int:
    """Most bytes that torch held at once during ``function(*inputs)``, beyond what was held before the call."""
    if any(x.is_cuda for x in inputs):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs)
        return torch.cuda.max_memory_allocated() - before
    # torch keeps no peak for the CPU: the profiler's record of every allocation and release gives it.
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*inputs)
    results = profile.profiler.kineto_results if profile.profiler else None
    events = [] if results is None else [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak
