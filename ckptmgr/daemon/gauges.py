"""Brings the gauges up to date with what host memory and the spools hold, and watches the clock."""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import pairwise

from ckptmgr.daemon.intake import Held, Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import warning
from ckptmgr.daemon.spool import SpoolDirectory
from ckptmgr.metrics import Metrics, remove
from ckptmgr.staging.bufferfile import is_unnamed
from ckptmgr.types import Snapshot

JUMP_SECONDS_MIN = 1.0
"""What the clock must move beside the time that passed to have jumped; slewing is 1 ms in 2 s."""


class Clock:
    """Notices that this host's clock was set: nothing is decided by it, but people read it."""

    def __init__(self) -> None:
        self._offset = _offset_seconds()

    def look(self) -> None:
        """Tell of a jump since the last look."""
        offset = _offset_seconds()
        jump, self._offset = offset - self._offset, offset
        if abs(jump) >= JUMP_SECONDS_MIN:
            warning("clock_jumped", seconds=round(jump, 3))


def _offset_seconds() -> float:
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class Gauges:
    """What is read off rather than counted: on every ticket, at every turn of a worker, and every
    two seconds.
    """

    def __init__(self, metrics: Metrics, intake: Intake) -> None:
        self._metrics = metrics
        self._intake = intake
        self._undecided: dict[str, dict[int, Snapshot]] = {}
        self._labels: set[str] = set()

    def update(self, jobs: Collection[Job], spools: SpoolDirectory | None) -> None:
        """Look at everything once."""
        metrics = self._metrics
        for job in jobs:
            self._update_job(job, self._intake.of_job(job.url))
        labels = {job.label for job in jobs}
        for gone in self._labels - labels:
            metrics.close_job(gone)
        self._labels = labels
        if spools is not None:
            free = spools.free_bytes()
            metrics.spool_free_bytes.set(free)
            metrics.spool_capacity.set(free + spools.used_bytes)
        held = self._intake.held
        metrics.trainers.set(sum(one.writer_alive for one in held.values()))
        self._undecided = {key: seen for key, seen in self._undecided.items() if key in held}

    def _update_job(self, job: Job, buffers: list[Held]) -> None:
        metrics, label = self._metrics, job.label
        metrics.queue.labels(label).set(sum(held.undecided() for held in buffers))
        metrics.attached.labels(label).set(sum(held.writer_alive for held in buffers))
        unnamed = sum(is_unnamed(held.buffer.path) for held in buffers)
        metrics.unnamed_buffers.labels(label).set(unnamed)
        waiting = []
        for held in buffers:
            waiting += self._undecided_of(job, held)
            self._tell_pace(label, held)
        nbytes = sum(snapshot.data_bytes for snapshot in waiting)
        since = [snapshot.sealed_at for snapshot in waiting]
        if job.spool is not None:
            metrics.spool_parts.labels(label).set(len(job.spool.parts))
            metrics.spool_bytes.labels(label).set(job.spool.used_bytes)
            nbytes += sum(part.nbytes for part in job.spool.parts)
            since += [part.sealed_at for part in job.spool.parts]
        metrics.backlog_bytes.labels(label).set(nbytes)
        if since:
            metrics.oldest_undecided.labels(label).set(min(since))
        else:
            remove(metrics.oldest_undecided, label)

    def _undecided_of(self, job: Job, held: Held) -> list[Snapshot]:
        """What waits in a buffer; counts what is new there, and what waited and was overwritten."""
        found = {s.generation: s for s, outcome in held.snapshots() if not outcome.decided}
        # What is there at the first look was adopted: the daemon before this one has counted it.
        before = self._undecided.get(held.buffer.id, found)
        for generation in found.keys() - before.keys():
            self._metrics.copied_bytes.labels(job.label).inc(found[generation].data_bytes)
        self._undecided[held.buffer.id] = found
        for generation in before.keys() - found.keys():
            gone = before[generation]
            spooled = job.spool is not None and job.spool.holds(gone)
            if (gone.nonce, gone.step) not in held.results and not spooled:
                reason = held.how_lost(gone)
                if reason is not None:
                    self._metrics.dropped.labels(job.label, reason).inc()
        return [s for s in found.values() if job.spool is None or not job.spool.holds(s)]

    def _tell_pace(self, label: str, held: Held) -> None:
        sealed = [snapshot for snapshot, _ in held.snapshots()]
        if sealed:
            self._metrics.last_snapshot_step.labels(label).set(sealed[-1].step)
        for older, newer in pairwise(sealed[-2:]):
            if older.nonce == newer.nonce:
                seconds = max(newer.sealed_at - older.sealed_at, 0.0)
                self._metrics.interval.labels(label).set(seconds)
