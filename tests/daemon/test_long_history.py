"""What a collection asks of a store does not grow with the steps that a job has ever had."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.retain import collect
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, Verified
from ckptmgr.repository.commit import Decision, Retired, abort_step, put_record
from ckptmgr.repository.hold import put_hold
from ckptmgr.repository.pack import pack_header
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import FaultyStore
from ckptmgr.types import StepId
from small_step import (
    Objects,
    SavedStep,
    made_in_memory,
    memory_store,
    save_step,
    save_steps,
    shelf_of,
    smallest_state,
)

FIRST = 10_000
"""The first step that is really saved; the history lies below it."""


async def grow(store: Store, like: Decision, steps: int) -> None:
    """What retention leaves of so many steps of the attempt of `like`, before it."""
    for number in range(1, steps + 1):
        step, old = StepId(like.attempt, number), replace(like, step=number)
        verified = Verified(step.attempt, number, "00" * 32)
        await put_record(store, Kind.COMMIT, keys.commit(step), old)
        await put_record(store, Kind.TAGS, keys.tags(step), old)
        await put_record(store, Kind.VERIFIED, keys.verified(step), verified)
        await put_record(store, Kind.RETIRED, keys.retired(step), Retired(step.attempt, number))


class CountingStore(FaultyStore):
    """Notes how many keys each listing gave."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.listed = Counter[str]()

    async def list(self, prefix: str) -> list[str]:
        found = await super().list(prefix)
        self.listed[prefix] += len(found)
        return found


async def asked_for_commits(history: int) -> tuple[int, int, set[str]]:
    """Operations, keys listed and prefixes of what a job collects behind three commits, after a
    first collection that looked at everything.
    """
    inner = memory_store({})
    saved = await save_steps(inner, (FIRST, FIRST + 1), state=smallest_state)
    await grow(inner, saved[0].decision, history)
    store = CountingStore(inner)
    pool = BufferPool(BUDGET_BYTES)
    job = Job(store.url, store, Catalog(store), "job", Metrics(), pool)
    job.retain_soon(2)
    await job.collected()
    assert store.listed["commit/"] == history + 2, "nothing was remembered, and not all looked at"
    store.operations.clear()
    store.listed.clear()
    nonce = saved[0].decision.nonce
    for step in range(FIRST + 2, FIRST + 5):
        await save_step(inner, 1, nonce, step, smallest_state(step))
        job.retain_soon(2)
        await job.collected()
    stored = {keys.parse_step(key) for key in await inner.list("data/")}
    assert stored == {StepId(1, FIRST + 3), StepId(1, FIRST + 4)}, "it was not collected"
    lists = [key for operation, key in store.operations if operation == "list"]
    assert len([key for key in lists if key in ("data/", "man/")]) == 6, "one of each for each"
    await job.aclose()
    return len(store.operations), store.listed.total(), {key.partition("/")[0] for key in lists}


def test_what_is_asked_behind_a_commit_does_not_grow_with_history() -> None:
    short = asyncio.run(asked_for_commits(100))
    assert short == asyncio.run(asked_for_commits(2_000))
    operations, listed, prefixes = short
    assert operations <= 150
    assert listed <= 40
    assert prefixes <= {"data", "man", "holds", "attempts"}, "a listing of what stays for ever"


async def directories_after(root: Path, steps: int) -> int:
    """Directories of a local store from which so many steps were collected."""
    store = LocalStore(str(root))
    await save_steps(store, tuple(range(1, steps + 1)), state=smallest_state)
    await collect(Catalog(store), BufferPool(BUDGET_BYTES), 2)
    await store.aclose()
    return sum(path.is_dir() for path in root.rglob("*"))


def test_a_local_store_keeps_no_directories_of_steps_that_went(tmp_path: Path) -> None:
    few = asyncio.run(directories_after(tmp_path / "few", 4))
    assert asyncio.run(directories_after(tmp_path / "many", 12)) == few


