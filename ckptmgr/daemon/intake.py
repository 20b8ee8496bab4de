"""What host memory holds: buffers found on disk, and which sealed snapshot is written next."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ckptmgr.daemon.log import event, label_of, warning
from ckptmgr.daemon.notify import Supervisor
from ckptmgr.daemon.spool import Spool
from ckptmgr.errors import HostMemoryError, HostMemoryFullError
from ckptmgr.repository.history import furthest
from ckptmgr.staging.bufferfile import Capacity, is_unnamed
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.inbox import BUFFERS
from ckptmgr.staging.reached import reached
from ckptmgr.types import Binding, Outcome, Reach, Snapshot, StepId

_RESULTS_MAX = 1000
"""Decided steps remembered per buffer for `wait`; older ones are looked up in the store."""

_MORTAL = "will not survive the daemon"

_REACHED_MAX = 8
"""Attempts of a job of which it is remembered how far they came after their buffers are freed; the
store has what is older."""

_WASTE_MAX = 1.5
"""A buffer is adopted if the new layout fills it to 1/1.5 at least; else memory lies idle."""


def pick(
    snapshots: list[tuple[Snapshot, Outcome]],
    *,
    writer_alive: bool,
    skipped: frozenset[int] = frozenset(),
) -> Snapshot | None:
    """The undecided snapshot to write next; those with a generation in `skipped` are left alone:
    they are on their way, in the spool, or have failed by a fault of ours.

    In order while the job runs. When its trainer is dead the newest goes first: it is what the
    next attempt resumes from, and the host may be the next to go.
    """
    undecided = [
        snapshot
        for snapshot, outcome in snapshots
        if not outcome.decided and snapshot.generation not in skipped
    ]
    if not undecided:
        return None
    return (min if writer_alive else max)(undecided, key=lambda s: s.generation)


@dataclass(slots=True)
class Held:
    """One host buffer in the daemon's care.

    `owner` is the session that it was given to; None when that is over, though its trainer may live
    on without a connection. `worker` writes its snapshots. `results` are by nonce and step:
    attempts are numbered anew in a store that was emptied. `busy` are the snapshots on their way,
    by generation: being written, or waiting for the other ranks; `writing` is the generation of the
    one that is written now, or could not be written whole: its slot was taken. `spool` is where
    they go when the store does not take them. `retry_at` is when a write that failed is tried
    again, in Unix seconds, for people.
    """

    buffer: HostBuffer
    note: str = ""
    writer_alive: bool = False
    max_d2h_gbps: float = 0.0
    owner: Any = None
    worker: asyncio.Task[None] | None = None
    orphaned_at: float = field(default_factory=time.monotonic)
    free_when_decided: bool = False
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    decided: asyncio.Condition = field(default_factory=asyncio.Condition)
    results: OrderedDict[tuple[str, int], tuple[Outcome, str]] = field(default_factory=OrderedDict)
    last_failure: str = ""
    retry_at: float = 0.0
    busy: dict[int, Snapshot] = field(default_factory=dict)
    writing: int = 0
    spool: Spool | None = None
    _freed: bool = False
    _faulted: int = 0
    _skipped: frozenset[int] = frozenset()
    _damaged: set[tuple[int, int]] = field(default_factory=set)

    @property
    def binding(self) -> Binding:
        """Whose buffer it is."""
        return self.buffer.binding

    @property
    def orphaned_seconds(self) -> float:
        """How long the buffer has been without a writer."""
        return 0.0 if self.writer_alive else time.monotonic() - self.orphaned_at

    @property
    def superseded_by(self) -> int | None:
        """The newer attempt that has taken over from a trainer that still runs."""
        newest = self.buffer.superseded_by
        stale = self.owner is not None and self.writer_alive and newest > self.owner.attempt
        return newest if stale else None

    def snapshots(self) -> list[tuple[Snapshot, Outcome]]:
        """The sealed snapshots with their outcomes, oldest first; damaged slots are left out."""
        found: list[tuple[Snapshot, Outcome]] = []
        if self._freed:
            return found
        for slot in range(self.buffer.capacity.slots):
            try:
                snapshot = self.buffer.snapshot(slot)
            except HostMemoryError as error:
                self.tell_damage(slot, error)
                continue
            if snapshot is not None:
                found.append((snapshot, self.buffer.outcome(snapshot)))
        return sorted(found, key=lambda pair: pair[0].generation)

    def tell_damage(self, slot: int, error: HostMemoryError) -> None:
        """Once for each snapshot: it is met again at every look."""
        found = (slot, self.buffer.state(slot)[1])
        if found not in self._damaged:
            self._damaged.add(found)
            job, why = label_of(self.binding.url), error.message
            warning("slot_damaged", job=job, buffer=self.buffer.id, slot=slot, why=why)

    def how_lost(self, gone: Snapshot) -> str | None:
        """How a snapshot was lost that is undecided and not in its slot any more, in a word of
        `metrics.DROPPED`; None if it was not: its part is stored, and its step may be committed.
        """
        if gone.generation in self.busy and gone.generation != self.writing:
            return None
        if (gone.slot, gone.generation) in self._damaged:
            return "damaged"
        return "writing" if gone.generation == self.writing else "waiting"

    def let_go(self) -> None:
        """The trainer is gone: what it sealed is finished now, and its memory is freed in time."""
        self.owner = None
        self.writer_alive = False
        self.orphaned_at = time.monotonic()
        self.wake.set()

    def died(self) -> None:
        """The trainer is dead, if it was not known to be."""
        if self.writer_alive:
            event("trainer_died", buffer=self.buffer.id, undecided=self.undecided() > 0)
            self.let_go()

    def free(self) -> None:
        """End the worker and give the memory back."""
        self._freed = True
        if self.worker is not None:
            self.worker.cancel()
        self.buffer.unlink()
        self.buffer.close()

    def next(self) -> Snapshot | None:
        """The snapshot to write next."""
        found = self.snapshots()
        spooled = {snapshot.generation for snapshot, _ in found if self._in_spool(snapshot)}
        skipped = self._skipped.union(self.busy, spooled)
        return pick(found, writer_alive=self.writer_alive, skipped=skipped)

    def waits_behind(self, snapshot: Snapshot) -> bool:
        """Whether a newer snapshot waits for this one to be written."""
        found = self.next()
        return found is not None and found.generation > snapshot.generation

    def spool_into(self, spool: Spool | None) -> None:
        """Spool its snapshots there where the store does not take them.

        A daemon that was killed between the last sync of the spool and the mark in the slot has
        left the slot taken: nobody would write that snapshot again, nor free it in the outage.
        """
        self.spool = spool
        for snapshot, outcome in self.snapshots():
            if not outcome.decided and self._in_spool(snapshot):
                self.buffer.settle(snapshot.slot, snapshot.generation, Outcome.SPOOLED)

    def _in_spool(self, snapshot: Snapshot) -> bool:
        return self.spool is not None and self.spool.holds(snapshot)

    def faulted(self, snapshot: Snapshot, error: BaseException) -> bool:
        """Take note of a fault of ours over a snapshot; True if it is the second in a row.

        It is left alone then, or it would end in the same fault for ever. Nothing is lost: it stays
        undecided in host memory, can be resumed from, and the next daemon tries again. Only those
        who wait are told that it was given up.
        """
        again, self._faulted = self._faulted == snapshot.generation, snapshot.generation
        if again:
            sealed = {found.generation for found, _ in self.snapshots()}
            self._skipped = (self._skipped & sealed) | {snapshot.generation}
            self.last_failure = f"a fault of the daemon: {error!r}"
            self._remember(snapshot.nonce, snapshot.step, Outcome.ABORTED, self.last_failure)
        return again

    def undecided(self) -> int:
        """How many snapshots are not decided yet, without those in the spool."""
        return sum(
            not outcome.decided and not self._in_spool(snapshot)
            for snapshot, outcome in self.snapshots()
        )

    async def settle(self, snapshot: Snapshot, outcome: Outcome, why: str = "") -> None:
        """Record what became of a snapshot, in the buffer and for those who wait."""
        if self.buffer.unchanged(snapshot):  # else its slot may be settled for a newer one already
            self.buffer.settle(snapshot.slot, snapshot.generation, outcome)
        if outcome.decided:
            self._remember(snapshot.nonce, snapshot.step, outcome, why)
        await self.tell()

    async def settle_step(self, nonce: str, step: int, outcome: Outcome, why: str = "") -> None:
        """Record what became of a step whose slot may hold another one by now."""
        for snapshot, before in self.snapshots():
            if (snapshot.nonce, snapshot.step) == (nonce, step) and not before.decided:
                await self.settle(snapshot, outcome, why)
        self._remember(nonce, step, outcome, why)
        self.wake.set()
        await self.tell()

    def _remember(self, nonce: str, step: int, outcome: Outcome, why: str) -> None:
        self.results[nonce, step] = (outcome, why)
        while len(self.results) > _RESULTS_MAX:
            self.results.popitem(last=False)

    async def tell(self) -> None:
        """Let those who wait look again."""
        async with self.decided:
            self.decided.notify_all()

    async def wait_decided(self) -> None:
        """Return when no snapshot of the buffer is undecided."""
        async with self.decided:
            await self.decided.wait_for(lambda: not self.undecided())


def make_buffer(
    directory: Path,
    binding: Binding,
    capacity: Capacity,
    keep: Callable[[HostBuffer], bool] = lambda _: False,
) -> tuple[HostBuffer, str]:
    """A new buffer, and what a person should do about it.

    Where the tmpfs is too small (containers have 64 MiB) the job is not failed: the buffer is made
    without a name. It then survives the trainer, but not the daemon, unless somebody can `keep` it.

    Raises:
        HostMemoryFullError: not enough memory either way.
    """
    try:
        return HostBuffer.create(directory, binding, capacity), ""
    except HostMemoryFullError as error:
        buffer = HostBuffer.create_unnamed(binding, capacity)
        lasts = "lasts as long as the daemon's unit runs" if keep(buffer) else _MORTAL
        note = f"host memory {lasts}: {error}"
        warning("shared_memory_small", buffer=buffer.id, why=note)
        return buffer, note


class Intake:
    """All host buffers below a runtime directory."""

    def __init__(self, runtime: Path, supervisor: Supervisor | None = None) -> None:
        self._directory = runtime / BUFFERS
        self._supervisor = supervisor or Supervisor()
        self.held: dict[str, Held] = {}
        self._left: dict[str, dict[int, Reach]] = {}

    def adopt(self) -> list[Held]:
        """Open every buffer that a daemon before this one left; returns the new ones."""
        found = []
        for path in sorted(self._directory.iterdir()):
            if path.name.startswith("."):
                path.unlink(missing_ok=True)  # a header that was never finished
                continue
            if path.stem not in self.held:
                found += self._adopt(path.name, partial(HostBuffer.open, path))
        for fd in self._supervisor.buffers():
            found += self._adopt(f"descriptor {fd}", partial(HostBuffer.of_descriptor, fd))
        return found

    def _adopt(self, name: str, opened: Callable[[], HostBuffer]) -> list[Held]:
        try:
            held = Held(opened())
        except HostMemoryError as error:
            # Not deleted: it may hold the only copy of something a newer version understands.
            warning("buffer_refused", path=name, why=error.message)
            return []
        held.writer_alive = held.buffer.has_live_writer()
        self.held[held.buffer.id] = held
        unnamed = is_unnamed(held.buffer.path)  # from systemd's descriptor store
        event("adopted", buffer=held.buffer.id, snapshots=len(held.snapshots()), unnamed=unnamed)
        return [held]

    def _keep(self, buffer: HostBuffer) -> bool:
        return self._supervisor.keep(buffer.id, buffer.fileno())

    def place_for(self, binding: Binding, capacity: Capacity, own: str = "") -> tuple[Held, bool]:
        """A buffer for a writer: its own, one of a dead writer of the same rank, or a new one.

        `own` is the id of the buffer that a writer has kept over the death of a daemon. The flag
        says whether the buffer is new.

        Raises:
            HostMemoryError: not enough shared memory.
        """
        if own in self.held:
            return self.held[own], False
        for held in self.held.values():
            buffer = held.buffer
            fits = buffer.capacity.slots == capacity.slots and buffer.capacity.holds(
                capacity.table_bytes, capacity.data_bytes
            )
            same = (buffer.binding.url, buffer.binding.rank) == (binding.url, binding.rank)
            tight = buffer.capacity.file_bytes <= capacity.file_bytes * _WASTE_MAX
            same_options = (buffer.binding.codec, buffer.binding.keep) == (
                binding.codec,
                binding.keep,
            )
            if same and fits and tight and same_options and not buffer.has_live_writer():
                if buffer.is_reachable():
                    return held, False
                held.free_when_decided = True
                warning("buffer_vanished", buffer=buffer.id, path=str(buffer.path))
        self._free_for(binding)
        held = Held(*make_buffer(self._directory, binding, capacity, self._keep))
        self.held[held.buffer.id] = held
        return held, True

    def _free_for(self, binding: Binding) -> None:
        """Let go of dead buffers of the same rank that do not fit any more and hold nothing new."""
        for held in list(self.held.values()):
            same = (held.binding.url, held.binding.rank) == (binding.url, binding.rank)
            used = held.owner is not None or held.busy or held.buffer.has_live_writer()
            if same and not used and not held.snapshots():
                self.release(held)

    def of_job(self, url: str) -> list[Held]:
        """The buffers of all ranks of a job on this host."""
        return [held for held in self.held.values() if held.binding.url == url]

    def of_rank(self, url: str, rank: int) -> list[Held]:
        """The buffers of one rank of a job."""
        return [held for held in self.of_job(url) if held.binding.rank == rank]

    def has(self, url: str, nonce: str, step: StepId, rank: int) -> bool:
        """Whether host memory holds a rank's part of a step."""
        return any(
            (snapshot.nonce, snapshot.id) == (nonce, step)
            for held in self.of_rank(url, rank)
            for snapshot, _ in held.snapshots()
        )

    async def settle_step(
        self, url: str, rank: int, nonce: str, step: int, outcome: Outcome, why: str
    ) -> None:
        """Record what became of a step that was in the spool."""
        for held in self.of_rank(url, rank):
            await held.settle_step(nonce, step, outcome, why)

    def supersede(self, url: str, rank: int, nonce: str, newest: int) -> None:
        """Tell the trainers of an attempt that `newest` has taken over."""
        for held in self.of_rank(url, rank):
            if any(snapshot.nonce == nonce for snapshot, _ in held.snapshots()):
                held.buffer.supersede(newest)

    def wake(self, url: str) -> None:
        """Let the writers of a job look again."""
        for held in self.of_job(url):
            held.wake.set()

    def reached(self, url: str) -> dict[int, Reach]:
        """How far the attempts of a job came on this host, as far as its memory knows."""
        told = [reached(held.buffer.memory) for held in self.of_job(url)]
        return furthest([*self._left.get(url, {}).values(), *told])

    def reached_before(self, url: str, attempt: int) -> list[Reach]:
        """How far earlier attempts than `attempt` came here, oldest first."""
        found = self.reached(url)
        return [found[one] for one in sorted(found) if one < attempt]

    def undecided(self) -> int:
        """Sealed snapshots that are not decided yet, without those in the spool."""
        return sum(held.undecided() for held in self.held.values())

    def busy(self) -> bool:
        """Whether there is a snapshot that is on its way, or will be."""
        return any(held.busy or held.next() is not None for held in self.held.values())

    def release(self, held: Held) -> None:
        """Free a buffer's memory."""
        del self.held[held.buffer.id]
        if is_unnamed(held.buffer.path):
            self._supervisor.forget(held.buffer.id)
        left = furthest(
            [*self._left.get(held.binding.url, {}).values(), reached(held.buffer.memory)]
        )
        self._left[held.binding.url] = {a: left[a] for a in sorted(left)[-_REACHED_MAX:]}
        held.free()
        event("freed", buffer=held.buffer.id)
