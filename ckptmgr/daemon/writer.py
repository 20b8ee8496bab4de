"""Brings the sealed snapshots of one host buffer into the store, and sees to their decisions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from ckptmgr.config import MEMORY_SECONDS, RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.daemon.resume import Standing, newest_active, put_active, standing_of
from ckptmgr.daemon.spool import Spool
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    RegisterConflictError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
    SupersededError,
    TornSnapshotError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.commit import Decision, abort_of, abort_step
from ckptmgr.repository.hold import host_name
from ckptmgr.repository.manifest import SealedManifest
from ckptmgr.repository.rules import goes_first, may_decide
from ckptmgr.store.base import Store
from ckptmgr.store.lanes import together
from ckptmgr.types import Outcome, Snapshot, StepId

_LOOKS = 10
"""How often a write is looked at within the time that it may stand still."""


class Writer:
    """The worker of one buffer. `run` ends only by cancellation, or by a fault of ours: over
    `snapshot`, unless that is None.

    Snapshots are written one after the other. What becomes of each is decided beside that: with
    several ranks it takes as long as the slowest of them.
    """

    def __init__(self, held: Held, job: Job, pipeline: Pipeline, count: Callable[[], None]) -> None:
        self._held = held
        self._job = job
        self._pipeline = pipeline
        self._count = count
        self.snapshot: Snapshot | None = None
        self._moved_at = 0.0

    async def run(self) -> None:
        """Write whatever is sealed and undecided; sleep until woken when there is nothing."""
        await self._held.tell()  # what the writer before this one may have given up
        memory = self._held.buffer.memory
        self._job.store.share(memory, str(self._held.buffer.path))
        try:
            async with together() as deciding:
                await self._write_all(deciding)
        finally:
            self._job.store.unshare(memory)

    async def _write_all(self, deciding: asyncio.TaskGroup) -> None:
        pause = RETRY_SECONDS_MIN
        while True:
            self._held.wake.clear()
            self.snapshot = snapshot = self._held.next()
            self._count()
            if snapshot is None:
                await self._held.wake.wait()
                continue
            try:
                await self._write(snapshot, deciding)
                pause = RETRY_SECONDS_MIN
            except StoreError as error:
                self._failed(snapshot, error, pause)
                await self._pause(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)

    def _failed(self, snapshot: Snapshot, error: StoreError, pause: float) -> None:
        self._held.last_failure, self._held.retry_at = str(error), time.time() + pause
        warning("write_failed", step=str(snapshot.id), why=str(error), retry_in=pause)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._held.wake.wait(), seconds)
        except TimeoutError:
            return

    async def _write(self, snapshot: Snapshot, deciding: asyncio.TaskGroup) -> None:
        """Active, packs, manifest; the rest goes on beside the next snapshot."""
        self._held.busy[snapshot.generation] = snapshot
        self._held.writing = snapshot.generation
        start = time.monotonic()
        handed_over = False
        try:
            with self._job.readback.saving():
                manifest = await self._bring(snapshot)
            self._held.writing = 0
            if manifest is not None:
                deciding.create_task(self._decide(snapshot, manifest, start))
                handed_over = True
        except TornSnapshotError:
            event("superseded", step=str(snapshot.id), why="its slot holds a newer step")
            self._job.history.given_up(snapshot.id, "superseded by a newer snapshot")
            await self._give_up(snapshot.id, "superseded by a newer snapshot")
        except StoreError:
            self._held.writing = 0  # it waits to be tried again
            raise
        except CkptmgrError as error:
            await self._refuse(snapshot, error)
        finally:
            if not handed_over:
                await self._done(snapshot)

    async def _done(self, snapshot: Snapshot) -> None:
        self._held.busy.pop(snapshot.generation, None)
        await self._held.tell()

    # -- store or spool -----------------------------------------------------------------------

    async def _bring(self, snapshot: Snapshot) -> SealedManifest | None:
        """A snapshot into the store, or (None) into the spool where the store does not take it.

        Raises:
            StoreError: neither takes it; the snapshot stays in its slot.
        """
        spool = self._job.spool
        if spool is None:
            return await self._store(snapshot)
        if spool.blocks(snapshot.attempt):
            try:
                await self._to_spool(spool, snapshot)
            except StoreFullError:
                raise
            except StoreError as error:
                # Nor may what is in there ever come out: a disk that fails holds up no store.
                self._tell_off(spool, error)
                return await self._store(snapshot)
            return None
        try:
            return await self._store_in_time(spool, snapshot)
        except TimeoutError:
            why = f"no end in {self._job.spool_seconds:g} s"
        except StoreUnreachableError as error:
            why = str(error)
            if not self._has_room(spool, snapshot):
                raise
        event("spooling", job=self._job.label, step=str(snapshot.id), why=why)
        await self._to_spool(spool, snapshot)
        return None

    async def _store_in_time(self, spool: Spool, snapshot: Snapshot) -> SealedManifest:
        """Write to the store for as long as it moves, or the spool has no room.

        Raises:
            TimeoutError: it was given up for the spool.
        """
        writing = asyncio.create_task(self._store(snapshot))
        started, seconds = time.monotonic(), self._job.spool_seconds
        self._moved_at = started
        try:
            while not writing.done():
                await asyncio.wait([writing], timeout=seconds / _LOOKS)
                now = time.monotonic()
                since = started if self._held.waits_behind(snapshot) else self._moved_at
                if now - since >= seconds and self._has_room(spool, snapshot):
                    break
            if not writing.done():
                raise TimeoutError
            return writing.result()
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _has_room(self, spool: Spool, snapshot: Snapshot) -> bool:
        """Whether the spool can take a snapshot; told once that it can not."""
        room = spool.room_for(snapshot)
        if not room:
            self._tell_full(spool, snapshot, "has no room for another snapshot")
        return room

    def _tell_off(self, spool: Spool, error: StoreError) -> None:
        if not spool.failing:
            spool.failing = True
            warning("spool_off", path=spool.path, why=str(error).partition("\n")[0])

    def _tell_full(self, spool: Spool, snapshot: Snapshot, why: str) -> None:
        self._job.metrics.spool_full.labels(self._job.label).set(1)
        if not spool.full:
            spool.full = True
            warning("spool_full", job=self._job.label, step=str(snapshot.id), why=why)

    async def _to_spool(self, spool: Spool, snapshot: Snapshot) -> None:
        binding = self._held.binding
        try:
            async with spool.writing(snapshot, binding.keep) as store:
                source = self._source(snapshot, store)
                sealed = await self._pipeline.write(source, binding.codec, self._moved)
        except StoreFullError as error:
            self._tell_full(spool, snapshot, str(error))
            raise
        part = await spool.add(sealed)
        spool.failing = False
        # Only now: the slot is free for the next snapshot as soon as this is stored.
        await self._held.settle(snapshot, Outcome.SPOOLED)
        self._job.metrics.spool_full.labels(self._job.label).set(0)
        self._job.metrics.spooled.labels(self._job.label).inc()
        event("spooled", job=self._job.label, step=str(snapshot.id), bytes=part.nbytes)

    def _moved(self, raw_bytes: int, _stored_bytes: int) -> None:
        """What reached stable storage is progress, wherever that is."""
        self._moved_at = time.monotonic()
        self._held.buffer.add_progress(raw_bytes)

    async def _store(self, snapshot: Snapshot) -> SealedManifest:
        await self._check_active(snapshot)
        self._job.history.writing(snapshot)
        source = self._source(snapshot, self._job.store)
        event("writing", job=self._job.label, step=str(snapshot.id), bytes=snapshot.data_bytes)
        return await self._pipeline.write(source, self._held.binding.codec, self._stored)

    def _source(self, snapshot: Snapshot, store: Store) -> Source:
        keyring = self._job.catalog.keyring
        return Source(self._held.buffer, snapshot, store, host_name(), keyring)

    async def _decide(self, snapshot: Snapshot, manifest: SealedManifest, start: float) -> None:
        """See a written snapshot through to its decision."""
        try:
            decision = await self._decision(snapshot, manifest)
            if decision is None:
                return
            metrics = self._job.metrics
            metrics.commit_duration.labels(self._job.label).observe(time.monotonic() - start)
            metrics.stall.labels(self._job.label).observe(snapshot.stall_seconds)
            self._job.history.wrote(snapshot, manifest.manifest.stored_bytes)
            await self._settle(snapshot, decision)
        except StoreError as error:
            self._failed(snapshot, error, RETRY_SECONDS_MIN)
            await asyncio.sleep(RETRY_SECONDS_MIN)
        except CkptmgrError as error:
            await self._refuse_in_the_end(snapshot, error)
        except Exception:
            self.snapshot = snapshot
            raise
        finally:
            await self._done(snapshot)
            self._held.wake.set()

    async def _decision(self, snapshot: Snapshot, manifest: SealedManifest) -> Decision | None:
        """Wait for the decision; None if the store fell silent and the spool took the part over.

        Its packs and manifest are in the store, so that the drain only has to see it decided. But
        somebody must, and a slot that is written again would not remind the next daemon of it.
        """
        committer, spool = self._job.committer, self._job.spool
        deciding = asyncio.ensure_future(committer.decision(snapshot.nonce, manifest))
        if spool is None:
            return await deciding
        seconds = self._job.spool_seconds
        try:
            while not deciding.done():
                await asyncio.wait([deciding], timeout=seconds / _LOOKS)
                silent = committer.silent_seconds(snapshot.id) >= seconds
                # All of it is in the store: where it can not go to the spool any more, it waits.
                there = self._held.buffer.unchanged(snapshot)
                if silent and there and not deciding.done() and self._has_room(spool, snapshot):
                    with contextlib.suppress(StoreError, TornSnapshotError):
                        await self._to_spool(spool, snapshot)
                        return None
            return deciding.result()
        finally:
            deciding.cancel()

    async def _refuse_in_the_end(self, snapshot: Snapshot, error: CkptmgrError) -> None:
        try:
            await self._refuse(snapshot, error)
        except StoreError as failure:
            self._failed(snapshot, failure, RETRY_SECONDS_MIN)
            await asyncio.sleep(RETRY_SECONDS_MIN)

    def _stored(self, raw_bytes: int, stored_bytes: int) -> None:
        self._moved(raw_bytes, stored_bytes)
        self._job.history.moved()
        self._job.metrics.raw_bytes.labels(self._job.label).inc(raw_bytes)
        self._job.metrics.stored_bytes.labels(self._job.label).inc(stored_bytes)

    async def _check_active(self, snapshot: Snapshot) -> None:
        """Mark the attempt active before its first manifest; stop it if a newer one is.

        Raises:
            StoreUnreachableError: the attempt's claim is not there: perhaps nothing is mounted.
            RegisterConflictError: the store was emptied and used again, or stays without claim.
            SupersededError: a newer attempt is active, and this one still runs.
        """
        standing = await standing_of(self._job.store, snapshot)
        if standing is Standing.MISSING and self._held.orphaned_seconds < MEMORY_SECONDS:
            raise StoreUnreachableError(
                f"attempt {snapshot.attempt} is {standing.value}", subject=self._job.url
            )
        if standing is not Standing.OURS:
            raise RegisterConflictError(
                f"attempt {snapshot.attempt} is {standing.value}",
                subject=self._job.url,
                hint="Give every job a URL of its own.",
            )
        await self._job.settle_exclusion()
        newest = await put_active(
            self._job.store, snapshot.attempt, snapshot.nonce, self._job.active
        )
        # The snapshot of a dead trainer is finished all the same, though another has its buffer by
        # now: it can do no harm, since every commit of the newer attempt comes before it in the
        # order of steps, and the newer attempt may have resumed from it.
        if newest > snapshot.attempt >= self._held.buffer.taken_by:
            self._supersede(snapshot, newest)
            if self._held.writer_alive:
                raise SupersededError(f"attempt {newest} is active", subject=str(snapshot.id))

    async def _settle(self, snapshot: Snapshot, decision: Decision) -> None:
        if decision.committed:
            self._held.last_failure = ""
            await self._held.settle(snapshot, Outcome.COMMITTED)
            exclusive = self._job.store.exclusive
            if goes_first(snapshot.step, snapshot.world, (snapshot.rank,), exclusive):
                self._job.retain_soon(self._held.binding.keep)
        else:
            self._job.given_up(decision.why)
            event("aborted", step=str(snapshot.id), why=decision.why)
            self._job.history.given_up(snapshot.id, decision.why)
            await self._look_for_newer(snapshot)
            await self._held.settle(snapshot, Outcome.ABORTED, decision.why)

    async def _look_for_newer(self, snapshot: Snapshot) -> None:
        """Tell the trainer if its step was given up because a newer attempt is active: without the
        ranks that know it already it may never snapshot again, and so never hear of it.
        """
        with contextlib.suppress(StoreError):  # the step is decided, whatever fails now
            newest = await newest_active(self._job.store, snapshot.attempt, self._job.active)
            if newest > snapshot.attempt:
                self._supersede(snapshot, newest)

    def _supersede(self, snapshot: Snapshot, newest: int) -> None:
        self._held.buffer.supersede(newest)
        if self._held.writer_alive:
            self._job.superseded(snapshot.attempt, newest)

    async def _refuse(self, snapshot: Snapshot, error: CkptmgrError) -> None:
        """Give up what can not be committed; told only when the register says so.

        Raises:
            StoreError: the register could not be decided; the snapshot stays undecided.
        """
        kind = type(error).__name__
        # A register that another incarnation may use is left alone.
        if not isinstance(error, RegisterConflictError):
            decision = await self._abort(snapshot.id, f"{kind}: {error.message}")
            if decision.committed:
                await self._settle(snapshot, decision)
                return
            self._job.given_up(decision.why)
        self._job.metrics.failures.labels(self._job.label, kind).inc()
        warning("given_up", step=str(snapshot.id), kind=kind, why=str(error))
        self._job.history.given_up(snapshot.id, str(error))
        await self._held.settle(snapshot, Outcome.ABORTED, str(error))

    async def _abort(self, step: StepId, why: str) -> Decision:
        """ABORT first, and only if it wins delete. What a register that does not hold has decided
        nobody knows: the step is given up for this rank, and all of it stays.
        """
        store = self._job.store
        if not may_decide(store.exclusive, (self._held.binding.rank,)):
            return abort_of(step, why)  # for this rank; the one who decides will miss its part
        try:
            decision = await abort_step(store, step, why, self._job.catalog.keyring)
        except DamageError as error:
            return abort_of(step, str(error))
        if not decision.committed:
            for prefix in (keys.packs(step), keys.manifests(step)):
                for key in await store.list(prefix):
                    await store.delete(key)
        return decision

    async def _give_up(self, step: StepId, why: str) -> None:
        """Abort a step whose slot is gone; what fails here is left to collection."""
        try:
            decision = await self._abort(step, why)
            if not decision.committed:
                self._job.given_up(decision.why)
        except CkptmgrError as error:
            warning("give_up_failed", step=str(step), why=str(error))
