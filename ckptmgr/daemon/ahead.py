"""Steps that are brought into host memory before their trainer is there: `ckptmgr prefetch`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptmgr.config import DEFAULT_SLOTS
from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event
from ckptmgr.daemon.reader import Reader
from ckptmgr.daemon.session import Session
from ckptmgr.errors import DamageError, HostMemoryError, ObjectNotFoundError, UsageError
from ckptmgr.repository.catalog import standing_steps
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.slot import capacity_for
from ckptmgr.staging.control import Prefetching
from ckptmgr.types import StepId

KEEP_SECONDS = 900.0
"""How long the memory waits for a trainer: containers are pulled and process groups built in it."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """One rank's part, and until when it is kept."""

    session: Session
    until: float


class Ahead:
    """What is kept for trainers that are to come. It is lent to them as any fetched part is, and
    goes when the first rank of the job has restored or saved, or nobody comes.
    """

    def __init__(self, reader: Reader, intake: Intake, directory: Path) -> None:
        self._reader = reader
        self._intake = intake
        self._directory = directory
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def urls(self) -> set[str]:
        """The jobs that are waited for."""
        return {url for url, _ in self._kept}

    async def begin(self, job: Job, ranks: Sequence[int]) -> Prefetching:
        """Start to fetch the newest commit that can be read, for `ranks`, or for all of its ranks.

        A rank of which this host's memory holds a snapshot has nothing to gain.

        Raises:
            UsageError: the step has no such rank.
            HostMemoryError: there is no room for it beside the trainers' slots.
            StoreUnreachableError: the store can not be read now.
        """
        steps = await standing_steps(job.reading.store)
        found = await self._newest(job, steps, ranks)
        if found is None:
            return Prefetching(0, 0)
        decision, wanted, parts = found
        nbytes = self._checked_room(parts)
        for rank, part in zip(wanted, parts, strict=True):
            key, session = (job.url, rank), Session(job, rank)
            while key in self._kept:  # every task of a host may ask: another may come amid a drop
                await self._drop(key)
            self._reader.start_prefetch(session, steps, part)
            self._kept[key] = _Kept(session, time.monotonic() + KEEP_SECONDS)
        return Prefetching(decision.id.attempt, decision.id.step, tuple(wanted), nbytes)

    async def _newest(
        self, job: Job, steps: Sequence[StepId], ranks: Sequence[int]
    ) -> tuple[Decision, list[int], list[Manifest]] | None:
        """The newest commit whose records hold, the ranks that need it, and their manifests."""
        for step in steps:
            try:
                decision = await job.reading.decision(step)
                if decision.committed:
                    wanted = self._wanted(job, decision, ranks)
                    of = [await job.reading.manifest(decision, rank) for rank in wanted]
                    return decision, wanted, [sealed.manifest for sealed in of]
            except (DamageError, ObjectNotFoundError) as error:
                event("prefetch_failed", why=str(error))
        return None

    def _wanted(self, job: Job, decision: Decision, ranks: Sequence[int]) -> list[int]:
        wrong = [rank for rank in ranks if not 0 <= rank < decision.world]
        if wrong:
            raise UsageError(
                f"has {decision.world} ranks, and no {wrong[0]}", subject=f"step {decision.id}"
            )
        return [
            rank
            for rank in ranks or range(decision.world)
            if not any(held.snapshots() for held in self._intake.of_rank(job.url, rank))
        ]

    def _checked_room(self, parts: Sequence[Manifest]) -> int:
        """Bytes of the parts; a trainer that finds no room for its slots would not start."""
        nbytes = sum(capacity_for(part).slot_bytes for part in parts)
        found = os.statvfs(self._directory)
        free = found.f_bavail * found.f_frsize
        if free < nbytes * (1 + DEFAULT_SLOTS):
            raise HostMemoryError(
                f"{free} bytes are free, and {nbytes} wanted beside {DEFAULT_SLOTS} slots as large",
                subject=str(self._directory),
                hint="Start the trainer without a prefetch, or give shared memory more room.",
            )
        return nbytes

    async def taken(self, url: str) -> None:
        """A trainer of the job has what it resumes from, or begins anew."""
        for key in [key for key in self._kept if key[0] == url]:
            await self._drop(key)

    def expire(self) -> None:
        """Begin to free what nobody has come for; a store that is down is not waited for here."""
        now = time.monotonic()
        for key in [key for key, kept in self._kept.items() if kept.until <= now]:
            event("prefetch_expired", rank=key[1], seconds=KEEP_SECONDS)
            leaving = asyncio.create_task(self._drop(key))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _drop(self, key: tuple[str, int]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            await kept.session.release()

    async def aclose(self) -> None:
        """Free everything."""
        await asyncio.gather(*self._leaving, *(self._drop(key) for key in list(self._kept)))
