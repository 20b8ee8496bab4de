"""The budget is never exceeded, its buffers are used again, and threads give memory back."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.config import MIB
from ckptmgr.repository.budget import LEASE_BYTES, BufferPool, in_thread


@given(budget=st.integers(0, 1 << 34))
def test_leases_fit_the_budget_and_there_is_always_one(budget: int) -> None:
    count = BufferPool(budget).count
    assert count >= 1
    assert count == 1 or count * LEASE_BYTES <= budget


def test_no_more_leases_than_the_budget_allows() -> None:
    async def main() -> None:
        pool = BufferPool(2 * (LEASE_BYTES + MIB))
        out = most = 0

        async def use() -> None:
            nonlocal out, most
            async with pool.lease() as lease:
                assert len(lease) == LEASE_BYTES
                out += 1
                most = max(most, out)
                await asyncio.sleep(0)
                out -= 1

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(use())
        assert most == pool.count == 2

    asyncio.run(main())


def test_it_says_whether_a_lease_would_wait() -> None:
    async def main() -> None:
        pool = BufferPool(2 * (LEASE_BYTES + MIB))
        async with pool.lease():
            assert pool.has_free
            async with pool.lease():
                assert not pool.has_free
        assert pool.has_free

    asyncio.run(main())


def test_a_failing_or_cancelled_user_gives_its_lease_back() -> None:
    async def main() -> None:
        pool = BufferPool(1)
        with pytest.raises(ZeroDivisionError):
            async with pool.lease():
                raise ZeroDivisionError

        async def hold() -> None:
            async with pool.lease():
                await asyncio.Event().wait()

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(10), pool.lease() as lease:
            assert lease

    asyncio.run(main())


def test_a_cancelled_call_ends_when_its_thread_has() -> None:
    """Else its memory would be lent to another while the thread still writes to it."""

    async def main() -> None:
        started, go, ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            started.set()
            go.wait(30)
            ended.set()

        task = asyncio.create_task(in_thread(work))
        await asyncio.to_thread(started.wait, 30)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(main())


def test_results_and_errors_of_a_thread_come_through() -> None:
    async def main() -> None:
        assert await in_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await in_thread(divmod, 7, 0)

    asyncio.run(main())
