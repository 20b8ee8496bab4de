"""The spool: a store that is down or slow costs no snapshot while a local disk has room."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.daemon.log import label_of
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.verify import verify_step
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from rigged import Rig

DOWN = (("*", "", "dead"),)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rigged store, and a spool that every daemon started from here on uses."""
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    monkeypatch.setenv("CKPTMGR_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("CKPTMGR_SPOOL_SECONDS", "1")
    return found


def committed(url: str) -> list[str]:
    """Commits of a store, oldest first, each read back whole."""

    async def read() -> list[str]:
        store = open_store(url)
        catalog = Catalog(store)
        found = []
        async for decision in catalog.committed():
            assert not await verify_step(catalog, decision, BufferPool(1))
            found.append(str(decision.id))
        await store.aclose()
        return found[::-1]

    return asyncio.run(read())


def spooled(tmp_path: Path, url: str) -> list[str]:
    """Parts of a spool, by its own files."""
    root = tmp_path / "spool" / label_of(url) / "man"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def parts(daemon: Daemon) -> list[dict[str, Any]]:
    return [part for job in daemon.status()["jobs"] for part in job["spool"]["parts"]]


def test_what_a_dead_store_does_not_take_is_spooled_and_drained_in_order(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=100) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(*DOWN)
        for step in range(2, 8):
            rank.save(step)  # waits for a free slot: the spool frees them
        until(lambda: len(spooled(tmp_path, rig.url)) == 6, "all are in the spool")
        assert rank.wait(2, seconds=0.1).outcome == Outcome.UNDECIDED
        assert [part["step"] for part in parts(daemon)] == [f"1.{step}" for step in range(2, 8)]
        rig.obey()
        for step in range(2, 8):
            assert rank.wait(step).outcome == Outcome.COMMITTED
        until(lambda: not spooled(tmp_path, rig.url), "the spool is empty")
        order = [event["step"] for event in daemon.events("committed")]
        assert order == [f"1.{step}" for step in range(1, 8)]
        rank.save(8)
        assert rank.wait(8).outcome == Outcome.COMMITTED
        assert len(daemon.events("spooled")) == 6, "the store takes it again"
    assert committed(rig.file_url) == [f"1.{step}" for step in range(1, 9)]


def test_a_killed_daemon_and_a_lost_memory_cost_nothing(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """As after a reboot: only the spool is left, and no trainer comes back."""
    with Daemon(runtime) as daemon:
        with Rank(runtime, rig.url) as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
            rig.obey(*DOWN)
            for step in (2, 3, 4):
                rank.save(step)
            until(lambda: len(spooled(tmp_path, rig.url)) == 3, "all are in the spool")
        daemon.end(signal.SIGKILL)
    for path in (runtime / "buffers").iterdir():
        path.unlink()
    rig.obey()
    with Daemon(runtime) as daemon:
        until(lambda: not spooled(tmp_path, rig.url), "the spool is empty")
        assert committed(rig.file_url)[-1] == "1.4"
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().step == 4
