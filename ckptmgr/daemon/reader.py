"""The way back, in the daemon: which step, where its parts are, their bytes into host memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ckptmgr.daemon.intake import Held, Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.parts import Lending
from ckptmgr.daemon.resume import (
    Skipped,
    Standing,
    Standings,
    await_resume,
    candidates,
    decide_resume,
    held_by_hosts,
    resume_decisions,
    usable_in_memory,
)
from ckptmgr.daemon.session import Chosen, Session
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    HostMemoryError,
    MissingObjectError,
    NothingToRestoreError,
    ObjectNotFoundError,
    RecordDamagedError,
    StoreError,
    UsageError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.budget import in_thread
from ckptmgr.repository.catalog import Catalog, standing_steps
from ckptmgr.repository.commit import FROM_SCRATCH, Decision, claim_of, stored_manifest
from ckptmgr.repository.manifest import Manifest
from ckptmgr.repository.opening import check_vouched, open_manifest
from ckptmgr.repository.rules import complete_steps
from ckptmgr.restore.choose import candidates_before
from ckptmgr.restore.plan import check_ranges
from ckptmgr.staging.control import Fetched, Lent, Load, Ranges, Restore, Restored
from ckptmgr.staging.hostbuffer import Table
from ckptmgr.staging.tables import RankTable, Tables, TablesFile
from ckptmgr.store.lanes import in_lanes
from ckptmgr.types import Snapshot, StepId

PART_SECONDS_MAX = 60.0
"""How long a part is waited for that another host held in memory when it joined: its daemon is
bringing it to the store already."""

_LOOK_SECONDS = 0.1
_READS_AT_ONCE = 16


class Reader:
    """Finds, describes and fetches steps for sessions."""

    def __init__(self, intake: Intake, fetched: Path) -> None:
        self._intake = intake
        self._lending = Lending(fetched)

    # -- prefetch -----------------------------------------------------------------------------

    def start_prefetch(
        self, session: Session, steps: Sequence[StepId] | None = None, read: Manifest | None = None
    ) -> None:
        """Begin to fetch the last consistent step, if host memory has nothing to resume from.

        It goes into a free slot of the session's own buffer, while the trainer is still building
        its state. The trainer ends it with Release before it writes a slot. With several ranks
        nobody knows yet what all of them can resume from. `steps` are those that stand, newest
        first, from whoever has listed them; `read` is the session's part of one, where that was
        read, too.
        """
        if session.world == 1:
            session.prefetch = asyncio.create_task(self._prefetch(session, steps, read))

    async def _prefetch(
        self, session: Session, steps: Sequence[StepId] | None, read: Manifest | None
    ) -> None:
        try:
            if await self._in_memory(session):
                return
            if steps is None:
                steps = await standing_steps(_deciding(session).store)
            for step in steps:
                if await self._prefetched(session, step, read):
                    event("prefetched", step=str(step))
                    return
        except CkptmgrError as error:
            # Only a head start is lost: restore itself meets and reports the same error.
            event("prefetch_failed", why=str(error))

    async def _prefetched(self, session: Session, step: StepId, read: Manifest | None) -> bool:
        try:
            if read is None or read.id != step:
                decision = await _decision(session, step)
                if not decision.committed:
                    return False
                await session.keep(step)
                own = session.rank % decision.world
                read = (await session.job.reading.manifest(decision, own)).manifest
            await session.keep(step)
            await self._lend(session, read, _everything(read))
        except (DamageError, ObjectNotFoundError) as error:
            event("prefetch_failed", why=str(error))
            return False
        return True

    # -- choose -------------------------------------------------------------------------------

    async def restore(self, session: Session, request: Restore) -> Restored:
        """Decide what the attempt resumes from, or obey what was decided.

        Raises:
            NothingToRestoreError: the step that was asked for is not there.
            DamageError: there are steps, but none of them can be used.
            StoreUnreachableError: the store does not answer; nothing was decided on a guess.
        """
        job, k = session.job, request.k
        session.asked_at = time.monotonic()
        session.standings = Standings()
        await job.settle_exclusion()
        if session.prefetch is not None:
            await session.prefetch
        decided = None
        if session.rank != 0:
            decided = await await_resume(job.store, session.attempt, k)
        skipped: list[Skipped] = []
        if decided is None:
            rejected = await resume_decisions(job.store, session.attempt, request.first_k, k)
            wanted = request.step, request.of_attempt
            choice = await self._choose(session, *wanted, rejected, skipped, request.before)
            chosen = session.chosen
            if chosen is not None and chosen.id == choice and chosen.decision is not None:
                # Visible is not durable: what training goes on from must survive a power cut.
                await job.store.make_durable(keys.commit(choice))
            decided = await decide_resume(job.store, session.attempt, k, choice)
        job.resumed_from[session.attempt] = decided
        if decided == FROM_SCRATCH:
            session.chosen = None
            return Restored(0, 0, skipped=tuple((str(s), why) for s, why in session.ghosts.items()))
        if session.chosen is None or session.chosen.id != decided:
            session.chosen = await self._chosen(session, decided)
        return await self._restored(session, skipped)

    async def load(self, session: Session, request: Load) -> Restored:
        """Choose a committed step for a session that only reads; errors as `restore`."""
        session.asked_at = time.monotonic()
        skipped: list[Skipped] = []
        rejected = [StepId(*one) for one in request.rejected]
        choice = await self._choose(session, request.step, request.of_attempt, rejected, skipped)
        if choice == FROM_SCRATCH:
            return Restored(0, 0)
        return await self._restored(session, skipped)

    async def _choose(
        self,
        session: Session,
        step: int | None,
        of_attempt: int | None,
        rejected: Collection[StepId],
        skipped: list[Skipped],
        before: str = "",
    ) -> StepId:
        """The newest step that may be used; sets `session.chosen`, and tells what was skipped."""
        here = await self._in_memory(session)
        worlds = {s.id.attempt: s.world for _, s in here}
        complete = complete_steps(_ranks_of(here), worlds)
        others: Collection[StepId] = ()
        if session.world > 1:
            held = await held_by_hosts(session.job.store, session.attempt)
            others = complete_steps(held.ranks, held.worlds)
        standing = await standing_steps(_deciding(session).store)
        offered = candidates(standing, {*complete, *others}, rejected, step, of_attempt)
        if before:  # of what is only in memory nobody can tell where it belongs
            allowed, _ = await candidates_before(_deciding(session), before)
            offered = [one for one in allowed if one not in rejected]
        for candidate in offered:
            try:
                chosen = await self._usable(session, candidate, complete, standing)
            except DamageError as error:
                skipped.append((str(candidate), _first_line(error)))
                self.tell_skipped(session, candidate, error)
                continue
            if chosen is not None:
                session.chosen = chosen
                return candidate
        if skipped or rejected:
            skipped += [(str(one), "proved unusable") for one in sorted(rejected, reverse=True)]
            told = "; ".join(f"{one}: {why}" for one, why in skipped)
            raise DamageError(f"no step can be restored; {told}", subject=session.job.url)
        if before and standing:
            raise NothingToRestoreError(f"no step before {before}", subject=session.job.url)
        if step is not None:
            raise NothingToRestoreError(f"no committed step {step}", subject=session.job.url)
        return FROM_SCRATCH

    async def _usable(
        self,
        session: Session,
        step: StepId,
        complete: Collection[StepId],
        standing: Collection[StepId],
    ) -> Chosen | None:
        """The step if it may be used; None if it was given up."""
        if step not in complete and step in standing:
            try:
                decision = await _decision(session, step)
            except ObjectNotFoundError:
                return None
            return Chosen(step, decision.world, decision) if decision.committed else None
        return await self._chosen(session, step)

    async def _chosen(self, session: Session, step: StepId) -> Chosen:
        """A step that was decided on, by us or by another daemon."""
        for _, snapshot in await self._in_memory(session):
            if snapshot.id == step:
                return Chosen(step, snapshot.world, None)
        with contextlib.suppress(ObjectNotFoundError):
            decision = await _decision(session, step)
            if decision.committed:
                return Chosen(step, decision.world, decision)
        # Undecided, or given up since: the parts of it are what hosts held when they joined.
        claim = await claim_of(session.job.store, step.attempt)
        if claim is None:
            raise MissingObjectError("is gone", subject=keys.claim(step.attempt))
        return Chosen(step, claim.world, None)

    def tell_skipped(self, session: Session, step: StepId, error: DamageError) -> None:
        """Count and log that a step can not be used."""
        job = session.job
        job.metrics.fallbacks.labels(job.label).inc()
        warning("restore_skipped", job=job.label, step=str(step), why=str(error))

    async def _restored(self, session: Session, skipped: list[Skipped]) -> Restored:
        chosen = session.the_chosen
        tables, damage = "", ""
        try:
            tables = str(await self._tables(session, [session.own]))
        except DamageError as error:
            self.tell_skipped(session, chosen.id, error)
            damage = _first_line(error)
        return Restored(
            attempt=chosen.id.attempt,
            step=chosen.id.step,
            world=chosen.world,
            own=session.own,
            tables=tables,
            damage=damage,
            skipped=tuple(skipped),
        )

    # -- host memory --------------------------------------------------------------------------

    async def _in_memory(self, session: Session) -> list[tuple[Held, Snapshot]]:
        """Usable sealed snapshots of the job on this host. A session that only reads has none:
        only a committed step is a checkpoint.
        """
        if not session.attempt:
            return []
        found = [
            (held, snapshot)
            for held in self._intake.of_job(session.job.url)
            if self._is_readable(session, held)
            for snapshot in usable_in_memory(held.snapshots())
        ]
        ours = []
        for held, snapshot in found:
            standing = await session.standings.of(session.job.store, snapshot)
            if standing is Standing.OURS:
                ours.append((held, snapshot))
            else:
                session.ghosts[snapshot.id] = f"in host memory, but {standing.value}"
        return ours

    def _is_readable(self, session: Session, held: Held) -> bool:
        """Another trainer that lives may write any slot of its buffer at any moment, unless it is
        a rank of the same attempt: all ranks restore before any of them goes on. The buffer knows
        it, too: a trainer has nothing to say to a daemon that is new.
        """
        if held.buffer.taken_by == session.attempt:
            return True
        return not held.buffer.has_live_writer()

    async def _memory_part(
        self, session: Session, rank: int
    ) -> tuple[Held, Snapshot, Table] | None:
        chosen = session.the_chosen
        for held, snapshot in await self._in_memory(session):
            if (snapshot.id, snapshot.rank) != (chosen.id, rank):
                continue
            try:
                return held, snapshot, held.buffer.table(snapshot)
            except HostMemoryError as error:
                held.tell_damage(snapshot.slot, error)
        return None

    # -- describe and fetch -------------------------------------------------------------------

    async def describe(self, session: Session) -> Path:
        """A file with the tables of all ranks; errors as `fetch`."""
        chosen = session.the_chosen
        return await self._tables(session, range(chosen.world))

    async def _tables(self, session: Session, ranks: Iterable[int]) -> Path:
        chosen = session.the_chosen

        async def one(rank: int) -> RankTable:
            in_memory = await self._memory_part(session, rank)
            found = in_memory[2] if in_memory else await self._manifest(session, rank)
            return RankTable(rank, found.layout, found.values, found.tags)

        # When one fails, all others have ended: a late one would hold the step for nobody.
        tables = tuple(await in_lanes(one, ranks, _READS_AT_ONCE))
        file = TablesFile(Tables(chosen.id.attempt, chosen.id.step, chosen.world, tables))
        session.files.append(file)
        return file.path

    async def _manifest(self, session: Session, rank: int) -> Manifest:
        """One rank's manifest of the chosen step.

        Raises:
            DamageError: it does not hold, or does not come.
        """
        chosen = session.the_chosen
        if rank in chosen.manifests:
            return chosen.manifests[rank]
        if chosen.decision is None:
            found = await _manifest_to_come(session.job, chosen.id, rank)
        else:
            await session.keep(chosen.id)
            found = (await session.job.reading.manifest(chosen.decision, rank)).manifest
        chosen.manifests[rank] = found
        return found

    async def fetch(self, session: Session, wanted: Iterable[tuple[int, Ranges]]) -> Fetched:
        """Bring bytes of the chosen step into host memory, verified.

        Raises:
            DamageError: a part does not hold, or is nowhere.
            StoreUnreachableError: the store can not be read now.
            HostMemoryError: not enough shared memory.
        """
        chosen = session.the_chosen
        if session.prefetch is not None:
            await session.prefetch
        parts = [await self._part(session, rank, ranges) for rank, ranges in wanted]
        source = "memory" if all(part.source == "memory" for part in parts) else "store"
        metrics, label = session.job.metrics, session.job.label
        metrics.restores.labels(label, source).inc()
        if session.asked_at:
            seconds = time.monotonic() - session.asked_at
            metrics.restore_seconds.labels(label, source).observe(seconds)
            session.asked_at = 0.0
        event("restored", step=str(chosen.id), source=source)
        return Fetched(tuple(parts))

    async def _part(self, session: Session, rank: int, ranges: Ranges) -> Lent:
        chosen = session.the_chosen
        if not 0 <= rank < chosen.world:
            raise UsageError(
                f"has {chosen.world} ranks, and no {rank}", subject=f"step {chosen.id}"
            )
        in_memory = await self._memory_part(session, rank)
        if in_memory is None:
            return await self._lend(session, await self._manifest(session, rank), ranges)
        held, snapshot, _ = in_memory
        check_ranges(ranges, snapshot.data_bytes, subject=f"step {chosen.id}")
        source = "store" if snapshot.generation in session.fetched else "memory"
        path = str(held.buffer.path)
        return Lent(rank, source, path, snapshot.slot, snapshot.generation)

    async def _lend(self, session: Session, manifest: Manifest, ranges: Ranges) -> Lent:
        own = session.held if manifest.rank == session.rank else None
        lent = await self._lending.fetch(session, session.job, manifest, ranges, own)
        session.lending = self._lending
        if own is not None and lent.path == str(own.buffer.path):
            session.fetched.add(lent.generation)
        return lent


def _deciding(session: Session) -> Catalog:
    """Where it is read which steps there are. What an attempt resumes from is decided on what the
    first store says: a mirror may lag behind it.
    """
    return session.job.catalog if session.attempt else session.job.reading


async def _decision(session: Session, step: StepId) -> Decision:
    """The register of a step; errors as `Catalog.decision`.

    An attempt takes a mirror's copy of one that is there and does not hold, if it is of the
    incarnation that claimed its attempt. One that is gone is damage: training would go on from what
    the first store does not know to be committed.
    """
    job = session.job
    try:
        return await _deciding(session).decision(step)
    except MissingObjectError:
        raise
    except DamageError as damage:
        if not session.attempt or job.reading is job.catalog:
            raise
        try:
            copy = await job.reading.decision(step)
        except (StoreError, DamageError):
            raise damage from None
        claim = await claim_of(job.store, step.attempt)
        if claim is None or claim.nonce != copy.nonce:
            raise
        return copy


def _everything(manifest: Manifest) -> Ranges:
    return ((0, manifest.chunks[-1].end),) if manifest.chunks else ()


def _ranks_of(found: Iterable[tuple[Held, Snapshot]]) -> dict[StepId, set[int]]:
    ranks: dict[StepId, set[int]] = {}
    for _, snapshot in found:
        ranks.setdefault(snapshot.id, set()).add(snapshot.rank)
    return ranks


def _first_line(error: CkptmgrError) -> str:
    return str(error).partition("\n")[0]


async def _manifest_to_come(job: Job, step: StepId, rank: int) -> Manifest:
    """The manifest of a part that another host held in memory when it joined.

    Raises:
        DamageError: it is of another incarnation or of a daemon that is not trusted, does not come
            in PART_SECONDS_MAX, or its step was given up without it.
    """
    key = keys.manifest(step, rank)
    deadline = time.monotonic() + PART_SECONDS_MAX
    while True:
        try:
            sealed = await stored_manifest(job.store, step, rank)
            await in_thread(check_vouched, sealed, job.reading.keyring)
            manifest = open_manifest(sealed, job.reading.keyring).manifest
            break
        except ObjectNotFoundError:
            if await _is_given_up(job, step):
                raise MissingObjectError("was given up with its step", subject=key) from None
            if time.monotonic() > deadline:
                raise MissingObjectError(
                    f"did not come in {PART_SECONDS_MAX:.0f} s from the host that held it",
                    subject=key,
                ) from None
        await asyncio.sleep(_LOOK_SECONDS)
    claim = await claim_of(job.store, step.attempt)
    if claim is None or claim.nonce != manifest.nonce:
        raise RecordDamagedError("belongs to another incarnation", subject=key)
    return manifest


async def _is_given_up(job: Job, step: StepId) -> bool:
    try:
        return not (await job.catalog.decision(step)).committed
    except (ObjectNotFoundError, DamageError):
        return False
