"""A store that lets two writers win is found out, and one that does not is not suspected."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.errors import StoreUnreachableError, UsageError
from ckptmgr.repository import keys
from ckptmgr.repository.commit import Format, Retired, abort_step, check_format, get_record
from ckptmgr.repository.exclusion import PLACE, RACES, is_exclusive
from ckptmgr.repository.record import Kind
from ckptmgr.repository.rules import LOTS, goes_first, may_decide, next_attempt
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.retry import RetryingStore
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import StepId
from rigged import SloppyStore
from small_step import memory_store

STEP = StepId(10_007, 3)


def sloppy(tmp_path: Path) -> Store:
    return RetryingStore(SloppyStore(f"sloppy://{tmp_path}/store"))


def unproved() -> MemoryStore:
    store = memory_store({})
    store.exclusive = None
    return store


async def test_a_race_tells_the_two_kinds_apart(tmp_path: Path) -> None:
    assert await is_exclusive(memory_store({}))
    assert await is_exclusive(LocalStore(f"{tmp_path}/local"))
    assert not await is_exclusive(sloppy(tmp_path))


async def test_a_race_leaves_nothing_behind(tmp_path: Path) -> None:
    for store in (memory_store({}), sloppy(tmp_path)):
        await is_exclusive(store)
        assert await store.list(PLACE) == []


async def test_one_double_winner_in_many_races_is_enough() -> None:
    class Once(MemoryStore):
        """Lets the last race be won twice."""

        async def put_new(self, key: str, buffers: object) -> object:
            result = await super().put_new(key, buffers)
            if key.endswith(f"/{RACES - 1}"):
                await self.delete(key)
            return result

    assert not await is_exclusive(Once("once"))


async def test_a_store_that_fails_proves_nothing() -> None:
    store = FaultyStore(memory_store({}), [Fault(StoreUnreachableError("gone"), at=40)])
    with pytest.raises(StoreUnreachableError):
        await is_exclusive(store)


async def test_the_mark_keeps_what_was_proved(tmp_path: Path) -> None:
    """Whoever opens the store later believes the mark, and races no more."""
    first = sloppy(tmp_path)
    assert await check_format(first, create=True)
    assert first.exclusive is False
    later = sloppy(tmp_path)
    assert await check_format(later, create=False)
    assert later.exclusive is False
    honest = unproved()
    await check_format(honest, create=True)
    assert honest.exclusive is True


async def test_a_mark_of_before_means_exclusion() -> None:
    """The bytes of a mark on a store that decides are what they always were."""
    store = memory_store({})
    await check_format(store, create=True)
    assert b"exclusive" not in bytes(await store.get(keys.FORMAT))
    assert (await get_record(store, Kind.FORMAT, keys.FORMAT, Format)).exclusive


async def test_two_modes_in_one_store_are_refused() -> None:
    store = memory_store({})
    await check_format(store, create=True)
    store.exclusive = False
    with pytest.raises(UsageError, match="single-decider"):
        await check_format(store, create=True)


async def test_a_step_is_retired_before_it_is_given_up() -> None:
    """A COMMIT that comes late overwrites the ABORT, but nobody looks at it any more."""
    inner = memory_store({})
    store = FaultyStore(inner)
    store.exclusive = False
    await abort_step(store, STEP, "stuck")
    puts = [key for operation, key in store.operations if operation == "put_new"]
    assert puts == [keys.retired(STEP), keys.commit(STEP)]
    mark = await get_record(inner, Kind.RETIRED, keys.retired(STEP), Retired)
    assert mark.why == "stuck"


async def test_a_decided_step_is_not_retired_by_giving_it_up() -> None:
    store = memory_store({})
    first = await abort_step(store, STEP, "first")
    store.exclusive = False
    assert await abort_step(store, STEP, "second") == first
    assert await store.list("retired/") == []


def test_numbers_of_attempts_grow_and_do_not_meet() -> None:
    assert next_attempt([], lot=5) == LOTS + 5
    assert next_attempt([LOTS + 5, 3], lot=4) == 2 * LOTS + 4
    assert next_attempt([2 * LOTS + 9_999], lot=1) == 3 * LOTS + 1


def test_only_rank_0_decides_where_the_store_does_not() -> None:
    assert may_decide(exclusive=True, ranks_here=(3,))
    assert may_decide(exclusive=None, ranks_here=(3,))
    assert not may_decide(exclusive=False, ranks_here=(3,))
    assert may_decide(exclusive=False, ranks_here=(3, 0))
    assert goes_first(7, 4, (0,), exclusive=False)
    assert not goes_first(7, 4, (3,), exclusive=False)
    assert goes_first(7, 4, (3,))
