"""The way back, in the daemon: which step, from memory or from the store, into which slot."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from ckptmgr.daemon.intake import Held, Intake, make_buffer
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.resume import (
    Candidate,
    Skipped,
    Standing,
    committed_choices,
    decide_resume,
    rank_candidates,
    standing_of,
    usable_in_memory,
)
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    HostMemoryError,
    NothingToRestoreError,
    ObjectNotFoundError,
    RegisterConflictError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import standing_steps
from ckptmgr.repository.commit import FROM_SCRATCH
from ckptmgr.repository.hold import held_step
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.slot import capacity_for, fetch_into_slot
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.control import Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.slots import free_slot
from ckptmgr.types import Binding, Snapshot, StepId


@dataclass(slots=True)
class Session:
    """One trainer's (or reader's) part in a job, for the life of its connection."""

    job: Job
    rank: int
    attempt: int = 0
    nonce: str = ""
    held: Held | None = None
    decisions: int = 0
    lent: list[HostBuffer] = field(default_factory=list)
    fetched: set[int] = field(default_factory=set)
    ghosts: dict[StepId, str] = field(default_factory=dict)
    prefetch: asyncio.Task[None] | None = None
    work: asyncio.Future[Restored] | None = None

    async def release(self) -> None:
        """End a prefetch or a restore, and free what was fetched outside the session's buffer."""
        tasks = [task for task in (self.prefetch, self.work) if task is not None]
        self.prefetch = self.work = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for buffer in self.lent:
            buffer.unlink()
            buffer.close()
        self.lent.clear()


@dataclass(frozen=True, slots=True)
class _Place:
    """A sealed snapshot that the rank may copy from."""

    buffer: HostBuffer
    snapshot: Snapshot
    source: str


