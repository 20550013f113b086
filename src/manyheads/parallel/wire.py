"""The wire: what every scheme of this room does with a process group, so that nothing hangs and errors name a rank.

Before a call moves data, all ranks post what they were called with to the group's store and read what the others
posted: a difference is an error on every rank. Data then travels in batches of asynchronous sends and receives. Waiting
is limited in time; a rank that gives up posts whom it was waiting for, so that the others follow the trail to the rank
that died or stalls, instead of blaming their neighbour.
"""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from manyheads.parallel import recorder
from manyheads.parallel.recorder import Message

Transfer = tuple[Tensor, int, str]  # buffer, the other rank within the group, what it carries
TIMEOUT = 300.0  # seconds; longer than a checkpoint of another rank takes


class RankError(RuntimeError):
    """A rank died, stalls, or failed during a call; ``ranks`` are the culprits within the group."""

    def __init__(self, message: str, ranks: Sequence[int] = ()):
        super().__init__(message)
        self.ranks = tuple(ranks)


@dataclass
class Wire:
    """This rank's end of a process group during one call."""

    group: ProcessGroup | None
    rank: int
    world: int
    members: tuple[int, ...]
    timeout: float
    call: str
    store: Any = None
    prefix: str = ""
    step: int = 0
    on_host: bool = True

    def agree(self, same: dict[str, Any], own: Any = None, error: str = "") -> list[Any]:
        """Post the arguments, read everybody's: ``own`` of all ranks, or an error on all where ``same`` differs."""
        if self.world == 1:
            return [own]
        number = _CALLS[self.prefix].number
        keys = [f"{self.prefix}/{number}/{rank}" for rank in range(self.world)]
        posted = json.dumps({"call": self.call, "same": same, "own": own, "error": error})
        try:
            self._sweep()
            self.store.set(keys[self.rank], posted)
            self._await(keys)
            found = [json.loads(value) for value in self.store.multi_get(keys)]
            # Whoever posted for this call has read everything of the one before.
            self.store.delete_key(f"{self.prefix}/{number - 1}/{self.rank}")
        except (RankError, ValueError):
            self.store.delete_key(keys[self.rank])  # as if this rank had not come: the number stays
            raise
        except Exception as problem:
            raise RankError(f"{self.call}: the store of the process group is gone, its host died: {problem}") from None
        _CALLS[self.prefix].number += 1
        self._compare(found)
        return [one["own"] for one in found]

    def _sweep(self) -> None:
        """Take back what this process told the others when an earlier call went wrong."""
        for key in _LEFT:
            self.store.delete_key(key)
        _LEFT.clear()

    def _tell(self, key: str, content: dict[str, Any]) -> None:
        self.store.set(key, json.dumps(content))
        _LEFT.add(key)

    def _await(self, keys: list[str]) -> None:
        started, pause, told = time.monotonic(), 1e-4, False
        while not self.store.check(keys):
            waited = time.monotonic() - started
            if waited > min(0.5, self.timeout):
                if not told:
                    self._tell(f"manyheads/at/{self.members[self.rank]}", {"members": self.members})
                    told = True
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                self._wrong_group(missing)
                failed = [rank for rank in missing if self._note(rank) is not None]
                if waited > self.timeout or failed:
                    self._give_up(failed or missing, f"did not come to this call within {self.timeout:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _wrong_group(self, missing: list[int]) -> None:
        mine = self.members[self.rank]
        for rank in missing:
            key = f"manyheads/at/{self.members[rank]}"
            if not self.store.check([key]):
                continue
            theirs = json.loads(self.store.get(key))
            error, members = theirs.get("error", ""), theirs.get("members", [])
            if mine in members and list(self.members) != members:
                error = (
                    f"group does not agree over the ranks: global rank {mine} was given the group of global ranks "
                    f"{list(self.members)}, global rank {self.members[rank]} that of {members}"
                )
            if error:
                # Both wait for each other, and others for them: all must hear of it.
                self._tell(f"manyheads/at/{mine}", {"error": error, "members": self.members})
                raise ValueError(f"{self.call}: {error}")

    def _compare(self, found: list[dict]) -> None:
        for rank, one in enumerate(found):
            if one["error"] and rank != self.rank:
                raise ValueError(f"{one['call']}: {self._name(rank)} refused its arguments: {one['error']}")
        if found[self.rank]["error"]:
            return
        views = [{"call": one["call"], **one["same"]} for one in found]
        for name in views[0]:
            values: dict[str, list[int]] = {}
            for rank, view in enumerate(views):
                values.setdefault(json.dumps(view.get(name)), []).append(rank)
            if len(values) > 1:
                said = "; ".join(f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in values.items())
                raise ValueError(f"{self.call}: the ranks disagree on {name}: {said}")

    def exchange(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> Pending:
        """Post sends (buffer, to, what) and receives (buffer, from, what) at once; nothing is there until ``wait``."""
        ops, peers = [], []
        for kind, transfers in (("send", sends), ("receive", receives)):
            for buffer, peer, what in transfers:
                if buffer.numel() == 0:
                    continue
                operation = dist.isend if kind == "send" else dist.irecv
                ops.append(dist.P2POp(operation, buffer, group=self.group, group_peer=peer, tag=_tag(what)))
                peers.append((kind, peer, what))
                size = buffer.numel() * buffer.element_size()
                self._record(what, kind, peer, size if kind == "send" else 0, size if kind == "receive" else 0)
        if not ops:
            return Pending(self, [], [])
        with self._watching([peer for _, peer, _ in peers]):
            works = dist.batch_isend_irecv(ops)
        return Pending(self, works, peers if len(works) == len(peers) else [peers[0]] * len(works))

    def all_gather(self, buffer: Tensor, what: str) -> tuple[Tensor, Pending]:
        """Post one all-gather; the (world, size of buffer) result is there after ``wait``."""
        out = buffer.new_empty(self.world, buffer.numel())
        if self.world == 1:
            out[0] = buffer
            return out, Pending(self, [], [])
        size = buffer.numel() * buffer.element_size()
        self._record(what, "all_gather", -1, size, size * (self.world - 1))
        options = dist.distributed_c10d.AllgatherOptions()
        options.timeout, options.asyncOp = timedelta(seconds=self.timeout), True
        with self._watching(None):
            work = self._pg._allgather_base(out.view(-1), buffer, options)
        return out, Pending(self, [work], [("all_gather", -1, what)])

    def reduce_scatter(self, buffer: Tensor, what: str) -> tuple[Tensor, Pending]:
        """Post one reduce-scatter (sum) of a (world, size) buffer; the own (size,) is there after ``wait``."""
        out = torch.empty_like(buffer[0])
        if self.world == 1:
            out.copy_(buffer[0])
            return out, Pending(self, [], [])
        size = out.numel() * out.element_size() * (self.world - 1)
        self._record(what, "reduce_scatter", -1, size, size)
        options = dist.distributed_c10d.ReduceScatterOptions()
        options.timeout, options.asyncOp = timedelta(seconds=self.timeout), True
        with self._watching(None):
            work = self._pg._reduce_scatter_base(out, buffer.contiguous().view(-1), options)
        return out, Pending(self, [work], [("reduce_scatter", -1, what)])

    def all_reduce(self, buffer: Tensor, what: str) -> Pending:
        """Post one all-reduce (sum) in place. Counted as in a ring: a rank sends 2 (W - 1) / W of the buffer."""
        if self.world == 1:
            return Pending(self, [], [])
        size = 2 * (self.world - 1) * buffer.numel() * buffer.element_size() // self.world
        self._record(what, "all_reduce", -1, size, size)
        options = dist.distributed_c10d.AllreduceOptions()
        options.timeout, options.asyncOp = timedelta(seconds=self.timeout), True
        with self._watching(None):
            work = self._pg.allreduce([buffer], options)
        return Pending(self, [work], [("all_reduce", -1, what)])

    def travel(self, buffer: Tensor, what: str) -> Iterator[tuple[int, Tensor]]:
        """Pass buffers round the ring: yields whose buffer is here, and it, while it is already on its way onward."""
        held, arriving = buffer, torch.empty_like(buffer)
        for step in range(self.world):
            self.step = step
            passing = self.pass_on(held, arriving, what) if step < self.world - 1 else None
            yield (self.rank - step) % self.world, held
            if passing is not None:
                passing.wait()
                held, arriving = arriving, (torch.empty_like(held) if held is buffer else held)

    def pass_on(self, sending: Tensor, receiving: Tensor, what: str) -> Pending:
        """Send to the next rank, receive from the one before."""
        to, source = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        return self.exchange([(sending, to, what)], [(receiving, source, what)])

    def all_to_all(self, buffer: Tensor, what: str) -> tuple[Tensor, Pending]:
        """Post one all-to-all: row p of the (world, size) buffer goes to rank p; row p of the result came from it."""
        out = torch.empty_like(buffer)
        if self.world == 1:
            out.copy_(buffer)
            return out, Pending(self, [], [])
        size = buffer[0].numel() * buffer.element_size() * (self.world - 1)
        self._record(what, "all_to_all", -1, size, size)
        options = dist.distributed_c10d.AllToAllOptions()
        options.timeout, options.asyncOp = timedelta(seconds=self.timeout), True
        with self._watching(None):
            work = self._pg.alltoall_base(out.view(-1), buffer.contiguous().view(-1), [], [], options)
        return out, Pending(self, [work], [("all_to_all", -1, what)])

    @contextmanager
    def guard(self):
        """Whatever goes wrong inside, on this rank alone, is posted before it is raised: the others then name it."""
        try:
            yield
        except RankError:
            raise
        except BaseException as problem:
            self._post({"error": f"{type(problem).__name__}: {problem}"})
            raise

    @property
    def _pg(self) -> ProcessGroup:
        assert self.group is not None
        return self.group

    def _record(self, what: str, kind: str, peer: int, sent: int, received: int) -> None:
        distance = (peer - self.rank) % self.world if peer >= 0 else 0
        recorder.note(Message(self.call, what, kind, peer, distance, self.step, sent, received))

    @contextmanager
    def _watching(self, peers: Sequence[int] | None):
        """Turn an error of the backend into one that names the rank where the trail ends; None suspects everybody."""
        try:
            yield
        except RuntimeError as problem:
            others = [rank for rank in range(self.world) if rank != self.rank]
            late = "time" in str(problem).lower()
            reason = f"did not answer within {self.timeout:g} s" if late else "closed its connection"
            # A rank that gives up closes its connections a moment before it can say for whom it waited.
            self._give_up(others if peers is None else list(peers), reason, grace=min(5.0, 1 + self.timeout / 10))

    def _give_up(self, suspects: list[int], reason: str, grace: float = 0.0) -> None:
        self._post({"waiting": suspects})
        culprits = self._trail(suspects, grace)
        notes = {rank: self._note(rank) or {} for rank in culprits}
        names = " and ".join(
            f"{self._name(rank)} " + (f"failed: {notes[rank]['error']}" if "error" in notes[rank] else reason)
            for rank in culprits
        )
        raise RankError(
            f"{self.call}, step {self.step}: {names} (seen from {self._name(self.rank)}); a rank that died, stalls or "
            "skipped this call leaves the group unusable: end this process and start again from the last checkpoint",
            culprits,
        ) from None

    def _trail(self, suspects: list[int], grace: float) -> list[int]:
        """Follow who waits for whom to the ranks that wait for nobody (they say nothing, or say what went wrong)."""
        deadline = time.monotonic() + grace
        while True:
            seen, open_, silent, failed = {self.rank}, list(suspects), [], []
            while open_:
                rank = open_.pop()
                if rank in seen:
                    continue
                seen.add(rank)
                note = self._note(rank)
                if note is None:
                    silent.append(rank)
                elif "error" in note:
                    failed.append(rank)
                else:
                    open_ += note["waiting"]
            if failed or time.monotonic() >= deadline:
                return sorted(failed or silent or suspects)
            time.sleep(0.02)

    def _name(self, rank: int) -> str:
        world_rank = self.members[rank]
        return f"rank {rank}" if world_rank == rank else f"rank {rank} (global rank {world_rank})"

    def _note(self, rank: int) -> dict | None:
        key = f"{self.prefix}/note/{rank}"
        try:
            return json.loads(self.store.get(key)) if self.store.check([key]) else None
        except Exception:  # the store went with its host: no note can be read
            return None

    def _post(self, content: dict) -> None:
        if self.world == 1:
            return
        try:
            self._tell(f"{self.prefix}/note/{self.rank}", content)
        except Exception:  # the store went with its host: nobody can read this any more
            return


@dataclass
class Pending:
    """Transfers on their way."""

    wire: Wire
    works: list
    peers: list[tuple[str, int, str]]

    def wait(self) -> None:
        """Return when all of it has arrived; raise RankError when it does not."""
        # Receives first: a missing message says more than a send that nobody takes.
        for (_, peer, _), work in sorted(zip(self.peers, self.works), key=lambda pair: pair[0][0] != "receive"):
            with self.wire._watching(None if peer < 0 else [peer]):
                if self.wire.on_host and peer < 0:
                    self._wait_for_all(work)
                elif self.wire.on_host:
                    work.wait(timedelta(seconds=self.wire.timeout))
                else:
                    work.wait()  # on a GPU this orders streams; a limit would stop the host at every step
        self.works, self.peers = [], []

    def _wait_for_all(self, work: Any) -> None:
        """Wait for a collective; a rank that has given up ends the waiting of all others."""
        deadline, rank = time.monotonic() + self.wire.timeout, self.wire.rank
        while True:
            try:
                work.wait(timedelta(seconds=min(0.5, self.wire.timeout)))
                return
            except RuntimeError:
                gave_up = any(self.wire._note(other) is not None for other in range(self.wire.world) if other != rank)
                if work.is_completed() or gave_up or time.monotonic() > deadline:
                    raise


@dataclass
class _Calls:
    """How many calls a group has made; the store is held so that a new one is told from it."""

    store: Any
    number: int = 0


_CALLS: dict[str, _Calls] = {}
_LEFT: set[str] = set()  # what this process told about itself in a call that went wrong
_TAGS = {"key, value": 1, "gradient of key, value": 2, "query": 3, "output": 4}


def connect(
    call: str, group: Any, timeout: int | float, describe: Callable[[Wire], tuple[dict[str, Any], Any]]
) -> tuple[Wire, list[Any]]:
    """Open the wire for a call; ``describe`` checks this rank's arguments: what must agree, and what may differ.

    Returns:
        The wire, and what may differ of all ranks.

    Raises:
        ValueError: no process group or the wrong one, or arguments that do not agree over the ranks.
        RankError: a rank did not come to this call.
    """
    wire = _open(call, group, timeout)
    try:
        same, own = describe(wire)
    except (TypeError, ValueError) as problem:
        wire.agree({}, error=str(problem))
        raise
    return wire, wire.agree(same, own)


def eager(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` kept out of torch.compile: the ranks talk to each other on the host, so the graph breaks here."""
    return torch.compiler.disable(call) if torch.compiler.is_compiling() else call


def reconnect(wire: Wire, call: str, same: dict[str, Any] | None = None) -> Wire:
    """The wire of a later phase of the same call (its backward pass), after all ranks have come to it."""
    again = dataclasses.replace(wire, call=call, step=0)
    again.agree(same or {})
    return again


def _open(call: str, group: Any, timeout: int | float) -> Wire:
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{call}: there is no process group: start the program with torchrun and call "
            "torch.distributed.init_process_group first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh with dimensions {group.mesh_dim_names}: pass the one that splits the sequence, "
                "mesh['cp'] for example"
            )
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"group must be a process group that this rank belongs to, or a one-dimensional device mesh, got {group!r}"
        )
    members = tuple(dist.get_process_group_ranks(group))
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not in the group of global ranks {list(members)}")
    store = dist.distributed_c10d._get_default_store()
    prefix = f"manyheads/{zlib.crc32(repr(members).encode()):08x}"
    if prefix not in _CALLS or _CALLS[prefix].store is not store:
        _CALLS[prefix] = _Calls(store)
    on_host = dist.get_backend(group) == "gloo"
    return Wire(group, rank, len(members), members, float(timeout), call, store, prefix, on_host=on_host)


def _tag(what: str) -> int:
    return _TAGS.get(what, 0)
