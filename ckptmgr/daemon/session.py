"""One trainer's or reader's part in a job, and the step that it reads."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.parts import Lending
from ckptmgr.daemon.resume import Standings
from ckptmgr.errors import UsageError
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.hold import held_step
from ckptmgr.repository.manifest import Manifest
from ckptmgr.staging.tables import TablesFile
from ckptmgr.types import StepId


@dataclass(frozen=True, slots=True)
class Chosen:
    """The step a session reads, and the ranks that wrote it; `decision` where it is committed.

    `manifests` are those that were read so far, by rank.
    """

    id: StepId
    world: int
    decision: Decision | None
    manifests: dict[int, Manifest] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Session:
    """One trainer's (or reader's) part in a job, for the life of its connection."""

    job: Job
    rank: int
    world: int = 1
    attempt: int = 0
    nonce: str = ""
    held: Held | None = None
    chosen: Chosen | None = None
    files: list[TablesFile] = field(default_factory=list)
    fetched: set[int] = field(default_factory=set)
    ghosts: dict[StepId, str] = field(default_factory=dict)
    prefetch: asyncio.Task[None] | None = None
    work: asyncio.Future[Any] | None = None
    lending: Lending | None = None
    holds: AsyncExitStack = field(default_factory=AsyncExitStack)
    kept: set[StepId] = field(default_factory=set)
    asked_at: float = 0.0
    standings: Standings = field(default_factory=Standings)

    async def keep(self, step: StepId) -> None:
        """Keep retention away from a step that is read from the store, until `release`.

        Raises:
            DamageError: it is retired already.
        """
        if step not in self.kept:
            await self.holds.enter_async_context(held_step(self.job.reading.store, step))
            self.kept.add(step)

    @property
    def the_chosen(self) -> Chosen:
        """What this session reads.

        Raises:
            UsageError: it has not asked for a step yet.
        """
        if self.chosen is None:
            raise UsageError("restore or load first", subject="control socket")
        return self.chosen

    @property
    def own(self) -> int:
        """Which part of the chosen step is this rank's: worlds may differ."""
        return self.rank % self.the_chosen.world

    async def release(self) -> None:
        """End what is under way, and free what was fetched outside of the session's buffer."""
        tasks = [task for task in (self.prefetch, self.work) if task is not None]
        for task in tasks:
            task.cancel()
        # Two may release it at once, and both must know that nothing is written any more.
        await asyncio.gather(*tasks, return_exceptions=True)
        self.prefetch = self.work = None
        if self.lending is not None:
            self.lending.release(self)
        for file in self.files:
            file.remove()
        self.files.clear()
        self.kept.clear()
        await self.holds.aclose()
