"""Draining a spool: what is wrong with one part costs that part, and no other."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import BUDGET_BYTES, DaemonSettings
from ckptmgr.daemon import drain
from ckptmgr.daemon import spool as spooling
from ckptmgr.daemon.drain import Drainer
from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import label_of
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.daemon.resume import claim_attempt
from ckptmgr.daemon.service import Service
from ckptmgr.daemon.spool import Spool, SpoolDirectory
from ckptmgr.errors import MediumError, StoreError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.manifest import Manifest
from ckptmgr.repository.record import ENCRYPTED_VERSION, Kind, seal
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.retry import RetryingStore
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import StepId
from small_step import HOST, encode_state, fill_slot, host_buffer, memory_store, small_state

ENCODED = encode_state(small_state(10))
STEPS = (1, 2, 3)
PATIENCE_SECONDS = 30.0


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "RETRY_SECONDS_MIN", 0.01)
    monkeypatch.setattr(drain, "RETRY_SECONDS_MAX", 0.02)
    monkeypatch.setattr(spooling, "RetryingStore", partial(RetryingStore, jitter=lambda: 0.0))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every warning of the spool and its drain."""
    found: list[tuple[str, dict[str, Any]]] = []
    for module in (drain, spooling):
        monkeypatch.setattr(module, "warning", lambda name, **fields: found.append((name, fields)))
    return found


async def spooled(store: Store, path: Path) -> Spool:
    """A claimed attempt of one rank, all of whose steps are in a spool."""
    attempt, nonce = await claim_attempt(store, 1, "")
    spool = Spool(SpoolDirectory(path, 0), store.url)
    for step in STEPS:
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            snapshot = fill_slot(buffer, 0, ENCODED, attempt=attempt, nonce=nonce, step=step)
            async with spool.writing(snapshot, 9) as disk:
                source = Source(buffer, snapshot, disk, HOST)
                written = await Pipeline(BufferPool(1)).write(source, "none", lambda *_: None)
                await spool.add(written)
    return spool


@asynccontextmanager
async def job_of(store: Store) -> AsyncIterator[Job]:
    job = Job(store.url, store, Catalog(store), "test", Metrics(), BufferPool(BUDGET_BYTES))
    try:
        yield job
    finally:
        await job.aclose()


@asynccontextmanager
async def drainer_of(store: Store, spool: Spool) -> AsyncIterator[Drainer]:
    """What drains a spool into a store, but is not running yet."""
    async with job_of(store) as job:
        yield Drainer(job, spool, Intake(Path("/nowhere")))


