"""Whoever comes while a collection reads a newer step back, which takes minutes, is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from ckptmgr.config import BUDGET_BYTES, DaemonSettings
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.resume import claim_attempt, decide_resume
from ckptmgr.daemon.retain import Given, collect
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, list_steps
from ckptmgr.repository.hold import put_hold, release_hold
from ckptmgr.restore.choose import find_held
from ckptmgr.store.base import Store
from ckptmgr.testing import Fault, FaultyStore
from small_step import memory_store, save_steps


async def collected_meanwhile(
    inner: Store, operation: str, key: str, comes: Callable[[], object]
) -> list[Given]:
    """Collect down to two steps; `comes` does its work while the operation is waited for."""
    gate = asyncio.Event()
    store = FaultyStore(inner, [Fault(operation=operation, key=key, gate=gate)])
    collecting = asyncio.create_task(collect(Catalog(store), BufferPool(BUDGET_BYTES), 2))
    while not any((name, at[: len(key)]) == (operation, key) for name, at in store.operations):
        await asyncio.sleep(0)
    await comes()
    gate.set()
    return await collecting


def test_a_hold_that_comes_during_the_read_back_holds() -> None:
    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30, 40))
        oldest = saved[0].id
        done = await collected_meanwhile(
            store, "get", "data/", lambda: put_hold(store, oldest, "person", "for the paper")
        )
        assert [(str(one.step), one.action) for one in done] == [("1.20", "retire")]
        assert oldest in (await list_steps(store)).standing()
        assert (await Catalog(store).decision(oldest)).committed
        assert await store.list(keys.packs(oldest))

    asyncio.run(main())


def test_what_an_attempt_resumes_from_during_the_read_back_stays() -> None:
    """By a daemon of another host: the attempt may crash, and go back there once more."""

    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30, 40))
        oldest = saved[0].id

        async def resumes() -> None:
            attempt, _ = await claim_attempt(store, 1, "")
            await decide_resume(store, attempt, 0, oldest)

        done = await collected_meanwhile(store, "get", "data/", resumes)
        assert [(str(one.step), one.action) for one in done] == [("1.20", "retire")]
        assert oldest in (await list_steps(store)).standing()

    asyncio.run(main())


def test_what_is_retired_in_the_instant_of_its_hold_is_told_of_once_it_is_released() -> None:
    """Nobody can see a hold that comes behind the last look; the data stays, and so must a way to
    let go of it.
    """

    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30))
        oldest = saved[0].id
        done = await collected_meanwhile(
            store, "put_new", "retired/", lambda: put_hold(store, oldest, "person", "")
        )
        assert done == [], "it says that it gave up what is still there"
        assert await find_held(Catalog(store), "10", "person") == oldest
        await release_hold(store, oldest, "person")
        done = await collect(Catalog(store), BufferPool(BUDGET_BYTES), 2)
        assert [(str(one.step), one.action) for one in done] == [("1.10", "delete")]

    asyncio.run(main())


def test_a_policy_that_comes_during_a_collection_is_that_of_the_next(tmp_path: Path) -> None:
    """The next trainer has come, and keeps more: none of its steps goes by what the last one
    said.
    """

    async def main() -> None:
        url = f"file://{tmp_path}/store"
        job = Job.open(url, Metrics(), BufferPool(BUDGET_BYTES), DaemonSettings(tmp_path))
        reads, goes_on = asyncio.Event(), asyncio.Event()

        async def pace(_nbytes: int) -> None:
            reads.set()
            await goes_on.wait()

        job.readback.pace = pace  # type: ignore[method-assign]
        await save_steps(job.store, (10, 20, 30))
        job.retain_soon(2)
        await reads.wait()
        await save_steps(job.store, (40, 50, 60))
        job.retain_soon(10)
        goes_on.set()
        await job.collected()
        stand = sorted((await list_steps(job.store)).standing())
        assert [str(step) for step in stand] == ["1.20", "1.30", "2.40", "2.50", "2.60"]
        await job.aclose()

    asyncio.run(main())
