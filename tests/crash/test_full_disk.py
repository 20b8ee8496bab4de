"""A disk that is really full, and a daemon that is really another process: training goes on, and
the newest snapshot is committed when there is room again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import verify_store
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome
from crash.full_disk import fill, mounted, train
from driven import Daemon, Rank, until
from processes import needs_root

pytestmark = [pytest.mark.root, pytest.mark.reliability]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 6 MiB."""
    needs_root()
    with mounted(tmp_path / "small", "6m") as path:
        yield path


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_a_full_disk_costs_nothing_but_time(runtime: Path, small_disk: Path, codec: str) -> None:
    url = f"file://{small_disk}/store"
    with Daemon(runtime) as daemon, Rank(runtime, url, codec=codec, keep=2) as rank:
        for step in (1, 2):
            train(rank, step)
            assert Outcome(rank.wait(step).outcome) is Outcome.COMMITTED
        filler = fill(small_disk)
        for step in range(3, 9):
            train(rank, step)  # never waits, never fails
            until(lambda: daemon.events("write_failed"), "the daemon meets the full disk")
        told = rank.wait(8, 0.5)
        assert Outcome(told.outcome) is Outcome.UNDECIDED
        assert "ENOSPC" in told.why
        assert "Free space" in daemon.status()["jobs"][0]["buffers"][0]["last_failure"]

        filler.unlink()
        assert Outcome(rank.wait(8).outcome) is Outcome.COMMITTED
        train(rank, 9)
        assert Outcome(rank.wait(9).outcome) is Outcome.COMMITTED
        assert not daemon.gone()
        assert rank.restore().step == 9

    async def main() -> None:
        store = LocalStore(str(small_disk / "store"))
        reports = await verify_store(
            Catalog(store), None, every=True, quick=False, progress=lambda _: None
        )
        await store.aclose()
        assert not [damage for report in reports for damage in report["damage"]]
        steps = [report["id"] for report in reports if report["committed"]]
        assert steps[:2] == ["1.9", "1.8"], "what was committed is not what is there"

    asyncio.run(main())