async def drained(drainer: Drainer, done: Callable[[], bool], spool: Spool) -> None:
    """Run a drainer until something holds of its spool; a fault of it comes out."""
    running = asyncio.create_task(drainer.run())

    async def looking() -> None:
        async with spool.changed:
            await spool.changed.wait_for(done)

    waiting = asyncio.create_task(looking())
    await asyncio.wait(
        [running, waiting], timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    ended = running.done()
    for task in (running, waiting):
        task.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    if ended:
        running.result()
    assert done(), drainer.last_failure


async def committed(store: Store) -> list[int]:
    """Steps whose commit holds, oldest first."""
    entries = await Catalog(store).entries()
    found = [entry.decision for entry in entries if entry.decision is not None]
    return [decision.step for decision in found if decision.committed][::-1]


def left(spool: Spool) -> list[int]:
    return [part.id.step for part in spool.parts]


async def test_a_register_that_does_not_hold_costs_its_own_step_only(
    tmp_path: Path, told: list[tuple[str, dict[str, Any]]]
) -> None:
    store = memory_store({})
    spool = await spooled(store, tmp_path)
    register = keys.commit(StepId(1, 1))
    await store.put_new(register, [memoryview(b"not a register" * 30)])
    async with drainer_of(store, spool) as drainer:
        await drained(drainer, lambda: not spool.parts, spool)
    assert await committed(store) == [2, 3]
    ((name, fields),) = told
    assert (name, fields["step"]) == ("spool_dropped", "1.1")
    assert register in fields["why"]


async def test_a_part_over_which_a_drain_faults_again_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory_store({})
    spool = await spooled(store, tmp_path)
    real = drain.copy_packs

    async def faulty(source: Store, target: Store, manifest: Any, *more: Any) -> None:
        if manifest.step == 1:
            raise ZeroDivisionError
        await real(source, target, manifest, *more)

    monkeypatch.setattr(drain, "copy_packs", faulty)
    async with drainer_of(store, spool) as drainer:
        for again in (False, True):
            with pytest.raises(ZeroDivisionError):
                await drained(drainer, lambda: False, spool)
            assert drainer.part is not None
            assert drainer.part.id == StepId(1, 1)
            assert drainer.faulted(drainer.part, ZeroDivisionError()) is again
        await drained(drainer, lambda: left(spool) == [1], spool)
        assert not spool.blocks(1), "new snapshots go to the store"
    assert await committed(store) == [2, 3]
    again = await _as_the_next_daemon(spool, tmp_path)
    monkeypatch.undo()
    async with drainer_of(store, again) as drainer:
        await drained(drainer, lambda: not again.parts, again)
    assert await committed(store) == [1, 2, 3]


async def _as_the_next_daemon(spool: Spool, path: Path) -> Spool:
    found = Spool(SpoolDirectory(path, 0), spool.url)
    await found.load()
    assert left(found) == [1]
    return found


@pytest.mark.parametrize("what", ["man/", "data/"])
async def test_a_part_that_the_medium_does_not_give_holds_up_no_other(
    tmp_path: Path,
    told: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """One bad sector, found when the spool is opened or when the part is copied."""
    store = memory_store({})
    bad = f"{what}00000001/000000000001"
    real = LocalStore.get

    async def get(self: LocalStore, key: str, *where: Any, **more: Any) -> memoryview:
        if key.startswith(bad):
            raise MediumError("Input/output error (EIO)", subject=key)
        return await real(self, key, *where, **more)

    await spooled(store, tmp_path)
    monkeypatch.setattr(LocalStore, "get", get)
    directory = await SpoolDirectory.open(tmp_path, 0)
    (spool,) = directory.unfinished()
    async with drainer_of(store, spool) as drainer:
        await drained(drainer, lambda: not spool.parts, spool)
    await directory.aclose()
    assert await committed(store) == [2, 3]
    ((name, fields),) = told
    assert (name, fields["step"]) == ("spool_dropped", "1.1")
    assert bad in fields["why"]


async def test_a_disk_that_gives_nothing_loses_nothing(
    tmp_path: Path,
    told: list[tuple[str, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await spooled(memory_store({}), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "get", _not_read)
        directory = await SpoolDirectory.open(tmp_path, 0)
        assert [name for name, _ in told] == ["spool_refused"]
        assert not list(directory.unfinished())
        await directory.aclose()
    directory = await SpoolDirectory.open(tmp_path, 0)
    (spool,) = directory.unfinished()
    assert left(spool) == list(STEPS)
    await directory.aclose()


async def _not_read(_store: LocalStore, key: str, *_where: Any, **_more: Any) -> memoryview:
    raise MediumError("Input/output error (EIO)", subject=key)


async def test_a_spool_that_was_emptied_has_no_directories_of_steps(tmp_path: Path) -> None:
    store = memory_store({})
    spool = await spooled(store, tmp_path)
    async with drainer_of(store, spool) as drainer:
        await drained(drainer, lambda: not spool.parts, spool)
    assert not _steps_below(tmp_path)


async def test_directories_that_a_killed_daemon_left_go_when_the_spool_is_opened(
    tmp_path: Path,
) -> None:
    spool = await spooled(memory_store({}), tmp_path)
    one, other, *_ = spool.parts
    await spool.store.delete(keys.manifest(one.id, one.rank))
    for key in await spool.store.list(keys.packs(one.id)):
        await spool.store.delete(key)
    await Spool(SpoolDirectory(tmp_path, 0), spool.url).load()
    assert f"{one.id.step:012d}" not in _steps_below(tmp_path)
    assert f"{other.id.step:012d}" in _steps_below(tmp_path)


def _steps_below(path: Path) -> set[str]:
    return {found.name for found in path.glob("*/*/00000001/*") if found.is_dir()}


async def test_a_spool_that_is_closed_has_no_threads(tmp_path: Path, runtime: Path) -> None:
    """Neither that of a job that is not in use any more, nor any at the end of a daemon."""
    before = set(threading.enumerate())
    service = Service(DaemonSettings(runtime))
    service.spools = directory = await SpoolDirectory.open(tmp_path, 0)
    jobs = [service.job(f"memory://{secrets.token_hex(8)}") for _ in range(3)]
    for job in jobs:
        assert job.spool is not None
        await job.spool.store.list("")
    await service._close_unused()
    assert not service.jobs
    _ended(set(threading.enumerate()) - before)
    await directory.of(jobs[0].url).store.list("")
    await directory.aclose()
    _ended(set(threading.enumerate()) - before)


def _ended(threads: set[threading.Thread]) -> None:
    """Those of spools end by themselves once they are told to."""
    for thread in threads:
        if not thread.name.startswith("asyncio"):
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), thread.name


async def test_a_store_that_hangs_holds_up_no_other_job(tmp_path: Path, runtime: Path) -> None:
    """The daemon's own drains, of two jobs."""
    service = Service(DaemonSettings(runtime))
    hangs, takes = FaultyStore(memory_store({})), memory_store({})
    first, second = await spooled(hangs, tmp_path), await spooled(takes, tmp_path)
    gate = asyncio.Event()
    hangs.plan([Fault(operation="put_new", key="data/", gate=gate, and_later=True)])
    async with asyncio.timeout(PATIENCE_SECONDS), job_of(hangs) as one, job_of(takes) as other:
        service._drain(one, first)
        while not any(key.startswith("data/") for _, key in hangs.operations):
            await asyncio.sleep(0)
        service._drain(other, second)
        await second.wait_empty()
        for job in (one, other):
            await service._end_drain(job.url)
    assert left(first) == list(STEPS)
    assert await committed(takes) == list(STEPS)


async def test_a_part_of_a_newer_version_is_left_for_it(
    tmp_path: Path, told: list[tuple[str, dict[str, Any]]]
) -> None:
    """Who goes back to this version must not lose what the newer one has spooled."""
    store = memory_store({})
    spool = await spooled(store, tmp_path)
    newer = spool.parts[0]
    sealed = await spool.manifest(newer)
    await spool.store.delete(sealed.key)
    await put_record_of(spool.store, sealed.key, sealed.manifest, ENCRYPTED_VERSION + 1)
    packs = await spool.store.list(keys.packs(newer.id))
    again = Spool(SpoolDirectory(tmp_path, 0), spool.url)
    await again.load()
    async with drainer_of(store, again) as drainer:
        await drained(drainer, lambda: not again.parts, again)
    assert await committed(store) == [2, 3]
    assert await again.store.list("man/") == [sealed.key]
    assert await again.store.list("data/") == packs
    ((name, fields),) = told
    assert (name, fields["path"]) == ("spool_refused", f"{label_of(spool.url)}/{sealed.key}")
    with host_buffer(store.url, len(ENCODED.data)) as buffer:
        of_step: Any = {"attempt": 1, "nonce": newer.nonce, "step": newer.id.step}
        with pytest.raises(StoreError, match="by a newer ckptmgr"):
            async with again.writing(fill_slot(buffer, 0, ENCODED, **of_step), 9):
                pass
    assert await again.store.list("man/") == [sealed.key]


async def put_record_of(store: Store, key: str, manifest: Manifest, version: int) -> None:
    record = seal(Kind.MANIFEST, key, manifest, version)
    await store.put_new(key, [memoryview(record)])


async def test_a_fault_over_a_decision_takes_no_other_part_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waits of the others end with the run; the next run takes them up again."""
    store = memory_store({})
    spool = await spooled(store, tmp_path)
    async with drainer_of(store, spool) as drainer:
        with monkeypatch.context() as patch:
            patch.setattr(Drainer, "_decide_once", _fault)
            with pytest.raises(ZeroDivisionError):
                await drained(drainer, lambda: False, spool)
        assert drainer.part is not None
        assert not drainer.faulted(drainer.part, ZeroDivisionError())
        await drained(drainer, lambda: not spool.parts, spool)
    assert await committed(store) == [1, 2, 3]


async def _fault(*_: Any) -> None:
    raise ZeroDivisionError
