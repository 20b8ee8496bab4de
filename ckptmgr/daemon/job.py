"""One job: its store, its catalog, and what the daemon remembers of its commits."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from ckptmgr.bucket import Bucket
from ckptmgr.config import SPOOL_SECONDS, STUCK_SECONDS, DaemonSettings
from ckptmgr.daemon.committer import Committer
from ckptmgr.daemon.counts import StoreCounts, reason_of
from ckptmgr.daemon.glance import Glance
from ckptmgr.daemon.history import History
from ckptmgr.daemon.log import event, fault, label_of, warning
from ckptmgr.daemon.mirror import Mirror
from ckptmgr.daemon.readback import ReadBack
from ckptmgr.daemon.resume import ActiveMarks
from ckptmgr.daemon.retain import collect
from ckptmgr.daemon.spool import Spool
from ckptmgr.errors import CkptmgrError, DamageError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision, check_format, same_job
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.store.base import Store
from ckptmgr.store.mirrored import MirroredStore, Terms, patient
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import StepId


@dataclass(slots=True)
class Job:
    """What all buffers and trainers of one store URL share.

    `resumed_from` is what each running attempt resumed from; retention leaves it alone.
    `published` are attempts that know what this host's memory held when they began. Commits are
    read back into `background`, or into `pool`.
    """

    url: str
    store: Store
    catalog: Catalog
    label: str
    metrics: Metrics
    pool: BufferPool
    stuck_seconds: float = STUCK_SECONDS
    spool: Spool | None = None
    spool_seconds: float = SPOOL_SECONDS
    last_commit: StepId | None = None
    resumed_from: dict[int, StepId] = field(default_factory=dict)
    active: ActiveMarks = field(default_factory=ActiveMarks)
    published: set[int] = field(default_factory=set)
    mirror: Mirror | None = None
    history: History = field(default_factory=History)
    glance: Glance = field(init=False)
    background: BufferPool | None = None
    readback: ReadBack = field(default_factory=ReadBack)
    committer: Committer = field(init=False)
    reading: Catalog = field(init=False)
    _following: asyncio.Task[None] | None = None
    _retention: asyncio.Task[None] | None = None
    _retain_by: int | str | None = None
    _looked_through: bool = False
    _settled: bool = False
    _superseded: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.committer = Committer(self.catalog, self.committed, self.stuck_seconds)
        self.reading = self.catalog
        self.glance = Glance(self.catalog, self.history)

    def follow(self, url: str, pool: BufferPool, settings: DaemonSettings) -> None:
        """Keep a mirror at `url`, and read from it what the store does not give.

        Raises:
            UsageError: the URL names no store.
        """
        copy = patient(url, settings.store_timeout_seconds, keys.FORMAT)
        tell = StoreCounts(self.metrics, self.label).failed
        first = patient(self.url, settings.store_timeout_seconds, keys.FORMAT, tell)
        self.mirror = mirror = Mirror(self, copy, pool)
        terms = Terms(keys.FORMAT, same_job, mirror.read, mirror.refused)
        store = MirroredStore(first, copy, terms)
        self.reading = Catalog(store, self.catalog.keyring)
        self._following = asyncio.create_task(mirror.run(), name=f"mirror {self.label}")
        self._following.add_done_callback(_tell_fault)

    @classmethod
    def open(
        cls,
        url: str,
        metrics: Metrics,
        pool: BufferPool,
        settings: DaemonSettings,
        limit: Bucket | None = None,
        spool: Spool | None = None,
        keyring: Keyring = NO_KEYS,
        background: BufferPool | None = None,
    ) -> Job:
        """Open the job's store, whose bytes go no faster than `limit`. Nothing is read yet.

        Raises:
            UsageError: the URL names no store.
        """
        label, history = label_of(url), History()

        counts = StoreCounts(metrics, label)

        def failed(operation: str, error: Exception) -> None:
            counts.failed(operation, error)
            history.failed(type(error).__name__, str(error))

        async def pace(nbytes: int) -> None:
            seconds = limit.reserve(nbytes) if limit is not None and nbytes else 0.0
            if seconds:
                await asyncio.sleep(seconds)

        store = RetryingStore(
            open_store(url),
            timeout_seconds=settings.store_timeout_seconds,
            deadline_seconds=4 * settings.store_timeout_seconds,
            on_failure=failed,
            on_answer=counts.answered,
            on_retry=counts.retried,
            landmark=keys.FORMAT,
            pace=pace,
        )
        if settings.single_decider:
            store.exclusive = False
        return cls(
            url,
            store,
            Catalog(store, keyring),
            label,
            metrics,
            pool,
            stuck_seconds=settings.stuck_seconds,
            spool=spool,
            spool_seconds=settings.spool_seconds,
            history=history,
            background=background,
            readback=ReadBack(label, metrics, settings.verify_gbps),
        )

    def committed(self, decision: Decision) -> None:
        """Take note of a commit."""
        self.metrics.commits.labels(self.label).inc()
        self.history.committed(decision)
        self.metrics.commit_awaited.labels(self.label).set_to_current_time()
        if self.last_commit is None or decision.id > self.last_commit:
            self.last_commit = decision.id
            self.metrics.last_commit_step.labels(self.label).set(decision.step)
            self.metrics.last_commit_timestamp.labels(self.label).set_to_current_time()
        event(
            "committed",
            job=self.label,
            step=str(decision.id),
            raw_bytes=decision.raw_bytes,
            stored_bytes=decision.stored_bytes,
        )

    def given_up(self, why: str) -> None:
        """Count a step that was given up."""
        self.metrics.aborts.labels(self.label, reason_of(why)).inc()

    def superseded(self, attempt: int, newest: int) -> None:
        """Tell, once for each attempt, that it goes on here though a newer one is active."""
        if attempt not in self._superseded:
            self._superseded.add(attempt)
            self.metrics.superseded_attempts.labels(self.label).inc()
            warning("attempt_superseded", job=self.label, attempt=attempt, newest=newest)

    def retain_soon(self, keep: int | str) -> None:
        """Give old steps up in the background, so that the next snapshot need not wait for it.
        A collection that begins from here on goes by `keep`.
        """
        self._retain_by = keep
        if self.mirror is not None:
            self.mirror.committed()
        if not self.collecting:
            self._retention = asyncio.create_task(self._retain(), name=f"retain {self.label}")

    async def _retain(self) -> None:
        """Collect until no commit has come meanwhile, each time by the policy of the last one: the
        next trainer may have come with a more generous one. Failures are logged: the next commit
        tries again. Only the first collection that works looks at the whole history.
        """
        while (keep := self._retain_by) is not None:
            self._retain_by = None
            pool, protected = self.background or self.pool, frozenset(self.resumed_from.values())
            try:
                await collect(
                    self.catalog,
                    pool,
                    keep,
                    protected,
                    readback=self.readback,
                    whole=not self._looked_through,
                )
                self._looked_through = True
            except CkptmgrError as error:
                warning("retention_failed", job=self.label, why=str(error))
            if self.mirror is not None:
                self.mirror.soon()

    async def settle_exclusion(self) -> None:
        """Know whether the store decides once, before anything rests on it. Where its mark does
        not tell, nothing is taken for granted.
        """
        if self._settled:
            return
        with contextlib.suppress(DamageError):
            await check_format(self.store, create=False)
        if self.store.exclusive is None:
            self.store.exclusive = False
        self._settled = True
        if not self.store.exclusive:
            event("single_decider", job=self.label)

    @property
    def collecting(self) -> bool:
        """Whether a collection is under way."""
        return self._retention is not None and not self._retention.done()

    async def collected(self) -> None:
        """Wait for the end of the collection that is under way, if one is."""
        if self._retention is not None:
            await asyncio.wait([self._retention])

    async def aclose(self) -> None:
        """End the waits and the collection that are under way, and close the store."""
        await self.committer.aclose()
        await self.glance.aclose()
        tasks = [task for task in (self._retention, self._following) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.aclose()
        if self.reading is not self.catalog:
            await self.reading.store.aclose()


def _tell_fault(following: asyncio.Task[None]) -> None:
    """A mirror that ends over a fault of ours ends nothing else; the next daemon follows again."""
    if not following.cancelled() and (error := following.exception()) is not None:
        fault(error)
