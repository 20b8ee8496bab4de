"""One job: its store, its catalog, and what the daemon remembers of its commits."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from hashlib import blake2b

from ckptmgr.config import STUCK_SECONDS, DaemonSettings
from ckptmgr.daemon.committer import Committer
from ckptmgr.daemon.log import event, warning
from ckptmgr.daemon.resume import ActiveMarks
from ckptmgr.daemon.retain import collect
from ckptmgr.errors import CkptmgrError, DamageError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision, check_format
from ckptmgr.store.base import Store
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import StepId


def label_of(url: str) -> str:
    """Short name of a job in metrics: no path and no bucket name leaves the host."""
    return blake2b(url.encode(), digest_size=4).hexdigest()


@dataclass(slots=True)
class Job:
    """What all buffers and trainers of one store URL share.

    `resumed_from` is what each running attempt resumed from; retention leaves it alone.
    `published` are attempts that know what this host's memory held when they began.
    """

    url: str
    store: Store
    catalog: Catalog
    label: str
    metrics: Metrics
    pool: BufferPool
    stuck_seconds: float = STUCK_SECONDS
    last_commit: StepId | None = None
    resumed_from: dict[int, StepId] = field(default_factory=dict)
    active: ActiveMarks = field(default_factory=ActiveMarks)
    published: set[int] = field(default_factory=set)
    committer: Committer = field(init=False)
    _retention: asyncio.Task[None] | None = None
    _retain_again: bool = False
    _settled: bool = False

    def __post_init__(self) -> None:
        self.committer = Committer(self.catalog, self.committed, self.stuck_seconds)

    @classmethod
    def open(cls, url: str, metrics: Metrics, pool: BufferPool, settings: DaemonSettings) -> Job:
        """Open the job's store. Nothing is read yet.

        Raises:
            UsageError: the URL names no store.
        """
        label = label_of(url)

        def failed(operation: str, error: Exception) -> None:
            kind = type(error).__name__
            metrics.failures.labels(label, kind).inc()
            warning("store_failed", job=label, operation=operation, kind=kind, why=str(error))

        store = RetryingStore(
            open_store(url),
            timeout_seconds=settings.store_timeout_seconds,
            on_failure=failed,
            landmark=keys.FORMAT,
        )
        if settings.single_decider:
            store.exclusive = False
        return cls(url, store, Catalog(store), label, metrics, pool, settings.stuck_seconds)

    def committed(self, decision: Decision) -> None:
        """Take note of a commit."""
        self.metrics.commits.labels(self.label).inc()
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

    def retain_soon(self, keep: int) -> None:
        """Give old steps up in the background, so that the next snapshot need not wait for it."""
        self._retain_again = True
        if not self.collecting:
            self._retention = asyncio.create_task(self._retain(keep), name=f"retain {self.label}")

    async def _retain(self, keep: int) -> None:
        """Collect until no commit has come meanwhile. Failures are logged: the next commit tries
        again.
        """
        while self._retain_again:
            self._retain_again = False
            protected = frozenset(self.resumed_from.values())
            try:
                await collect(self.catalog, self.pool, keep, protected)
            except CkptmgrError as error:
                warning("retention_failed", job=self.label, why=str(error))

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

    async def aclose(self) -> None:
        """End the waits and the collection that are under way, and close the store."""
        await self.committer.aclose()
        if self._retention is not None:
            self._retention.cancel()
            await asyncio.gather(self._retention, return_exceptions=True)
        await self.store.aclose()
