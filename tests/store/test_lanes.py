"""Work in lanes: all of it, in order, never too much at a time, and none after an error."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from ckptmgr.errors import StoreError
from ckptmgr.store.lanes import in_lanes


@pytest.mark.parametrize("count", [0, 1, 3, 50])
async def test_results_are_in_order_and_few_are_under_way(count: int) -> None:
    under_way: set[int] = set()
    most = 0

    async def square(item: int) -> int:
        nonlocal most
        under_way.add(item)
        most = max(most, len(under_way))
        await asyncio.sleep(0)
        under_way.remove(item)
        return item * item

    assert await in_lanes(square, range(count), 4) == [item * item for item in range(count)]
    assert most == min(count, 4)


async def test_the_first_error_is_raised_and_nothing_goes_on() -> None:
    begun = []

    async def fail(item: int) -> None:
        begun.append(item)
        if item == 5:
            raise StoreError("full", subject=str(item))
        await asyncio.sleep(0)

    with pytest.raises(StoreError, match="5"):
        await in_lanes(fail, range(100), 3)
    before = len(begun)
    await asyncio.sleep(0.01)
    assert len(begun) == before < 10


async def test_a_cancellation_while_others_clean_up_is_not_forgotten() -> None:
    """What tries again after an error ends when it is told to, whenever that is."""
    cleaning, cleaned = asyncio.Event(), asyncio.Event()

    async def work(item: int) -> None:
        if item == 0:
            await asyncio.sleep(0)
            raise StoreError("no answer")
        try:
            await asyncio.Event().wait()
        finally:
            cleaning.set()
            await cleaned.wait()

    tries = 0

    async def try_again() -> None:
        nonlocal tries
        while tries < 3:
            tries += 1
            with contextlib.suppress(StoreError):
                await in_lanes(work, range(2), 2)

    trying = asyncio.create_task(try_again())
    await cleaning.wait()
    trying.cancel()
    await asyncio.sleep(0)
    cleaned.set()
    await asyncio.wait([trying])
    assert (trying.cancelled(), tries) == (True, 1)


async def test_an_error_within_a_deadline_that_is_over_is_a_timeout() -> None:
    async def fail(item: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise StoreError("has ended", subject=str(item))

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await in_lanes(fail, range(3), 3)
