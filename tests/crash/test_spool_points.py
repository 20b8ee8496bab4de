"""Every crash of a drain, and of the drain that follows it: the steps of the spool become commits.

The drainer, the committer and the pipeline are the daemon's own. At each change of the store or
the spool the daemon dies; the change is lost, visible but not durable, or made. A power cut of the
store follows each recovery; one of the spool's disk brings back what was deleted from it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.daemon import drain
from ckptmgr.daemon.drain import Drainer
from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.daemon.resume import claim_attempt
from ckptmgr.daemon.spool import Part, Spool, SpoolDirectory
from ckptmgr.errors import CkptmgrError
from ckptmgr.metrics import Metrics
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.verify import verify_step
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import StepId
from crash.crash_store import Change, CrashStore, State
from scale import scaled
from small_step import HOST, Objects, encode_state, fill_slot, host_buffer, shelf_of, small_state

pytestmark = pytest.mark.reliability

URL = "crash://"
STEPS = (1, 2)
PATIENCE_SECONDS = 10.0
"""Bound of one drain, which takes milliseconds."""

FATES = ("lost", "visible", "made")

_metrics = Metrics()
_pool = BufferPool(1 << 27)


@dataclass(frozen=True)
class Instant:
    """What there is just before a change; `change` is None where it is one of the spool."""

    store: State
    spool: Objects
    change: Change | None
    deleted: str = ""


class SpoolDisk(MemoryStore):
    """The spool's disk, which tells of each deletion before it is made."""

    def __init__(self, objects: Objects, tell: Callable[[str], None]) -> None:
        super().__init__(secrets.token_hex(8))
        shelf_of(self).update({key: bytearray(blob) for key, blob in objects.items()})
        self._told = tell

    def copy(self) -> Objects:
        return {key: bytes(blob) for key, blob in shelf_of(self).items()}

    async def delete(self, key: str) -> None:
        if key in shelf_of(self):
            self._told(key)
        await super().delete(key)

    async def sweep_temporaries(self, _older_than_seconds: float) -> int:
        return 0


class Watched(CrashStore):
    """The store, which tells of each change before it is made."""

    def __init__(self, state: State, tell: Callable[[Change], None]) -> None:
        super().__init__(state)
        self._told = tell

    def _note(self, change: Change) -> bool:
        self._told(change)
        return super()._note(change)


class Run:
    """One daemon's life over a store and a spool; `instants` are those of all their changes."""

    def __init__(self, state: State, spool: Objects, directory: Path) -> None:
        self.instants: list[Instant] = []
        self.disk = SpoolDisk(spool, lambda key: self._note(None, key))
        self.store = Watched(state, self._note)
        self.job = Job(URL, self.store, Catalog(self.store), "test", _metrics, _pool)
        self.spool = Spool(SpoolDirectory(directory, 0), URL)
        self.spool.store, self.spool.keep = self.disk, 9  # type: ignore[assignment]
        self.drainer = Drainer(self.job, self.spool, Intake(directory))

    def _note(self, change: Change | None, deleted: str = "") -> None:
        self.instants.append(Instant(self.store.now, self.disk.copy(), change, deleted))

    async def drain(self) -> None:
        """Until nothing is left."""
        await self.spool.load()
        task = asyncio.create_task(self.drainer.run())
        empty = asyncio.create_task(self.spool.wait_empty())
        await asyncio.wait(
            [task, empty], return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_SECONDS
        )
        assert empty.done(), task
        for one in (task, empty):
            one.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.job.committer.aclose()


async def spooled(world: int) -> tuple[State, Objects]:
    """A store with an attempt, and a spool with the parts of two steps of it."""
    store = CrashStore(State())
    attempt, nonce = await claim_attempt(store, world, "")
    disk = SpoolDisk({}, lambda _: None)
    for step in STEPS:
        for rank in range(world):
            encoded = encode_state(small_state(100 * step + rank))
            with host_buffer(URL, len(encoded.data)) as buffer:
                of_step: Any = {"attempt": attempt, "nonce": nonce, "step": step}
                snapshot = fill_slot(buffer, 0, encoded, **of_step, rank=rank, world=world)
                source = Source(buffer, snapshot, disk, HOST)
                await Pipeline(_pool).write(source, "none", lambda _raw, _stored: None)
    return store.now, disk.copy()


def left_behind(instant: Instant, fate: str) -> tuple[State, Objects]:
    spool = dict(instant.spool)
    if instant.change is None:
        if fate == "made":
            del spool[instant.deleted]
        return instant.store, spool
    if fate == "lost":
        return instant.store, spool
    return instant.store.after(instant.change, durable=fate == "made"), spool


async def check(state: State) -> None:
    """Both steps are commits, whole, and stay so in a power cut."""
    for now in (state, state.cut()):
        store = CrashStore(now)
        catalog = Catalog(store)
        for step in STEPS:
            decision = await catalog.decision(StepId(1, step))
            assert decision.committed
            assert not await verify_step(catalog, decision, _pool)


async def explore(world: int, directory: Path, deepest: int) -> tuple[int, int]:
    """All crashes of a drain, and all of the drains that follow; how many of each."""
    points = [0, 0]

    async def one(state: State, spool: Objects, depth: int) -> None:
        run = Run(state, spool, directory)
        await run.drain()
        assert not [key for key in run.disk.copy() if not key.startswith("binding/")]
        await check(run.store.now)
        await check_undone(run, spool, depth)
        if depth == deepest:
            return
        for instant in run.instants:
            for fate in FATES:
                points[depth] += 1
                start, left = left_behind(instant, fate)
                # The spool's own claims hold across a power cut of the store's servers.
                await one(start.cut() if fate == "visible" else start, left, depth + 1)

    async def check_undone(run: Run, spool: Objects, depth: int) -> None:
        """Deletions come back: all of them, or a manifest without its packs."""
        if depth:
            return
        for left in (spool, {k: v for k, v in spool.items() if k.startswith("man/")}):
            again = Run(run.store.now, left, directory)
            await again.drain()
            await check(again.store.now)

    await one(*await spooled(world), 0)
    return points[0], points[1]


@pytest.mark.parametrize("world", [1, 2])
def test_no_crash_of_a_drain_loses_a_step(world: int, tmp_path: Path) -> None:
    first, second = asyncio.run(explore(world, tmp_path, scaled(3 - world, 2)))
    print(f"\nworld {world}: {first} points, {second} in the recoveries")
    assert first >= 3 * (5 + 3 * world)


# -- seeded bugs ----------------------------------------------------------------------------------


async def _delete_at_once(self: Drainer, part: Part, sealed: Any) -> None:
    await self._spool.remove(part)


BUGS: dict[str, list[tuple[Any, str, Any]]] = {
    "a part goes before its decision": [(Drainer, "_decide_once", _delete_at_once)],
    "what is there already is not adopted": [(drain, "adopt_manifest", None)],
    "packs are left out": [(drain, "copy_packs", None)],
}


@contextmanager
def seeded(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for where, attribute, change in BUGS[name]:
            patch.setattr(where, attribute, change or _nothing)
        yield


async def _nothing(*_: Any) -> None:
    return None


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_of_the_drain_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "RETRY_SECONDS_MIN", 0.01)
    monkeypatch.setitem(globals(), "PATIENCE_SECONDS", 1.0)
    with seeded(name), pytest.raises((AssertionError, CkptmgrError)):
        asyncio.run(explore(1, tmp_path, 1))
