"""A policy reaches the daemon and outlives it; reading back stands in nobody's way."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import signal
from pathlib import Path

import pytest

from ckptmgr.daemon.readback import GIVE_WAY_SECONDS_MAX, ReadBack
from ckptmgr.metrics import Metrics
from ckptmgr.repository.keeping import NEWER_MIN
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until
from rigged import Rig
from watch.watching import commits_of


def standing(rig: Rig) -> list[int]:
    return [entry.id.step for entry in commits_of(rig.path)]


def test_a_policy_outlives_the_daemon_that_was_told(runtime: Path, rig: Rig) -> None:
    policy = "last=2,every=4,best=step:min:1"
    with Daemon(runtime) as first, Rank(runtime, rig.url, keep=policy) as rank:
        for step in range(2, 8):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
        until(lambda: standing(rig) == [2, 4, 6, 7], "the others go")
        first.end(signal.SIGKILL)
        until(lambda: rank.link.rejoined >= 1, "the rank has started another")
        for step in range(8, 11):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
        until(lambda: standing(rig) == [2, 4, 8, 9, 10], "by the same policy")
        assert {one["why"] for one in first.events("retired")} == {f"keep={policy}"}
    assert len(standing(rig)) >= NEWER_MIN


def test_reading_back_waits_for_saves_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        readback = ReadBack()
        readback.begin()
        with readback.saving():
            waiting = asyncio.ensure_future(readback.pace(1))
            await asyncio.sleep(0.05)
            assert not waiting.done(), "it read while a snapshot was being stored"
        await asyncio.wait_for(waiting, 60)
        monkeypatch.setattr("ckptmgr.daemon.readback.GIVE_WAY_SECONDS_MAX", 0.05)
        readback.begin()
        with readback.saving():
            await asyncio.wait_for(readback.pace(1), 60)  # its patience ends
            await asyncio.wait_for(readback.pace(1), 60)  # and is used up
        assert GIVE_WAY_SECONDS_MAX > 0

    asyncio.run(main())


def test_reading_back_keeps_its_limit_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def main() -> None:
        metrics = Metrics()
        readback = ReadBack("job", metrics, gbps=8.0)
        monkeypatch.setattr("ckptmgr.daemon.readback.asyncio.sleep", sleep)
        for _ in range(3):
            await readback.pace(10**9)
        assert [round(seconds) for seconds in slept] == [0, 1, 2], "1 GB/s is one second each"
        readback.verified()
        found = metrics.registry.get_sample_value
        assert found("ckptmgr_readback_bytes_total", {"job": "job"}) == 3e9
        assert found("ckptmgr_verified_total", {"job": "job"}) == 1

    asyncio.run(main())


def resident_pages(path: Path) -> int:
    """Pages of a file that are in the page cache, as mincore(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p(ctypes.addressof(view))
        assert libc.mincore(address, ctypes.c_size_t(len(mapped)), found) == 0
        del view
        mapped.close()
        return sum(one & 1 for one in found)


def test_an_object_is_dropped_from_the_page_cache(tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalStore(str(tmp_path))
        await store.put_new("data/x", [memoryview(os.urandom(40 * mmap.PAGESIZE))])
        await store.get("data/x")
        before = resident_pages(tmp_path / "data/x")
        await store.uncache("data/x")
        after = resident_pages(tmp_path / "data/x")
        await store.uncache("data/gone")
        await store.aclose()
        if before and after == before:
            pytest.skip("this file system has no medium behind its page cache")
        assert (before, after) == (40, 0)

    asyncio.run(main())
