"""What the daemon does for one connection: one method per request of staging/control.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from ckptmgr.config import STORE_TIMEOUT_SECONDS
from ckptmgr.daemon.intake import Held
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.resume import (
    Standing,
    Standings,
    claim_attempt,
    publish_have,
    usable_in_memory,
)
from ckptmgr.daemon.session import Session
from ckptmgr.errors import (
    CkptmgrError,
    DaemonError,
    DamageError,
    StoreError,
    UsageError,
)
from ckptmgr.repository.line import resumed_from
from ckptmgr.staging import control
from ckptmgr.staging.bufferfile import SLOTS_MAX, Capacity
from ckptmgr.store.registry import normalise_url
from ckptmgr.types import Binding, Outcome, StepId

if TYPE_CHECKING:
    from ckptmgr.daemon.service import Service

T = TypeVar("T")

REMEMBER_SECONDS = 2.0
"""How long attaching again waits to learn what the attempt resumed from: a store that answers does
it in milliseconds, and retention, which must know it, needs a store that answers."""

RESUME_DRAIN_SECONDS_MAX = 2 * STORE_TIMEOUT_SECONDS
"""How long attaching waits for the spool, so that the newest step in it can be resumed from: half
of what a rank waits for the answer. Less, where a try of the store is given less."""


class Requests:
    """Answers the requests of one connection, in order. `urls` are the jobs that it asked for:
    they stay open as long as it lasts.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._reader = service.reader
        self._session: Session | None = None
        self._remembering: asyncio.Task[None] | None = None
        self.urls: set[str] = set()

    async def answer(self, request: control.Request) -> control.Reply:
        """Carry a request out; every error of ckptmgr becomes a reply."""
        try:
            return await self._dispatch(request)
        except CkptmgrError as error:
            event("request_failed", request=type(request).__name__.lower(), why=str(error))
            return control.failed(error)

    async def _dispatch(self, request: control.Request) -> control.Reply:
        match request:
            case control.Attach():
                return await self._attach(request)
            case control.Restore():
                return await self._restore(request)
            case control.Load():
                return await self._load(request)
            case control.Prefetch():
                _check_protocol(request.protocol)
                return await self._service.ahead.begin(
                    self._job(_url_of(request.url)), request.ranks
                )
            case control.Describe():
                return control.Described(str(await self._work(self._reader.describe)))
            case control.Fetch():
                return await self._fetch(request)
            case control.Release():
                await self._released()
                if self._session is not None and self._session.attempt:
                    await self._service.ahead.taken(self._session.job.url)
                return control.Done()
            case control.Wait():
                return await self._wait(request)
            case control.Preempt():
                return self._preempt(request)
            case control.Detach():
                return self._detach(request)
            case control.Drain():
                return control.Done(await self._service.drain(request.timeout_seconds))
            case control.Status():
                return control.Stated(self._service.state())
            case control.Stop():
                self._service.end()
                return control.Done(self._service.undecided())

    async def close(self) -> None:
        """The connection is over: whatever was lent is freed, the buffer is an orphan."""
        session, self._session = self._session, None
        if self._remembering is not None:
            self._remembering.cancel()
            await asyncio.gather(self._remembering, return_exceptions=True)
        if session is not None:
            await session.release()
            session.job.resumed_from.pop(session.attempt, None)
            self._orphan(session)

    def _orphan(self, session: Session) -> None:
        """A trainer that still holds its lock is ending, or will attach again: the service looks
        after it. A buffer that another session has taken meanwhile is that one's.
        """
        held = session.held
        if held is not None and held.owner is session:
            held.owner = None
            if not held.buffer.has_live_writer():
                held.died()

    # -- attach -------------------------------------------------------------------------------

    async def _attach(self, request: control.Attach) -> control.Reply:
        _check_protocol(request.protocol)
        if not 2 <= request.slots <= SLOTS_MAX or not 0 <= request.rank < request.world:
            raise UsageError(f"slots={request.slots} rank={request.rank} world={request.world}")
        url = _url_of(request.url)
        job = self._job(url)
        attempt, nonce, is_new = request.attempt, request.nonce, not request.attempt
        if is_new and request.rank:
            raise UsageError("only rank 0 claims an attempt", subject=f"rank {request.rank}")
        if is_new:
            attempt, nonce = await claim_attempt(job.store, request.world, request.run_id)
            await job.settle_exclusion()
        binding = Binding(url, request.rank, request.world, request.codec, request.keep)
        capacity = Capacity(request.slots, request.table_bytes, request.data_bytes)
        session = Session(job, request.rank, request.world, attempt, nonce)
        if (request.begins or not request.buffer) and attempt not in job.published:
            await self._drained(job)
            await self._publish(job, attempt)
        held, new_buffer = self._service.intake.place_for(binding, capacity, request.buffer)
        if held.worker is None:  # it is new, or was stranded: its store could not be opened
            self._service.employ(held)
        old, self._session = self._session, session
        if old is not None and old.attempt != attempt:
            job.resumed_from.pop(old.attempt, None)
        await self._take(session, held, request.max_d2h_gbps)
        if old is not None:
            await self._leave(old, held)
        if is_new:
            self._reader.start_prefetch(session)
        else:
            self._remembering = asyncio.create_task(self._remember_resume(session))
            # A trainer that changes daemons in an outage must not wait for the store.
            await asyncio.wait([self._remembering], timeout=REMEMBER_SECONDS)
        job.metrics.attempt.labels(job.label).set(attempt)
        job.metrics.commit_awaited.labels(job.label).set_to_current_time()
        event("attached", job=job.label, attempt=attempt, rank=request.rank, new=new_buffer)
        return control.Attached(str(held.buffer.path), attempt, nonce, os.getpid(), held.note)

    async def _publish(self, job: Job, attempt: int) -> None:
        """Tell the other hosts of an attempt what this one holds, before its first rank joins."""
        found = [
            snapshot
            for held in self._service.intake.of_job(job.url)
            for snapshot in usable_in_memory(held.snapshots())
        ]
        standings = Standings()
        ours = {
            (s.attempt, s.step, s.rank)
            for s in found
            if await standings.of(job.store, s) is Standing.OURS
        }
        if job.spool is not None:  # what was copied, and waits for the parts of other hosts
            ours |= {(p.id.attempt, p.id.step, p.rank) for p in job.spool.copied}
        reached = self._service.intake.reached_before(job.url, attempt)
        await publish_have(job.store, attempt, self._service.host, sorted(ours), reached)
        job.published.add(attempt)

    async def _drained(self, job: Job) -> None:
        """The store answers: what the spool holds comes first, so that it can be resumed from."""
        drainer = self._service.drainers.get(job.url)
        seconds = min(RESUME_DRAIN_SECONDS_MAX, 2 * self._service.settings.store_timeout_seconds)
        if drainer is not None and not await drainer.drained(seconds):
            left = len(job.spool.parts) if job.spool is not None else 0
            warning("spool_behind", job=job.label, parts=left, waited=seconds)

    async def _remember_resume(self, session: Session) -> None:
        """A daemon before this one knew what the attempt resumed from; the store still does."""
        with contextlib.suppress(StoreError, DamageError):
            source = await resumed_from(session.job.store, session.attempt)
            if source is not None:
                session.job.resumed_from[session.attempt] = source

    async def _take(self, session: Session, held: Held, max_d2h_gbps: float) -> None:
        """Give a buffer to a session; whatever still fetches into it for a dead trainer ends."""
        before, held.owner = held.owner, session
        session.held = held
        held.writer_alive, held.free_when_decided = True, False
        held.buffer.take(session.attempt)
        held.max_d2h_gbps = max_d2h_gbps
        if before is not None:
            await before.release()

    async def _leave(self, session: Session, taken: Held) -> None:
        """A trainer that asks for a larger buffer leaves its old one, which goes when decided; but
        not if it did not wait for the answer, and has attached that one again meanwhile.
        """
        held, session.held = session.held, None
        await session.release()
        if held is not None and held is not taken and held.owner is session:
            held.let_go()
            held.free_when_decided = True

    def _preempt(self, request: control.Preempt) -> control.Reply:
        session = self._attached()
        if session.held is None:
            raise UsageError("attach first", subject="control socket")
        self._service.preemptions.told(
            session.held, session.job.label, session.attempt, session.nonce, request
        )
        return control.Done()

    def _detach(self, request: control.Detach) -> control.Reply:
        if self._session is not None and self._session.held is not None:
            held = self._session.held
            held.free_when_decided = request.clean
            self._session.held = None
            held.let_go()
        return control.Done()

    # -- restore ------------------------------------------------------------------------------

    async def _work(self, do: Callable[[Session], Awaitable[T]]) -> T:
        """Carry out what ends with the session."""
        session = self._attached()
        work = asyncio.ensure_future(do(session))
        session.work = work
        return await work

    async def _restore(self, request: control.Restore) -> control.Reply:
        if not self._attached().attempt:
            raise UsageError("attach first", subject="control socket")
        return await self._work(lambda session: self._reader.restore(session, request))

    async def _load(self, request: control.Load) -> control.Reply:
        _check_protocol(request.protocol)
        job = self._job(_url_of(request.url))
        if self._session is not None and self._session.held is not None:
            raise UsageError("load on a connection of its own", subject="control socket")
        await self._released()
        self._session = Session(job, 0)
        return await self._work(lambda session: self._reader.load(session, request))

    async def _fetch(self, request: control.Fetch) -> control.Reply:
        session = self._attached()
        try:
            return await self._work(lambda session: self._reader.fetch(session, request.wanted))
        except DamageError as error:
            if session.chosen is not None:
                self._reader.tell_skipped(session, session.chosen.id, error)
            raise

    async def _released(self) -> None:
        if self._session is not None:
            await self._session.release()

    def _job(self, url: str) -> Job:
        job = self._service.job(url)
        self.urls.add(url)
        return job

    def _attached(self) -> Session:
        if self._session is None:
            raise UsageError("attach first", subject="control socket")
        return self._session

    # -- wait ---------------------------------------------------------------------------------

    async def _wait(self, request: control.Wait) -> control.Reply:
        session = self._attached()
        held, wanted = session.held, (session.nonce, request.step)
        if held is None:
            raise UsageError("attach first", subject="control socket")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.timeout_seconds), held.decided:
                await held.decided.wait_for(lambda: self._known(wanted))
        for one in self._service.intake.of_rank(session.job.url, session.rank):
            if wanted in one.results:
                outcome, why = one.results[wanted]
                return control.Waited(int(outcome), why)
        return await self._look_up(session, request.step)

    def _known(self, wanted: tuple[str, int]) -> bool:
        """Whether there is nothing to wait for: decided, or in no slot of this host."""
        session = self._attached()
        buffers = self._service.intake.of_rank(session.job.url, session.rank)
        if any(wanted in one.results for one in buffers):
            return True
        pending = [s for one in buffers for s, o in one.snapshots() if not o.decided]
        pending += [snapshot for one in buffers for snapshot in one.busy.values()]
        spool = session.job.spool
        step = StepId(session.attempt, wanted[1])
        if spool is not None and spool.has(session.nonce, step, session.rank):
            return False
        return wanted not in [(s.nonce, s.step) for s in pending]

    async def _look_up(self, session: Session, step: int) -> control.Reply:
        """Ask the store about a step that this daemon does not remember."""
        held = session.held
        failure = held.last_failure if held is not None else ""
        if not self._known((session.nonce, step)):
            return control.Waited(int(Outcome.UNDECIDED), failure or "still being written")
        try:
            # Who put it may have been killed amid its put: visible is not durable.
            decision = await session.job.catalog.registered(StepId(session.attempt, step))
        except StoreError as error:
            return control.Waited(int(Outcome.UNDECIDED), str(error))
        if decision is None:
            return control.Waited(int(Outcome.ABORTED), "superseded before it was stored")
        ours = decision.committed and decision.nonce == session.nonce
        outcome = Outcome.COMMITTED if ours else Outcome.ABORTED
        return control.Waited(int(outcome), decision.why)


def _check_protocol(theirs: int) -> None:
    if theirs != control.PROTOCOL:
        raise DaemonError(
            f"speaks protocol {control.PROTOCOL}, and this process {theirs}",
            subject="daemon",
            hint="Run `ckptmgr drain --stop`, then start again: the new version starts its own.",
        )


def _url_of(text: str) -> str:
    if "://" not in text and not text.startswith("/"):  # it would be below where the daemon runs
        hint = "Send an absolute path, or a URL."
        raise UsageError("is a relative path", subject=text, hint=hint)
    return normalise_url(text)
