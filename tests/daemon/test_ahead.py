"""`ckptmgr prefetch`: a step is in memory before its trainer is there, and never in its way."""

from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

import pytest

from called import call
from ckptmgr.config import DaemonSettings
from ckptmgr.daemon import ahead
from ckptmgr.daemon.service import FETCHED, Service
from ckptmgr.errors import HostMemoryError, UsageError
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.slot import capacity_for
from ckptmgr.staging.control import Client, Done, Prefetch, Prefetching, Release
from ckptmgr.staging.inbox import SOCKET
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome, StepId
from daemon.test_reading import daemon, fetched, saved, spoil
from driven import PATIENCE_SECONDS, Daemon, Rank, until
from processes import needs_root
from rigged import Rig

__all__ = ["daemon", "saved"]


def test_a_step_is_in_memory_before_its_trainer_is_there(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    """All that the store has to do for the trainer is to name the step."""
    found = call("prefetch", saved.url, "--json", runtime=runtime, PYTHONPATH=saved.python_path)
    assert found.document == {"step": "1.3", "ranks": [0], "bytes": found.document["bytes"]}
    assert daemon.await_event("prefetched")["step"] == "1.3"
    assert len(fetched(runtime)) == 1
    read = saved.asked("get", "data/")
    with Rank(runtime, saved.url) as rank:
        came = rank.restore()
        assert (came.attempt, came.step, came.source) == (1, 3, "store")
        assert Path(came.path).parent.name == FETCHED
        assert saved.asked("get", "data/") == read
        rank.link.ask(Release(), Done)
        assert fetched(runtime) == []


def test_a_prefetch_reads_each_record_once(runtime: Path, saved: Rig, daemon: Daemon) -> None:
    """Each in two reads: its header says how long it is."""
    records = "man/00000001/000000000003", "commit/00000001/000000000003"
    before = [saved.asked("get", key) for key in records]
    with Client(runtime / SOCKET) as client:
        client.ask(Prefetch(saved.url), Prefetching, PATIENCE_SECONDS)
    assert daemon.await_event("prefetched")["step"] == "1.3"
    after = [saved.asked("get", key) for key in records]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 2]


def test_a_trainer_waits_for_a_prefetch_that_is_under_way(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    saved.obey(("get", "data/", "hold"))
    with Client(runtime / SOCKET) as client:
        client.ask(Prefetch(saved.url), Prefetching, PATIENCE_SECONDS)
    until(lambda: saved.asked("get", "data/"), "it reads")
    with Rank(runtime, saved.url) as rank:
        saved.obey()
        came = rank.restore()
        assert (came.step, came.source) == (3, "store")
        assert Path(came.path).parent.name == FETCHED


def test_a_damaged_step_is_passed_over(runtime: Path, saved: Rig, daemon: Daemon) -> None:
    """As a restore does, which would come to the same one."""
    spoil(saved, 3, "man")
    with Client(runtime / SOCKET) as client:
        assert client.ask(Prefetch(saved.url), Prefetching, PATIENCE_SECONDS).step == 2
    assert "does not have the recorded" in daemon.await_event("prefetch_failed")["why"]


def test_memory_that_nobody_comes_for_goes_back(
    runtime: Path, saved: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def expired() -> None:
        service = Service(DaemonSettings(runtime_dir=runtime, metrics_port=-1))
        (runtime / FETCHED).mkdir(exist_ok=True)
        job = service.job(saved.file_url)
        assert (await service.ahead.begin(job, ())).step == 3
        assert service.ahead.urls == {saved.file_url}
        while not fetched(runtime):
            await asyncio.sleep(0.01)
        service.ahead.expire()
        assert len(fetched(runtime)) == 1
        monkeypatch.setattr(ahead.time, "monotonic", lambda: now + ahead.KEEP_SECONDS)
        service.ahead.expire()
        await service.ahead.aclose()
        assert (fetched(runtime), service.ahead.urls) == ([], set())
        await job.aclose()

    now = time.monotonic() + PATIENCE_SECONDS
    asyncio.run(expired())


def test_tasks_that_ask_at_once_leave_nothing_behind(runtime: Path, saved: Rig) -> None:
    """As `srun --ntasks-per-node=8 ckptmgr prefetch` does: each of them asks for all ranks."""

    async def asked() -> None:
        service = Service(DaemonSettings(runtime_dir=runtime, metrics_port=-1))
        (runtime / FETCHED).mkdir(exist_ok=True)
        job = service.job(saved.file_url)
        found = await asyncio.gather(*(service.ahead.begin(job, ()) for _ in range(8)))
        assert {one.step for one in found} == {3}
        while not fetched(runtime):
            await asyncio.sleep(0.01)
        await service.ahead.taken(job.url)
        assert fetched(runtime) == []
        assert await job.store.list("holds/") == []
        await job.aclose()

    asyncio.run(asked())


def test_a_rank_that_the_step_has_not_is_refused(runtime: Path, saved: Rig, daemon: Daemon) -> None:
    with (
        Client(runtime / SOCKET) as client,
        pytest.raises(UsageError, match="has 1 ranks, and no 3"),
    ):
        client.ask(Prefetch(saved.url, (0, 3)), Prefetching, PATIENCE_SECONDS)


def test_a_prefetch_leaves_room_for_the_slots_of_its_trainer(runtime: Path, saved: Rig) -> None:
    """A real tmpfs, with room for the step, but not for two slots beside it."""
    needs_root()
    nbytes = asyncio.run(fetched_bytes(saved))
    small = runtime / "small"
    small.mkdir(mode=0o700)
    options = f"size={nbytes * 2},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", small], check=True)
    try:
        with Daemon(small), Client(small / SOCKET) as client:
            with pytest.raises(HostMemoryError, match="2 slots as large"):
                client.ask(Prefetch(saved.url), Prefetching, PATIENCE_SECONDS)
            assert fetched(small) == []
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


async def fetched_bytes(saved: Rig) -> int:
    """What the newest step takes in memory."""
    catalog = Catalog(LocalStore(str(saved.path)))
    decision = await catalog.decision(StepId(1, 3))
    manifest = (await catalog.manifest(decision, 0)).manifest
    await catalog.store.aclose()
    return capacity_for(manifest).slot_bytes


def test_what_memory_holds_is_not_prefetched(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        found = call("prefetch", rig.url, runtime=runtime, PYTHONPATH=rig.python_path)
        assert found.out.startswith("nothing to prefetch: this host's memory holds")
        assert not daemon.events("prefetched")
