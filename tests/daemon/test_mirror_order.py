"""In which order a mirror is written: whatever ends it, what is there makes sense, and the next
time the rest comes.
"""

from __future__ import annotations

import asyncio
import secrets

import pytest

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.mirror import Mirror
from ckptmgr.daemon.retain import retire
from ckptmgr.errors import StoreUnreachableError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, is_retired
from ckptmgr.store.base import Buffers, PutResult, Store
from ckptmgr.store.memory import MemoryStore
from small_step import (
    Objects,
    SavedStep,
    made_in_memory,
    memory_store,
    objects_of,
    save_every_kind,
    shelf_of,
    smallest_state,
)

COPIED = ("format", "attempts/", "commit/", "retired/", "tags/", "man/", "data/")


class Choosy(MemoryStore):
    """A store that does not take one key."""

    def __init__(self, refused: str) -> None:
        super().__init__(secrets.token_hex(8))
        self.refused = refused

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        await asyncio.sleep(0)
        if key == self.refused:
            raise StoreUnreachableError("is not taken", subject=key)
        return await super().put_new(key, buffers)


class BadLine(MemoryStore):
    """Of the `at`-th answer that holds bytes of a key, one byte is another."""

    def __init__(self, objects: Objects, key: str, at: int) -> None:
        super().__init__(secrets.token_hex(8))
        shelf_of(self).update({key: bytearray(blob) for key, blob in objects.items()})
        self.key, self.left = key, at

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        found = await super().get(key, offset, length, into)
        if key == self.key and len(found):
            self.left -= 1
            if not self.left:
                found = found if into is not None else memoryview(bytearray(found))
                found[len(found) // 2] ^= 1
        return found


@pytest.fixture(scope="module")
def made() -> tuple[list[SavedStep], Objects]:
    return made_in_memory(lambda store: save_every_kind(store, smallest_state))


async def follow(first: Store, copy: Store) -> str:
    """Let a new daemon's mirror follow once; what it failed over."""
    pool = BufferPool(BUDGET_BYTES)
    mirror = Mirror(Job(first.url, first, Catalog(first), "test", Metrics(), pool), copy, pool)
    following = asyncio.create_task(mirror.run())
    while not (mirror.followed or mirror.state()["last_failure"]):
        await asyncio.sleep(0.001)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return str(mirror.state()["last_failure"])


async def test_whatever_was_not_taken_what_is_there_makes_sense_and_the_rest_comes(
    made: tuple[list[SavedStep], Objects],
) -> None:
    first, whole = memory_store(made[1]), Choosy("")
    assert await follow(first, whole) == ""
    copied = await objects_of(whole)
    assert {key.partition("/")[0] for key in copied} == {name.strip("/") for name in COPIED}
    for refused in copied:
        copy = Choosy(refused)
        assert refused in await follow(first, copy)
        there = set(await copy.list(""))
        for key in there:
            kind, step = key.partition("/")[0], keys.parse_step(key)
            if key.endswith("/active"):
                assert key.replace("/active", "/claim") in there, f"{refused} was refused"
            if kind == "tags" and step is not None:
                assert keys.commit(step) in there, f"{refused} was refused"
        copy.refused = ""
        assert await follow(first, copy) == ""
        assert await objects_of(copy) == copied, f"{refused} was refused"


@pytest.mark.parametrize("cut", ["man/", "commit/"])
async def test_what_a_copy_that_was_cut_short_has_left_goes_when_its_step_does(
    made: tuple[list[SavedStep], Objects], cut: str
) -> None:
    """Also when it is given up in the first store before the copy was begun again."""
    first = memory_store(made[1])
    step = made[0][-1].id
    copied = [key for key in made[1] if keys.parse_step(key) == step]
    copy = Choosy(max(key for key in copied if key.startswith(cut)))
    assert await follow(first, copy)
    assert [key for key in await copy.list("") if key in copied], "something was copied"
    assert await retire(first, step, "by the test's will")
    copy.refused = ""
    assert await follow(first, copy) == ""
    assert not await copy.list(keys.packs(step))
    assert not await copy.list(keys.manifests(step))
    assert await is_retired(copy, step)


@pytest.mark.parametrize("at", range(1, 6))
async def test_a_register_that_came_damaged_once_is_copied(
    made: tuple[list[SavedStep], Objects], at: int
) -> None:
    key = keys.commit(made[0][-1].id)
    copy = memory_store({})
    await follow(BadLine(made[1], key, at), copy)
    assert await copy.get(key) == made[1][key]