# -- the same is done ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> tuple[list[SavedStep], Objects]:
    """Eight commits of one attempt, and three of the next."""

    async def make(store: Store) -> list[SavedStep]:
        first = await save_steps(store, tuple(range(10, 18)), state=smallest_state)
        return first + await save_steps(store, (18, 19, 20), state=smallest_state)

    return made_in_memory(make)


async def spoil(store: Store, step: StepId, how: str, nonce: str) -> None:
    """Bring a committed step into another state that stores are found in."""
    if how == "retired":
        await put_record(store, Kind.RETIRED, keys.retired(step), Retired(step.attempt, step.step))
    if how == "half deleted":
        await spoil(store, step, "retired", nonce)
        await delete_below(store, keys.packs(step))
    if how == "gone":
        await spoil(store, step, "half deleted", nonce)
        await delete_below(store, keys.manifests(step))
    if how == "retired by a mark that is damaged":
        await store.put_new(keys.retired(step), [memoryview(b"rubbish")])
    if how == "held":
        await put_hold(store, step, "person", "")
    if how == "unregistered":
        await store.delete(keys.commit(step))
    if how in ("undecided", "packs alone", "aborted"):
        await store.delete(keys.commit(step))
        await store.delete(keys.tags(step))
    if how == "packs alone":
        await delete_below(store, keys.manifests(step))
        key = keys.new_pack(step, 0)
        await store.put_new(key, [memoryview(pack_header(key, step, 0, nonce))])
    if how == "aborted":
        await abort_step(store, step, "test")
    if how == "damaged":
        await store.delete(keys.commit(step))
        await store.put_new(keys.commit(step), [memoryview(b"rubbish")])
    if how == "without manifests":
        await delete_below(store, keys.manifests(step))


async def delete_below(store: Store, prefix: str) -> None:
    for key in await store.list(prefix):
        await store.delete(key)


HOWS = (
    *("good", "good", "good", "retired", "half deleted", "gone", "held", "unregistered"),
    *("undecided", "packs alone", "aborted", "damaged", "without manifests"),
    "retired by a mark that is damaged",
)


@pytest.mark.parametrize("seed", range(60))
def test_looking_at_what_is_stored_does_what_looking_at_everything_does(
    made: tuple[list[SavedStep], Objects], seed: int
) -> None:
    saved, objects = made
    chance = random.Random(seed)
    hows = {one.id: chance.choice(HOWS) for one in saved}
    keep, protected = chance.randint(1, 4), frozenset(chance.sample(sorted(hows), 1))

    async def collected(*, whole: bool) -> tuple[list[Any], dict[str, bytes]]:
        store = memory_store(objects)
        for one in saved:
            await spoil(store, one.id, hows[one.id], one.decision.nonce)
        before = set(await store.list(""))
        options = {"whole": whole}
        done = await collect(Catalog(store), BufferPool(BUDGET_BYTES), keep, protected, **options)
        assert not [key for key in before - set(await store.list("")) if key[:3] in ("com", "ret")]
        shelf = shelf_of(store)
        # Of packs the step alone: the name of one that was made here is random.
        packed = dict.fromkeys((str(keys.parse_step(k)) for k in shelf if k[:5] == "data/"), b"")
        return done, packed | {k: bytes(blob) for k, blob in shelf.items() if k[:5] != "data/"}

    done, left = asyncio.run(collected(whole=True))
    again, left_again = asyncio.run(collected(whole=False))
    assert done == again, hows
    assert left == left_again, hows


def test_a_commit_of_which_nothing_is_left_is_given_up_by_the_first_collection(
    made: tuple[list[SavedStep], Objects],
) -> None:
    saved, objects = made

    async def main() -> None:
        store = memory_store(objects)
        for prefix in (keys.packs(saved[0].id), keys.manifests(saved[0].id)):
            await delete_below(store, prefix)
        pool = BufferPool(BUDGET_BYTES)
        await collect(Catalog(store), pool, 2, whole=False)
        assert keys.retired(saved[1].id) in shelf_of(store)
        assert keys.retired(saved[0].id) not in shelf_of(store), "it was looked at"
        await collect(Catalog(store), pool, 2)
        assert keys.retired(saved[0].id) in shelf_of(store)

    asyncio.run(main())
