"""Brings the parts in a spool into the store, oldest first, and sees to their decisions.

For each part: claim, register, active, packs, manifest, decision; then it is deleted from the
spool. Every one of these may be done a second time, so that a daemon may be killed at any instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from ckptmgr.config import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.pipeline import adopt_manifest
from ckptmgr.daemon.resume import put_active
from ckptmgr.daemon.spool import Part, Spool
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    ObjectNotFoundError,
    RegisterConflictError,
    StoreError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.budget import LEASE_BYTES, BufferPool
from ckptmgr.repository.commit import Claim, Decision, abort_step, get_record
from ckptmgr.repository.manifest import SealedManifest
from ckptmgr.repository.record import Kind
from ckptmgr.repository.rules import goes_first, may_decide
from ckptmgr.restore.copying import copy_packs, put_manifest
from ckptmgr.staging.bufferfile import SLOTS_MAX
from ckptmgr.store.lanes import together
from ckptmgr.types import Outcome

if TYPE_CHECKING:
    from ckptmgr.daemon.job import Job

OLD_STEPS_AT_ONCE = 64
"""Steps of attempts that have ended that may wait for their other ranks together."""


def steps_at_once(part: Part, newest_attempt: int) -> int:
    """How many steps may wait for their decision, that of `part` included.

    One rank alone commits in strict order. Several must not run ahead of a slower host, or its
    steps would be given up before it comes to them; a host buffer's slots bound it in the same way
    without a spool. Nobody waits for an attempt that has ended.
    """
    if part.world == 1:
        return 1
    return SLOTS_MAX if part.id.attempt >= newest_attempt else OLD_STEPS_AT_ONCE


class Drainer:
    """Empties the spool of one job; `run` ends only by cancellation, or by a fault of ours: over
    `part`, unless that is None. It may be run again.
    """

    def __init__(self, job: Job, spool: Spool, intake: Intake) -> None:
        self._job = job
        self._spool = spool
        self._intake = intake
        self._deciding: dict[Part, asyncio.Task[None]] = {}
        self._poked = asyncio.Event()
        self._told: set[int] = set()
        self._faulted: set[Part] = set()
        self.part: Part | None = None
        self.last_failure = ""
        self.retry_at = 0.0

    async def run(self) -> None:
        """Drain whatever is there; sleep while there is nothing."""
        self.part = None
        self._spool.copied.clear()  # of a run before this one, whose waits have ended with it
        async with together() as group:
            await self._drain_all(group)

    def faulted(self, part: Part, error: BaseException) -> bool:
        """Take note of a fault of ours over a part; True if it is the second.

        It is set aside then, or all others would wait for it for ever. Nothing is lost: it stays
        in the spool, and the next daemon tries again.
        """
        again = part in self._faulted
        self._faulted.add(part)
        self.last_failure = f"a fault of the daemon: {error!r}"
        if again:
            self._spool.aside.add(part)
        return again

    async def _look_again(self) -> None:
        """At attempts that the store did not know: its file system may be mounted by now."""
        self._spool.stranded.clear()
        await self._spool.tell()

    async def _drain_all(self, group: asyncio.TaskGroup) -> None:
        pause = RETRY_SECONDS_MIN
        while True:
            self.part = None
            self.part = part = await self._next()
            try:
                self._poked.clear()
                sealed = await self._bring(part)
                pause, self.last_failure = RETRY_SECONDS_MIN, ""
            except StoreError as error:
                self.last_failure, self.retry_at = str(error), time.time() + pause
                warning(
                    "drain_failed",
                    job=self._job.label,
                    step=str(part.id),
                    why=str(error),
                    retry_in=pause,
                )
                await self._pause(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                continue
            if sealed is not None:
                self._spool.copied.add(part)
                self._deciding[part] = group.create_task(self._decide(part, sealed))
                await self._spool.tell()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._poked.wait(), seconds)

    async def _next(self) -> Part:
        """The oldest part that is still to be copied, once it may be."""
        while not self._may_go_on():
            pause = RETRY_SECONDS_MAX if self._spool.stranded else None
            try:
                async with asyncio.timeout(pause), self._spool.changed:
                    await self._spool.changed.wait_for(self._may_go_on)
            except TimeoutError:
                await self._look_again()
        return self._spool.waiting[0]

    def _may_go_on(self) -> bool:
        waiting = self._spool.waiting
        if not waiting:
            return False
        part = waiting[0]
        steps = {one.id for one in self._deciding} | {part.id}
        return len(steps) <= steps_at_once(part, max(self._job.published, default=0))

    async def _bring(self, part: Part) -> SealedManifest | None:
        """A part into the store; None where its fate is known already.

        Raises:
            StoreError: one of the stores failed; it is tried again.
        """
        try:
            if not await self._is_claimed(part):
                return None
            await self._job.settle_exclusion()
            decision = await self._job.catalog.registered(part.id)
            if decision is not None:
                await self._finish(part, decision)
                return None
            return await self._copy(part)
        except StoreError:
            raise
        except CkptmgrError as error:
            await self._drop(part, error)
            return None

    async def _is_claimed(self, part: Part) -> bool:
        """Whether the store knows the part's attempt; one that it does not is set aside.

        Raises:
            RegisterConflictError: it is of another incarnation: the store was emptied.
        """
        key = keys.claim(part.id.attempt)
        try:
            claim = await get_record(self._job.store, Kind.CLAIM, key, Claim)
        except ObjectNotFoundError:
            if part.id.attempt not in self._told:
                self._told.add(part.id.attempt)
                warning("spool_stranded", job=self._job.label, step=str(part.id), why=f"no {key}")
            self._spool.stranded.add(part.id.attempt)
            await self._spool.tell()
            return False
        except DamageError:
            return True  # which says nothing against it
        if claim.nonce != part.nonce:
            raise RegisterConflictError("is of another incarnation", subject=key)
        return True

    async def _copy(self, part: Part) -> SealedManifest:
        store, metrics, label = self._job.store, self._job.metrics, self._job.label
        newest = await put_active(store, part.id.attempt, part.nonce, self._job.active)
        if newest > part.id.attempt:
            self._intake.supersede(self._spool.url, part.rank, part.nonce, newest)
            self._job.superseded(part.id.attempt, newest)
        place = part.id, part.rank, part.nonce
        sealed = await adopt_manifest(store, *place)
        if sealed is not None:
            return sealed
        sealed = await self._spool.manifest(part)
        event("draining_step", job=label, step=str(part.id), rank=part.rank, bytes=part.nbytes)
        await copy_packs(
            self._spool.reading,
            store,
            sealed.manifest,
            # Of its own: what a store that hangs was lent holds up neither the writes into the
            # spool nor the drains of other jobs.
            BufferPool(LEASE_BYTES),
            metrics.stored_bytes.labels(label).inc,
        )
        if await put_manifest(store, sealed):
            metrics.raw_bytes.labels(label).inc(sealed.manifest.raw_bytes)
            return sealed
        # A write that was given up for the spool may have put one all the same, of the same bits.
        found = await adopt_manifest(store, *place)
        if found is None:  # the step was given up, and its manifests deleted, at this moment
            raise StoreError("was there and is gone again", subject=sealed.key)
        return found

    async def _decide(self, part: Part, sealed: SealedManifest) -> None:
        """See a copied part through to its decision, however long the store fails meanwhile."""
        try:
            while part in self._spool.copied:
                try:
                    await self._decide_once(part, sealed)
                except StoreError as error:
                    self.last_failure = str(error)
                    await self._pause(RETRY_SECONDS_MIN)
        except Exception:
            self.part = part
            raise
        finally:
            del self._deciding[part]
            await self._spool.tell()

    async def _decide_once(self, part: Part, sealed: SealedManifest) -> None:
        try:
            decision = await self._job.committer.decision(part.nonce, sealed)
        except StoreError:
            raise
        except CkptmgrError as error:
            await self._drop(part, error)
        else:
            await self._finish(part, decision)

    async def _finish(self, part: Part, decision: Decision) -> None:
        """The step is decided, durably: those who wait are told, and the part goes."""
        if not (decision.committed and decision.nonce == part.nonce):
            await self._given_up(part, decision.why or "the step is another incarnation's")
            return
        await self._settle(part, Outcome.COMMITTED)
        left = len(self._spool.parts)
        event("drained_step", job=self._job.label, step=str(part.id), rank=part.rank, left=left)
        self._job.metrics.drained.labels(self._job.label).inc()
        exclusive = self._job.store.exclusive
        if goes_first(part.id.step, part.world, (part.rank,), exclusive):
            self._job.retain_soon(self._spool.keep)

    async def _given_up(self, part: Part, why: str) -> None:
        warning("spool_dropped", job=self._job.label, step=str(part.id), why=why)
        self._job.given_up(why)
        await self._settle(part, Outcome.ABORTED, why)

    async def _settle(self, part: Part, outcome: Outcome, why: str = "") -> None:
        """Before the part goes: a slot that is neither settled nor spooled is written again."""
        url = self._spool.url
        await self._intake.settle_step(url, part.rank, part.nonce, part.id.step, outcome, why)
        await self._spool.remove(part)
        self._intake.wake(url)

    async def _drop(self, part: Part, error: CkptmgrError) -> None:
        """Give up what can not be committed; a register that others may use is left alone.

        A part that does not hold is written again where its snapshot is still in host memory.

        Raises:
            StoreError: the register could not be decided; the part stays.
        """
        url, why = self._spool.url, f"{type(error).__name__}: {error.message}"
        if isinstance(error, DamageError) and self._intake.has(url, part.nonce, part.id, part.rank):
            warning("spool_dropped", job=self._job.label, step=str(part.id), why=why)
            await self._spool.remove(part)
            self._intake.wake(url)
            return
        may = may_decide(self._job.store.exclusive, (part.rank,))
        if may and not isinstance(error, RegisterConflictError):
            keyring = self._job.catalog.keyring
            try:
                decision = await abort_step(self._job.store, part.id, why, keyring)
            except DamageError as damage:
                # Nobody can decide the step any more, and what is behind it must not wait.
                error = damage
            else:
                if decision.committed:
                    await self._finish(part, decision)
                    return
        await self._given_up(part, str(error))

    async def drained(self, seconds: float) -> bool:
        """Wait until what can come into the store is there, and what one rank has is decided."""
        self._poked.set()
        await self._look_again()

        def done() -> bool:
            undecided = [one for one in self._spool.copied if one.world == 1]
            return not self._spool.waiting and not undecided

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._spool.changed:
                await self._spool.changed.wait_for(done)
        return done()
