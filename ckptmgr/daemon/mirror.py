"""The mirror: a second store that follows the commits of the first one, in the background.

It is a store by itself: a step is put there as everywhere, its register last. A step is given up
there only after everything that stands in the first store has come.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptmgr.config import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.retain import _delete_retired, _drop_dead_holds
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    ObjectNotFoundError,
    RecordDamagedError,
    RegisterConflictError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, exists, is_retired, marked
from ckptmgr.repository.commit import Decision, check_format, read_record, same_job
from ckptmgr.restore.copying import copy_packs, put_manifest
from ckptmgr.restore.records import check_record, kind_of
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.store.mirrored import from_either
from ckptmgr.types import StepId

if TYPE_CHECKING:
    from ckptmgr.daemon.job import Job

_RECORDS_AT_ONCE = 8


class Mirror:
    """One job's copy. `run` ends only by cancellation; what fails is tried again, and delays
    nothing else.
    """

    def __init__(self, job: Job, store: Store, pool: BufferPool) -> None:
        self._job = job
        self._first = job.store
        self._store = store
        self._pool = pool
        self._wake = asyncio.Event()
        self._wake.set()
        self._behind = 0
        self._last_failure = ""
        self._swept = False  # a daemon before this one may have been ended amid anything
        self.reads = 0
        self.followed = False

    def committed(self) -> None:
        """There is a commit more to bring."""
        self._tell_behind(self._behind + 1)
        self._wake.set()

    def soon(self) -> None:
        """Something was given up."""
        self._wake.set()

    def read(self, key: str, why: str) -> None:
        """An object had to be read from here."""
        self.reads += 1
        self._job.metrics.mirror_reads.labels(self._job.label).inc()
        warning("mirror_read", job=self._job.label, key=key, why=why)

    def refused(self) -> None:
        """This place holds another incarnation of the job, and is not read."""
        warning("mirror_refused", job=self._job.label, url=self._store.url)

    def state(self) -> dict[str, Any]:
        """What `status` says of it."""
        return {
            "url": self._store.url,
            "behind": self._behind,
            "reads": self.reads,
            "last_failure": self._last_failure,
        }

    async def run(self) -> None:
        """Follow the first store."""
        pause = RETRY_SECONDS_MIN
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._follow()
                pause, self._last_failure, self.followed = RETRY_SECONDS_MIN, "", True
            except CkptmgrError as error:
                self._last_failure, self._swept = str(error), False
                warning("mirror_failed", job=self._job.label, why=str(error), retry_in=pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                self._wake.set()

    async def _follow(self) -> None:
        """Bring the mirror up to what the first store holds now.

        Raises:
            RegisterConflictError: the mirror holds another incarnation of the job.
            StoreError: one of the stores failed.
        """
        if not await check_format(self._first, create=False):
            return
        if await same_job(self._first, self._store) is False:
            raise RegisterConflictError(
                "the mirror holds another incarnation of this job",
                subject=self._store.url,
                hint="Empty that place, or give the daemon another mirror.",
            )
        await check_format(self._store, create=True)
        await _drop_dead_holds(self._store)
        attempts = await self._first.list("attempts/")
        for end in ("/claim", "/active"):  # whose incarnation it is, before anything of it
            await self._copy_records([key for key in attempts if key.endswith(end)])
        decided, witnessed, retired = await _marked(self._first)
        there, seen, gone = await _marked(self._store)
        decided |= witnessed  # and lost, where a register is missing
        # The mark before the register: what is not there must never look as if it stood.
        ended = sorted((decided & retired) - there)
        told = await self._copy_records([keys.retired(step) for step in ended])
        ended = [step for step, is_there in zip(ended, told, strict=True) if is_there]
        await self._copy_records([keys.commit(step) for step in ended])
        await self._copy_records([keys.tags(s) for s in (there & witnessed) - retired - seen])
        missing = sorted(decided - retired - there, reverse=True)
        self._tell_behind(len(missing))
        left = 0
        for step in missing:
            left += not await self._bring(step)
            self._tell_behind(self._behind - 1)
        self._tell_behind(left + self._wake.is_set())  # one was committed meanwhile
        if not left:
            for step in sorted((there & retired) - gone):
                await self._retire(step)
            if not self._swept:
                await self._sweep(retired)

    async def _sweep(self, retired: frozenset[StepId]) -> None:
        """Delete what copies and retirements that were cut short have left of retired steps."""
        self._swept = True
        stored = [*await self._store.list("data/"), *await self._store.list("man/")]
        for step in sorted(retired.intersection(map(keys.parse_step, stored))):
            await self._retire(step)

    def _tell_behind(self, steps: int) -> None:
        self._behind = steps
        self._job.metrics.mirror_behind.labels(self._job.label).set(steps)

    async def _copy_records(self, found: list[str]) -> list[bool]:
        return await in_lanes(self._copy_record, found, _RECORDS_AT_ONCE)

    async def _copy_record(self, key: str) -> bool:
        """One small object; False if it is gone or damaged in the first store, and left out."""
        if await exists(self._store, key):
            return True
        try:
            record = await from_either(self._first, key, partial(_read_checked, key))
        except (ObjectNotFoundError, DamageError):
            return False
        if await self._store.put_new(key, [record]) is PutResult.CONFLICT:
            await self._store.make_durable(key)
        return True

    async def _bring(self, step: StepId) -> bool:
        """One step; False if it does not hold in the first store and stands there all the same."""
        try:
            decision = await self._job.catalog.decision(step)
            if decision.committed:
                await self._copy_step(decision)
            if not await self._copy_record(keys.commit(step)):
                raise RecordDamagedError("does not hold any more", subject=keys.commit(step))
        except (DamageError, ObjectNotFoundError) as error:
            if await is_retired(self._first, step):
                self._swept = False
                return True
            warning("mirror_skipped", job=self._job.label, step=str(step), why=str(error))
            return False
        await self._copy_record(keys.tags(step))  # the witness of a register that is there
        if decision.committed:
            self._job.history.mirrored(step)
            self._job.metrics.mirrored.labels(self._job.label).inc()
            event("mirrored", job=self._job.label, step=str(step), bytes=decision.stored_bytes)
        return True

    async def _copy_step(self, decision: Decision) -> None:
        for rank in range(decision.world):
            sealed = await self._job.catalog.manifest(decision, rank, closed=True)
            await copy_packs(self._first, self._store, sealed.manifest, self._pool)
            if not await put_manifest(self._store, sealed):
                await Catalog(self._store).manifest(decision, rank, closed=True)
                await self._store.make_durable(sealed.key)

    async def _retire(self, step: StepId) -> None:
        await self._copy_record(keys.retired(step))
        if await is_retired(self._store, step) and not await _delete_retired(self._store, step):
            self._swept = False  # a reader holds it


async def _marked(store: Store) -> list[frozenset[StepId]]:
    """Steps with a register, with a copy of one, and with a mark of retirement."""
    return [await marked(store, prefix) for prefix in ("commit/", "tags/", "retired/")]


async def _read_checked(key: str, store: Store) -> memoryview:
    record = await read_record(store, kind_of(key), key)
    check_record(key, record)
    return record
