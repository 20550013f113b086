"""Ranks on this machine: processes that run a function together over gloo, to try a scheme without torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


class LocalRanks:
    """W processes on this machine that form a process group and run the functions that they are given.

    They start once (some seconds, most of it importing torch) and serve any number of calls. A context manager: leaving
    it ends the processes.

    Args:
        world: W, number of ranks.
        timeout: seconds that a call may take.
        preload: modules that are imported once for all ranks, where the system can fork; the first pool that this
            process starts decides.

    Raises:
        ValueError: fewer than one rank.

    Source: not from a paper; the miniatures of the claims of arXiv 2105.13120, 2412.20501 and 2502.07563 run on it.

    >>> import operator
    >>> with LocalRanks(2) as ranks:
    ...     ranks.run(operator.add, 1, 2)
    [3, 3]
    """

    def __init__(self, world: int, *, timeout: int | float = 100.0, preload: Sequence[str] = ()):
        if world < 1:
            raise ValueError(f"world must be at least 1, got {world}")
        self.world, self.timeout = world, float(timeout)
        context = _context(preload)
        # The store lives here, not on a rank: it outlives any of them, so that the others can say who died.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, self._store.port, theirs, list(sys.path))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank at once, and what each rank returned, in the order of the ranks.

        Args:
            function: importable by name, as are the functions for multiprocessing. It finds the group in
                ``torch.distributed``.
            args: anything that pickles, the same for all ranks.

        Raises:
            RuntimeError: a rank raised, ended or took longer than the timeout; the message says which and why.
        """
        outcomes = self._ask(function, args)
        failed = {rank: result for rank, (raised, result) in enumerate(outcomes) if raised}
        if failed:
            said = "\n".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in failed.items())
            raise RuntimeError(f"{len(failed)} of {self.world} ranks failed\n{said}") from next(iter(failed.values()))
        return [result for _, result in outcomes]

    def attempt(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As :meth:`run`, but an exception is the result of the rank that raised it."""
        return [result for _, result in self._ask(function, args)]

    def _ask(self, function: Callable[..., Any], args: tuple) -> list[tuple[bool, Any]]:
        """(whether it raised, result or exception) of every rank."""
        request = pickle.dumps((function, args))
        for pipe in self._pipes:
            try:
                pipe.send_bytes(request)
            except OSError:
                continue  # a rank that ended earlier: found out below
        late = TimeoutError(f"no result within {self.timeout:g} s")
        results: list[tuple[bool, Any]] = [(True, late)] * self.world
        waiting, deadline = dict(zip(self._pipes, range(self.world))), time.monotonic() + self.timeout
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(pipe)  # pyright: ignore[reportArgumentType]
                try:
                    results[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    self._processes[rank].join(5)
                    ended = ProcessLookupError(f"ended with exit code {self._processes[rank].exitcode}")
                    results[rank] = True, ended
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def group_of(world: int) -> Any:
    """The group of the first ``world`` ranks, None on the others; all ranks must call it, and it is made once."""
    if world == dist.get_world_size():
        return dist.group.WORLD
    if world not in _GROUPS:
        group = dist.new_group(list(range(world)))
        _GROUPS[world] = group if dist.get_rank() < world else None
    return _GROUPS[world]


_GROUPS: dict[int, Any] = {}


def _context(preload: Sequence[str]):
    # A fork server imports torch once and forks it for every rank; where there is none, every rank imports it.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The first call of a custom operator imports torch._dynamo, which takes as long as importing torch.
    context.set_forkserver_preload(["manyheads.parallel", "torch._dynamo", *preload])
    return context


def _serve(rank: int, world: int, port: int, pipe: Connection, path: Sequence[str]) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the owner closed the pipe or ended; a group in an unknown state is not waited for
        except BaseException as problem:
            outcome: tuple[bool, Any] = True, problem
        else:
            outcome = _outcome(function, args)
        try:
            answer = pickle.dumps(outcome)
        except Exception as problem:
            answer = pickle.dumps((True, TypeError(f"the result cannot be sent back: {problem}")))
        pipe.send_bytes(answer)


def _outcome(function: Callable[..., Any], args: tuple) -> tuple[bool, Any]:
    try:
        return False, function(*args)
    except Exception as problem:
        problem.add_note(traceback.format_exc())
        return True, problem
