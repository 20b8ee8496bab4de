"""All checks of `ckptmgr doctor`: those of this host, and those of a store that answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from ckptmgr.config import store_timeout_seconds
from ckptmgr.doctor import disk, lifetime, memory, runtime, versions
from ckptmgr.doctor.load import Load
from ckptmgr.doctor.promises import PLACE, Scratch, exclusive, visible
from ckptmgr.doctor.speed import bandwidth
from ckptmgr.errors import StoreError, StoreUnreachableError
from ckptmgr.store.base import Store
from ckptmgr.store.finding import Finding, Health
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore

ROOT = Path("/")

TRIES_SECONDS = 5.0
"""How long a failing operation is tried again: a person waits for the answer."""


def look_at_host(runtime_dir: Path, load: Load, root: Path = ROOT) -> list[Finding]:
    """Everything about this host that a checkpoint rests on."""
    state, daemon = runtime.state_of_daemon(runtime_dir)
    pid = state["pid"] if state is not None else None
    return [
        versions.installed(),
        runtime.directory(runtime_dir),
        runtime.socket(runtime_dir),
        daemon,
        memory.shared_memory(runtime_dir, load),
        memory.huge_pages(runtime_dir, root),
        memory.cgroup_memory(root, load),
        memory.page_locked(load),
        *lifetime.findings_of(root, pid),
    ]


class StoreCheckup:
    """The checks of one store. `findings` grow as they are made; `unreachable` is why they ended
    early.
    """

    def __init__(self, url: str, load: Load, probe_mib: int) -> None:
        self._store = open_store(url)
        self._other = open_store(url)
        self._load, self._probe_mib = load, probe_mib
        self._scratch = Scratch()
        self.path = disk.path_of(self._store.url)
        self.findings: list[Finding] = []
        self.unreachable: StoreUnreachableError | None = None
        self._ended_early = False

    async def run(self) -> None:
        """Make all checks, and delete what they put."""
        store, other = map(_patient, (self._store, self._other))
        with disk.leaving_no_directory(self.path):
            try:
                await self._look(store, other)
            finally:
                await self._delete(store)
                await store.aclose()
                await other.aclose()

    async def _look(self, store: Store, other: Store) -> None:
        try:
            await self._probe(store)
            self.findings.append(await exclusive(store, self._scratch))
            self.findings += await visible(store, other, self._scratch)
            await self._look_at_files()
            self.findings += await bandwidth(store, self._scratch, self._load, self._probe_mib)
        except StoreUnreachableError as error:
            self.unreachable = error
            self._ended_early = True
            what = "the store does not answer as it should; what would follow is not checked"
            evidence = f"{error.subject}: {error.message}"
            finding = Finding("reachable", Health.FAILURE, what, evidence, error.hint)
            self.findings.append(finding)
        except StoreError as error:
            self._ended_early = True
            what = "the store failed; what would follow is not checked"
            evidence = f"{error.subject}: {error.message}"
            self.findings.append(
                Finding("reachable", Health.FAILURE, what, evidence, "Look at the store's own log.")
            )

    async def _probe(self, store: Store) -> None:
        """One object: whether the store takes anything at all, and what it knows of itself."""
        key, before = self._scratch.key(), time.time()
        start = time.monotonic()
        await store.put_new(key, [memoryview(b"ckptmgr doctor")])
        await store.make_durable(key)
        took = time.monotonic() - start
        evidence = f"a small object was durable after {took * 1000:.1f} ms"
        self.findings.append(Finding("reachable", Health.OK, "the store takes objects", evidence))
        self.findings += await self._store.examine(key, (before, time.time()))

    async def _look_at_files(self) -> None:
        if self.path is None:
            return
        checks: list[Callable[[], Finding]] = [
            lambda: disk.links(str(self.path)),
            lambda: disk.space(str(self.path), self._load),
            lambda: disk.place(str(self.path)),
        ]
        self.findings += [await asyncio.to_thread(check) for check in checks]

    async def _delete(self, store: Store) -> None:
        try:
            await self._scratch.delete(store)
        except StoreError as error:
            if not self._ended_early:
                self.findings.append(
                    Finding(
                        "deletes",
                        Health.FAILURE,
                        "objects can not be deleted, so that old steps never go",
                        f"{error.subject}: {error.message}",
                        "Allow this user to delete objects, and delete `doctor/` by hand.",
                    )
                )
            return
        evidence = f"{len(self._scratch.made)} objects under {PLACE} were put and deleted"
        if not self._ended_early:
            self.findings.append(Finding("deletes", Health.OK, "objects can be deleted", evidence))


def _patient(store: Store) -> Store:
    seconds = store_timeout_seconds()
    return RetryingStore(
        store, timeout_seconds=seconds, deadline_seconds=max(TRIES_SECONDS, seconds)
    )


async def look_at_store(url: str, load: Load, probe_mib: int) -> StoreCheckup:
    """All checks of the store at `url`.

    Raises:
        UsageError: the URL names no store.
    """
    checkup = StoreCheckup(url, load, probe_mib)
    await checkup.run()
    return checkup
