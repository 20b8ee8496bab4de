"""One limit for the bytes of all jobs, to and from their stores."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptmgr.bucket import Bucket
from ckptmgr.config import DaemonSettings
from ckptmgr.daemon import job as module
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.service import Service
from ckptmgr.metrics import Metrics
from ckptmgr.repository.budget import BufferPool


def test_all_jobs_share_one_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now, slept = 0.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(round(seconds, 6))
        now += seconds

    async def main() -> None:
        limit = Bucket(100.0, lambda: now)
        settings = DaemonSettings(tmp_path)
        one, other = (
            Job.open(f"memory://{secrets.token_hex(4)}", Metrics(), BufferPool(1), settings, limit)
            for _ in range(2)
        )
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep, gather=asyncio.gather))
        await one.store.put_new("key", [memoryview(bytes(50))])
        await other.store.put_new("key", [memoryview(bytes(200))])
        await one.store.get("key", into=memoryview(bytearray(50)))
        await other.store.put_new("next", [memoryview(bytes(1))])
        await one.store.list("")
        await one.aclose()
        await other.aclose()

    asyncio.run(main())
    assert slept == [0.5, 2.0, 0.5], "each waits until the bytes before it have gone"


def test_the_service_tells_its_limit_and_without_one_nothing_is_paced(tmp_path: Path) -> None:
    limited = Service(DaemonSettings(tmp_path, max_store_gbps=8.0))
    assert limited.state()["max_store_gbps"] == 8.0
    assert limited._limit is not None
    assert limited._limit.rate == 1e9
    free = Service(DaemonSettings(tmp_path))
    assert free.state()["max_store_gbps"] is None
    assert free._limit is None
