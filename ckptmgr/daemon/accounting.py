"""Goodput of the jobs whose rank 0 is on this host, as metrics: read once per attempt from the
store, and followed in host memory (docs/knowing.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ckptmgr.config import RETRY_SECONDS_MAX
from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event
from ckptmgr.errors import CkptmgrError
from ckptmgr.goodput import Goodput, Restart, account
from ckptmgr.metrics import Metrics
from ckptmgr.repository.history import Attempt, read_attempts, read_sealed
from ckptmgr.types import Reach


@dataclass(slots=True)
class _Book:
    """What is known of one job; `attempt` is the one that the records were read for."""

    attempt: int = 0
    attempts: tuple[Attempt, ...] = ()
    sealed: dict[int, Reach] = field(default_factory=dict)
    reading: asyncio.Task[None] | None = None
    read_again_at: float = 0.0
    counted: set[int] = field(default_factory=set)


class Accounts:
    """The books of all jobs of a daemon. Nothing waits for them, and no failure here matters."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._books: dict[str, _Book] = {}

    def look(self, jobs: Mapping[str, Job], intake: Intake) -> None:
        """Bring the metrics up to date; reads the store beside that when an attempt is new."""
        for job in list(jobs.values()):
            reached = intake.reached(job.url)
            if not reached or not intake.of_rank(job.url, 0):
                continue
            newest = max(reached)
            self._metrics.current_step.labels(job.label).set(reached[newest].last_step)
            book = self._books.setdefault(job.url, _Book())
            if book.attempt < newest:
                self._read_soon(book, job, newest)
            else:
                self._show(book, job, _live(book.attempts, reached))

    def _read_soon(self, book: _Book, job: Job, attempt: int) -> None:
        busy = book.reading is not None and not book.reading.done()
        if not busy and time.monotonic() >= book.read_again_at:
            book.read_again_at = time.monotonic() + RETRY_SECONDS_MAX
            name = f"goodput {job.label}"
            book.reading = asyncio.create_task(self._read(book, job, attempt), name=name)

    async def _read(self, book: _Book, job: Job, attempt: int) -> None:
        try:
            attempts = await read_attempts(job.store)
            book.sealed = await read_sealed(job.catalog, attempts)
        except CkptmgrError as error:
            event("goodput_unknown", job=job.label, why=str(error))
            return
        book.attempts = tuple(one for one in attempts if one.number <= attempt)
        book.attempt, book.read_again_at = attempt, 0.0

    def _show(self, book: _Book, job: Job, attempts: tuple[Attempt, ...]) -> None:
        label, metrics = job.label, self._metrics
        stalled = metrics.registry.get_sample_value("ckptmgr_stall_seconds_sum", {"job": label})
        found = account(attempts, book.sealed, stalled or 0.0, time.time())
        metrics.ettr.labels(label).set(found.ettr)
        metrics.productive_seconds.labels(label).set(found.productive_seconds)
        metrics.down_seconds.labels(label).set(found.down_seconds)
        for restart in found.restarts:
            if restart.attempt not in book.counted:
                book.counted.add(restart.attempt)
                self._count(job, restart, found)

    def _count(self, job: Job, restart: Restart, found: Goodput) -> None:
        label, metrics = job.label, self._metrics
        steps, seconds = ("exact", "exact") if restart.exact else ("at_least", "at_most")
        metrics.restarts.labels(label).inc()
        metrics.lost_steps.labels(label, steps).inc(restart.lost_steps)
        metrics.lost_seconds.labels(label, seconds).inc(restart.lost_seconds_max)
        if restart is found.restarts[-1]:
            event(
                "restart_counted",
                job=label,
                attempt=restart.attempt,
                resumed_from=str(restart.resumed_from),
                lost_steps=restart.lost_steps,
                lost_seconds=round(restart.lost_seconds, 3),
                exact=restart.exact,
            )

    async def aclose(self) -> None:
        """End the reads that are under way."""
        tasks = [book.reading for book in self._books.values() if book.reading is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _live(attempts: tuple[Attempt, ...], reached: Mapping[int, Reach]) -> tuple[Attempt, ...]:
    """The attempts, with what this host's memory knows of them by now."""
    return tuple(
        replace(one, reached=reached[one.number]) if one.number in reached else one
        for one in attempts
    )
