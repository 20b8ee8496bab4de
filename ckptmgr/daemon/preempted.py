"""Preemptions that ranks tell of: counted when they come, and again when nothing can be lost."""

from __future__ import annotations

import asyncio
import contextlib
import time

from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.log import event
from ckptmgr.metrics import Metrics
from ckptmgr.staging.control import Preempt
from ckptmgr.types import Outcome, Snapshot

LOOK_SECONDS = 0.5
"""How often the death of a preempted trainer is looked for; a commit is heard of at once."""


class Preemptions:
    """The preemptions of this daemon's trainers that are under way; `tasks` end with it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.tasks: set[asyncio.Task[None]] = set()

    def told(self, held: Held, job: str, attempt: int, nonce: str, request: Preempt) -> None:
        """A rank will be ended: count it, and see to it that what it has sealed is committed."""
        self._metrics.preemption_signals.labels(job).inc()
        event(
            "preempted",
            job=job,
            attempt=attempt,
            rank=held.binding.rank,
            source=request.source,
            seconds=request.seconds,
            why=request.why,
        )
        held.wake.set()
        task = asyncio.create_task(self._until_saved(held, job, nonce), name=f"preemption of {job}")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _until_saved(self, held: Held, job: str, nonce: str) -> None:
        """Wait for a commit of what was sealed since, or of the last that a dead trainer sealed."""
        at = time.monotonic()
        newest = _newest(held, nonce)
        before = newest.generation if newest is not None else -1
        while True:
            newest = _newest(held, nonce) or newest
            gone = not held.writer_alive or getattr(held.owner, "nonce", nonce) != nonce
            outcome = _outcome(held, newest)
            if outcome is Outcome.COMMITTED and newest is not None:
                if gone or newest.generation > before:
                    break
            elif gone and (outcome.decided or held._freed):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS), held.decided:
                    await held.decided.wait()
        self._metrics.preemption_saves.labels(job).inc()
        seconds = round(time.monotonic() - at, 3)
        event(
            "preemption_saved",
            job=job,
            step=str(newest.id),
            rank=newest.rank,
            after_seconds=seconds,
        )


def _newest(held: Held, nonce: str) -> Snapshot | None:
    own = [snapshot for snapshot, _ in held.snapshots() if snapshot.nonce == nonce]
    return max(own, key=lambda s: s.generation, default=None)


def _outcome(held: Held, snapshot: Snapshot | None) -> Outcome:
    """What became of it; a trainer that has sealed nothing has nothing to lose."""
    if snapshot is None:
        return Outcome.ABORTED
    known = held.results.get((snapshot.nonce, snapshot.step))
    if known is not None:
        return known[0]
    return dict(held.snapshots()).get(snapshot, Outcome.UNDECIDED)
