"""Retries end, count, back off, and tell our own object from another's."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from ckptmgr.errors import (
    MediumError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)
from ckptmgr.store import retry
from ckptmgr.store.base import PutResult, Store, Wanted
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.retry import RetryingStore
from ckptmgr.testing import Fault, FaultyStore, StoreSuite, dead

LOST = StoreUnreachableError("connection lost")


def no_pause() -> float:
    return 0.0


def stores(*plan: Fault, **options: float) -> tuple[RetryingStore, FaultyStore]:
    faulty = FaultyStore(MemoryStore(secrets.token_hex(8)), plan)
    settings = {"timeout_seconds": 30.0, "deadline_seconds": 60.0, **options}
    return RetryingStore(faulty, jitter=no_pause, **settings), faulty


def views(*contents: bytes) -> list[memoryview]:
    return [memoryview(content) for content in contents]


class TestPromises(StoreSuite):
    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        self.name = secrets.token_hex(8)

    def make_store(self) -> Store:
        return RetryingStore(MemoryStore(self.name))


class EveryOther(Fault):
    """Strikes the first, the third, the fifth, ... operation."""

    def strikes(self, count: int) -> bool:
        return count % 2 == 1


class TestPromisesWhileEveryOtherAnswerIsLost(TestPromises):
    """The whole contract holds though half of all operations fail after they took effect."""

    def make_store(self) -> Store:
        lost = EveryOther(LOST, when="after")
        return RetryingStore(FaultyStore(MemoryStore(self.name), [lost]), jitter=no_pause)


async def test_a_lost_operation_is_done_again() -> None:
    for operation in ("put_new", "get", "list", "delete", "make_durable"):
        store, faulty = stores(Fault(LOST, operation=operation))
        assert await store.put_new("a/key", views(b"x")) is PutResult.OK
        assert bytes(await store.get("a/key")) == b"x"
        assert await store.list("a/") == ["a/key"]
        await store.make_durable("a/key")
        await store.delete("a/key")
        assert [name for name, _ in faulty.operations].count(operation) == 2


class Paged(MemoryStore):
    """Lists 60 pages, each after a while; from the page `stuck_at` on none comes."""

    stuck_at = 60

    async def list_pages(self, prefix: str) -> AsyncIterator[Sequence[str]]:
        for page in range(60):
            await asyncio.sleep(3600.0 if page == self.stuck_at else 0.01)
            yield [f"{prefix}{60 - page:02d}"]


async def test_a_listing_has_time_for_as_long_as_pages_come() -> None:
    store = RetryingStore(Paged("pages"), timeout_seconds=0.5, deadline_seconds=0.5)
    assert await store.list("a/") == [f"a/{page:02d}" for page in range(1, 61)]


async def test_a_listing_of_which_no_page_comes_any_more_is_given_up() -> None:
    paged = Paged("pages")
    paged.stuck_at = 20
    store = RetryingStore(paged, timeout_seconds=0.2, deadline_seconds=0.3)
    with pytest.raises(StoreUnreachableError, match="list got no answer in time"):
        await store.list("a/")


async def test_our_own_conflict_is_ok_and_made_durable() -> None:
    store, faulty = stores(Fault(LOST, operation="put_new", when="after"))
    assert await store.put_new("key", views(b"ours", b"", b"!")) is PutResult.OK
    assert faulty.operations[-1] == ("make_durable", "key")


async def test_our_own_empty_object_is_ok() -> None:
    store, _ = stores(Fault(LOST, operation="put_new", when="after"))
    assert await store.put_new("key", []) is PutResult.OK


@pytest.mark.parametrize("theirs", [b"", b"our", b"ours", b"ours!!", b"Ours!", b"ours?"])
async def test_the_object_of_another_stays_a_conflict(theirs: bytes) -> None:
    store, faulty = stores(Fault(LOST, operation="put_new"))
    await MemoryStore(store.url.removeprefix("memory://")).put_new("key", views(theirs))
    assert await store.put_new("key", views(b"ours", b"!")) is PutResult.CONFLICT
    assert "make_durable" not in [name for name, _ in faulty.operations]


async def test_a_first_conflict_is_believed_without_a_look() -> None:
    store, faulty = stores()
    await store.put_new("key", views(b"same"))
    assert await store.put_new("key", views(b"same")) is PutResult.CONFLICT
    assert [name for name, _ in faulty.operations] == ["put_new", "put_new"]


async def test_a_big_object_is_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "COMPARE_BYTES", 1000)
    store, faulty = stores(Fault(LOST, operation="put_new", when="after"))
    content = secrets.token_bytes(2500)
    assert await store.put_new("key", views(content, content)) is PutResult.OK
    assert [name for name, _ in faulty.operations].count("get") == 3 + 3 + 1


async def test_the_look_itself_is_retried() -> None:
    lost_put = Fault(LOST, operation="put_new", when="after")
    store, _ = stores(lost_put, Fault(LOST, operation="get"), Fault(LOST, operation="make_durable"))
    assert await store.put_new("key", views(b"ours")) is PutResult.OK


@pytest.mark.parametrize(
    "error",
    [
        StoreFullError("full"),
        StorePermissionError("refused"),
        StoreError("wrong for good"),
        ObjectNotFoundError("gone"),
    ],
)
async def test_what_does_not_pass_is_raised_at_once(error: StoreError) -> None:
    store, faulty = stores(*dead(error))
    with pytest.raises(type(error)) as caught:
        await store.get("key")
    assert caught.value is error
    assert len(faulty.operations) == 1


async def test_a_dead_store_is_given_up_at_the_deadline() -> None:
    store, faulty = stores(*dead(LOST), deadline_seconds=0.05)
    with pytest.raises(StoreUnreachableError) as caught:
        await store.list("a/")
    assert caught.value is LOST
    assert len(faulty.operations) > 1


async def test_a_silent_store_is_given_up_at_the_deadline() -> None:
    never = asyncio.Event()
    silent = Fault(gate=never, and_later=True)
    store, faulty = stores(silent, timeout_seconds=0.01, deadline_seconds=0.1)
    with pytest.raises(StoreUnreachableError, match="got no answer") as caught:
        await store.get("key")
    assert caught.value.subject == "key"
    assert len(faulty.operations) > 1


async def test_a_silent_try_is_followed_by_another() -> None:
    never = asyncio.Event()
    store, _ = stores(Fault(gate=never), timeout_seconds=0.01)
    assert await store.put_new("key", views(b"x")) is PutResult.OK


BROKEN = MediumError("input/output error")


async def broken(*plan: Fault, landmark: str = "mark", **options: Any) -> Any:
    """A store with a landmark and an object, and what stands before it."""
    inner = MemoryStore(secrets.token_hex(8))
    await inner.put_new("mark", views(b"landmark"))
    await inner.put_new("a/key", views(b"ours"))
    faulty = FaultyStore(inner, plan)
    settings = {"timeout_seconds": 30.0, "deadline_seconds": 60.0, **options}
    return RetryingStore(faulty, jitter=no_pause, landmark=landmark, **settings), faulty


async def test_an_object_that_stays_unreadable_is_told_from_a_dead_store() -> None:
    store, faulty = await broken(Fault(BROKEN, operation="get", key="a/", and_later=True))
    with pytest.raises(ObjectUnreadableError, match="input/output error") as caught:
        await store.get("a/key")
    assert caught.value.subject == "a/key"
    assert not isinstance(caught.value, StoreUnreachableError)
    tried = [key for _, key in faulty.operations]
    assert tried == ["a/key"] * retry.UNREADABLE_TRIES + ["mark"]


async def test_an_object_that_is_unreadable_for_a_moment_is_read() -> None:
    plan = [
        Fault(BROKEN, operation="get", key="a/", at=at) for at in range(1, retry.UNREADABLE_TRIES)
    ]
    store, _ = await broken(*plan)
    assert bytes(await store.get("a/key")) == b"ours"


async def test_where_nothing_can_be_read_the_store_is_unreachable() -> None:
    store, faulty = await broken(
        Fault(BROKEN, operation="get", and_later=True), deadline_seconds=0.05
    )
    with pytest.raises(StoreUnreachableError) as caught:
        await store.get("a/key")
    assert caught.value is BROKEN
    assert len(faulty.operations) > 2 * retry.UNREADABLE_TRIES


async def test_a_store_that_comes_back_while_it_is_asked_is_no_damage() -> None:
    """The landmark is readable again, and so is the object at the next try."""
    plan = [Fault(BROKEN, operation="get", at=at) for at in range(1, 2 * retry.UNREADABLE_TRIES)]
    store, _ = await broken(*plan)
    assert bytes(await store.get("a/key")) == b"ours"


@pytest.mark.parametrize("landmark", ["", "a/key", "not/there"])
async def test_without_another_object_to_read_nothing_is_called_unreadable(landmark: str) -> None:
    store, _ = await broken(
        Fault(BROKEN, operation="get", key="a/", and_later=True),
        landmark=landmark,
        deadline_seconds=0.05,
    )
    with pytest.raises(MediumError):
        await store.get("a/key")


async def test_an_unreadable_object_is_not_taken_for_that_of_another() -> None:
    """After an ambiguous put: whose it is can not be told, and that is not a conflict."""
    store, _ = await broken(
        Fault(LOST, operation="put_new", when="after"),
        Fault(BROKEN, operation="get", key="b/", and_later=True),
        deadline_seconds=0.05,
    )
    with pytest.raises(MediumError):
        await store.put_new("b/key", views(b"ours"))


async def test_cancelling_is_not_a_failure_to_retry() -> None:
    never = asyncio.Event()
    store, faulty = stores(Fault(gate=never, and_later=True))
    call = asyncio.ensure_future(store.get("key"))
    await asyncio.wait({call}, timeout=0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert len(faulty.operations) == 1


async def test_every_failed_try_is_told() -> None:
    told: list[tuple[str, Exception]] = []
    full = StoreFullError("full")
    faulty = FaultyStore(
        MemoryStore(secrets.token_hex(8)), [Fault(LOST), Fault(LOST, at=2), Fault(full, at=3)]
    )
    store = RetryingStore(
        faulty, jitter=no_pause, on_failure=lambda name, error: told.append((name, error))
    )
    with pytest.raises(StoreFullError):
        await store.put_new("key", [])
    assert told == [("put_new", LOST), ("put_new", LOST), ("put_new", full)]


async def test_a_timeout_is_told_with_what_it_was_and_after_how_long() -> None:
    told: list[tuple[str, str]] = []
    silent = Fault(gate=asyncio.Event(), and_later=True)
    store = RetryingStore(
        FaultyStore(MemoryStore(secrets.token_hex(8)), [silent]),
        timeout_seconds=0.1,
        deadline_seconds=0.1,
        on_failure=lambda name, error: told.append((name, f"{type(error).__name__}: {error}")),
    )
    with pytest.raises(StoreUnreachableError):
        await store.list("a/")
    with pytest.raises(StoreUnreachableError):
        await store.get_many([Wanted("b", 0, memoryview(bytearray(1)))])
    named = [(name, re.sub(r" \d+\.\d s$", " N s", said)) for name, said in told]
    assert named == [
        ("list", "TimeoutError: list a/ got no answer in N s"),
        ("get_many", "TimeoutError: get_many of 1 parts got no answer in N s"),
        ("get", "TimeoutError: get b got no answer in N s"),
    ]


async def test_pauses_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(retry.asyncio, "sleep", record)
    inner = MemoryStore(secrets.token_hex(8))
    lost = 0

    async def lose(_prefix: str) -> list[str]:
        nonlocal lost
        lost += 1
        if lost < 12:
            raise LOST
        return []

    monkeypatch.setattr(inner, "list", lose)
    await RetryingStore(inner, jitter=lambda: 0.5, deadline_seconds=1e6).list("")
    assert pauses[:3] == [0.05, 0.1, 0.2]
    assert pauses[-1] == retry.BACKOFF_SECONDS_MAX / 2
    assert pauses == sorted(pauses)


async def test_a_batch_that_fails_is_read_one_by_one() -> None:
    outer, inner = stores(Fault(LOST, at=2, operation="get"))
    for name in "abc":
        await inner.put_new(name, views(name.encode() * 4))
    room = memoryview(bytearray(12))
    wanted = [Wanted(name, 0, room[4 * n : 4 * n + 4]) for n, name in enumerate("abc")]
    await outer.get_many(wanted)
    assert bytes(room) == b"aaaabbbbcccc"
    with pytest.raises(ObjectNotFoundError, match="d"):
        await outer.get_many([*wanted, Wanted("d", 0, room[:1])])


async def test_bytes_of_every_try_are_paced_and_the_wait_is_not_the_stores() -> None:
    told: list[int] = []
    outer, inner = stores(Fault(LOST), deadline_seconds=0.5)

    async def pace(nbytes: int) -> None:
        if nbytes:
            told.append(nbytes)
            await asyncio.sleep(0.6)  # longer than the deadline

    outer._pace = pace
    assert await outer.put_new("key", views(b"12345", b"678")) is PutResult.OK
    assert told == [8, 8], "the second try sends them again"
    told.clear()
    assert bytes(await outer.get("key")) == b"12345678"
    await outer.get("key", 2, 3)
    await outer.get("key", 1, into=memoryview(bytearray(4)))
    await outer.get_many([Wanted("key", 0, memoryview(bytearray(n))) for n in (1, 6)])
    assert told == [8, 3, 4, 7]
    await outer.list("")
    await outer.make_durable("key")
    await outer.delete("key")
    assert told == [8, 3, 4, 7]
    assert inner.operations


def test_it_declares_what_its_inner_store_does() -> None:
    inner = MemoryStore("x")
    inner.durable_on_return, inner.visibility_lag_seconds, inner.exclusive = False, 6.0, None
    outer = RetryingStore(inner)
    assert (outer.durable_on_return, outer.visibility_lag_seconds) == (False, 6.0)
    assert outer.exclusive is None


def test_shared_memory_is_told_to_the_inner_store() -> None:
    """Through both wrappers, and back: a store that looks at addresses must see each of them."""
    told: list[tuple[object, ...]] = []

    class Sharing(MemoryStore):
        def share(self, memory: memoryview, path: str) -> None:
            told.append((memory, path))

        def unshare(self, memory: memoryview) -> None:
            told.append((memory,))

    outer = RetryingStore(FaultyStore(Sharing(secrets.token_hex(8))))
    memory = memoryview(b"x")
    outer.share(memory, "/dev/shm/x")
    outer.unshare(memory)
    assert told == [(memory, "/dev/shm/x"), (memory,)]