class Reader:
    """Finds and fetches steps for sessions."""

    def __init__(self, intake: Intake, fetched: Path) -> None:
        self._intake = intake
        self._fetched = fetched

    def start_prefetch(self, session: Session) -> None:
        """Begin to fetch the last consistent step, if host memory has nothing to resume from.

        It goes into a free slot of the session's own buffer, while the trainer is still building
        its state. The trainer ends it with Release before it writes a slot.
        """
        session.prefetch = asyncio.create_task(self._prefetch(session))

    async def _prefetch(self, session: Session) -> None:
        try:
            if await self._in_memory(session):
                return
            for candidate in await self._candidates(session, None, None, frozenset()):
                if await self._bring(session, candidate) is not None:
                    event("prefetched", step=str(candidate.id))
                    return
        except CkptmgrError as error:
            # Only a head start is lost: restore itself meets and reports the same error.
            event("prefetch_failed", why=str(error))

    async def restore(
        self,
        session: Session,
        step: int | None,
        of_attempt: int | None,
        rejected: frozenset[StepId],
    ) -> Restored:
        """The newest usable step (or a chosen one), decided and sealed in host memory.

        Raises:
            NothingToRestoreError: the chosen step is not there.
            DamageError: there are steps, but none of them can be used.
            StoreUnreachableError: the store does not answer; nothing was decided on a guess.
        """
        if session.prefetch is not None:
            await session.prefetch
        skipped: list[Skipped] = [(str(one), "rejected by the trainer") for one in sorted(rejected)]
        for candidate in await self._candidates(session, step, of_attempt, rejected):
            try:
                place = await self._bring(session, candidate)
            except DamageError as error:
                skipped.append((str(candidate.id), str(error).partition("\n")[0]))
                self._fell_back(session, candidate.id, error)
                continue
            if place is None:
                continue
            await self._decide(session, candidate.id)
            session.job.metrics.restores.labels(session.job.label, place.source).inc()
            event("restored", step=str(candidate.id), source=place.source)
            return _restored(place, skipped)
        if skipped:
            raise DamageError(
                "no step can be restored; " + "; ".join(f"{s}: {why}" for s, why in skipped),
                subject=session.job.url,
            )
        if step is not None:
            raise NothingToRestoreError(f"no committed step {step}", subject=session.job.url)
        await self._decide(session, FROM_SCRATCH)
        return Restored(0, 0, skipped=tuple((str(s), why) for s, why in session.ghosts.items()))

    def _fell_back(self, session: Session, step: StepId, error: DamageError) -> None:
        session.job.metrics.fallbacks.labels(session.job.label).inc()
        warning("restore_skipped", step=str(step), why=str(error))

    async def _candidates(
        self,
        session: Session,
        step: int | None,
        of_attempt: int | None,
        rejected: frozenset[StepId],
    ) -> list[Candidate]:
        memory = [s.id for _, s in await self._in_memory(session)]
        if step is None:
            standing = await standing_steps(session.job.store)
        else:
            standing = await committed_choices(session.job.catalog, step, of_attempt)
            memory = [s for s in memory if s.step == step and of_attempt in (None, s.attempt)]
        return rank_candidates(memory, standing, rejected)

    async def _in_memory(self, session: Session) -> list[tuple[Held, Snapshot]]:
        """Usable sealed snapshots of this session's rank. A session that only reads has none:
        only a committed step is a checkpoint.
        """
        if not session.attempt:
            return []
        found = [
            (held, snapshot)
            for held in self._intake.of_job(session.job.url, session.rank)
            # Another trainer that lives may write any slot of its buffer at any moment.
            if held is session.held or not held.buffer.has_live_writer()
            for snapshot in usable_in_memory(held.snapshots())
        ]
        ours = []
        for held, snapshot in found:
            standing = await standing_of(session.job.store, snapshot)
            if standing is Standing.OURS:
                ours.append((held, snapshot))
            else:
                session.ghosts[snapshot.id] = f"in host memory, but {standing.value}"
        return ours

    async def _decide(self, session: Session, step: StepId) -> None:
        """Record what the attempt resumes from; sessions that only read decide nothing."""
        if not session.attempt:
            return
        decided = await decide_resume(session.job.store, session.attempt, session.decisions, step)
        if decided != step:
            raise RegisterConflictError(
                f"attempt {session.attempt} resumes from {decided}, not {step}",
                subject=keys.resume(session.attempt, session.decisions),
            )
        session.decisions += 1
        session.job.resumed_from[session.attempt] = step

    async def _bring(self, session: Session, candidate: Candidate) -> _Place | None:
        """Make a step available in host memory; None if it turns out to be no commit."""
        if candidate.in_memory:
            place = await self._from_memory(session, candidate.id)
            if place is not None:
                return place
            if not candidate.in_store:
                raise DamageError("its slot in host memory is damaged", subject=str(candidate.id))
        try:
            decision = await session.job.catalog.decision(candidate.id)
        except ObjectNotFoundError:
            return None
        if not decision.committed:
            return None
        if decision.world <= session.rank:
            raise DamageError(f"has {decision.world} ranks", subject=str(candidate.id))
        async with held_step(session.job.store, candidate.id):
            sealed = await session.job.catalog.manifest(decision, session.rank)
            return await self._fetch(session, sealed.manifest)

    async def _from_memory(self, session: Session, step: StepId) -> _Place | None:
        for held, snapshot in await self._in_memory(session):
            if snapshot.id != step:
                continue
            try:
                held.buffer.table(snapshot)
            except HostMemoryError as error:
                warning("slot_damaged", buffer=held.buffer.id, why=error.message)
                continue
            fetched = held is session.held and snapshot.generation in session.fetched
            return _Place(held.buffer, snapshot, "store" if fetched else "memory")
        return None

    async def _fetch(self, session: Session, manifest: Manifest) -> _Place:
        """Fetch, verify and seal a manifest's data: in the rank's own buffer where it fits."""
        buffer, slot = self._room(session, capacity_for(manifest))
        job = session.job
        snapshot = await fetch_into_slot(job.store, manifest, buffer, slot, job.pool)
        session.fetched.add(snapshot.generation)
        return _Place(buffer, snapshot, "store")

    def _room(self, session: Session, capacity: Capacity) -> tuple[HostBuffer, int]:
        if session.held is not None:
            buffer = session.held.buffer
            slot = free_slot(buffer.capacity.slots, session.held.snapshots())
            if slot is not None and buffer.capacity.holds(
                capacity.table_bytes, capacity.data_bytes
            ):
                return buffer, slot
        binding = Binding(session.job.url, session.rank, 1)
        buffer, _ = make_buffer(self._fetched, binding, capacity)
        session.lent.append(buffer)
        return buffer, 0


def _restored(place: _Place, skipped: list[Skipped]) -> Restored:
    return Restored(
        attempt=place.snapshot.attempt,
        step=place.snapshot.step,
        source=place.source,
        path=str(place.buffer.path),
        slot=place.snapshot.slot,
        generation=place.snapshot.generation,
        skipped=tuple(skipped),
    )
