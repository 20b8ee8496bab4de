"""The suite finds every kind of broken store, and the faulty store fails exactly as planned."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path

import pytest

from ckptmgr.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
)
from ckptmgr.store.base import Buffers, PutResult, Store, check_key
from ckptmgr.store.memory import MemoryStore
from ckptmgr.testing import Fault, FaultyStore, StoreSuite, dead, refuse_reads

# ---- the suite has teeth -------------------------------------------------------


class Overwrites(MemoryStore):
    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        self._shelf[check_key(key)] = bytearray().join(buffers)
        return PutResult.OK


class LooksThenPuts(MemoryStore):
    """Exclusive only while nobody else puts."""

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        if check_key(key) in self._shelf:
            return PutResult.CONFLICT
        await asyncio.sleep(0)
        self._shelf[key] = bytearray().join(buffers)
        return PutResult.OK


class WritesInPlace(MemoryStore):
    """Whoever looks at the wrong moment sees a part."""

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        blob = bytearray()
        if self._shelf.setdefault(check_key(key), blob) is not blob:
            return PutResult.CONFLICT
        for buffer in buffers:
            for start in range(0, len(buffer), 1 << 20):
                await asyncio.sleep(0)
                blob += buffer[start : start + (1 << 20)]
        return PutResult.OK


class ReadsShort(MemoryStore):
    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        blob = self._object(key)
        end = None if length is None else offset + length
        found = memoryview(bytes(blob[offset:end]))
        if into is None:
            return found
        into[: len(found)] = found[: len(into)]
        return into


class FirstBufferOnly(MemoryStore):
    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        return await super().put_new(key, buffers[:1])


class ListsUnsorted(MemoryStore):
    async def list(self, prefix: str) -> list[str]:
        return (await super().list(prefix))[::-1]


class ListsLookalikes(MemoryStore):
    async def list(self, prefix: str) -> list[str]:
        return await super().list(prefix and prefix[: prefix[:-1].rfind("/") + 1])


class TakesAnyKey(MemoryStore):
    async def delete(self, key: str) -> None:
        self._shelf.pop(key, None)


class DeletesOnce(MemoryStore):
    async def delete(self, key: str) -> None:
        if self._shelf.pop(check_key(key), None) is None:
            raise ObjectNotFoundError("does not exist", subject=key)


class NeverNotFound(MemoryStore):
    async def make_durable(self, key: str) -> None:
        check_key(key)


class KeepsItsBuffers(MemoryStore):
    """Puts in the background what its caller may have changed since."""

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        check_key(key)
        return await asyncio.shield(asyncio.ensure_future(self._later(key, buffers)))

    async def _later(self, key: str, buffers: Buffers) -> PutResult:
        await asyncio.sleep(0.02)
        return await super().put_new(key, buffers)


class WritesLate(MemoryStore):
    """Fills `into` though nobody waits any more."""

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        read = asyncio.ensure_future(self._later(key, offset, length, into))
        return await asyncio.shield(read)

    async def _later(
        self, key: str, offset: int, length: int | None, into: memoryview | None
    ) -> memoryview:
        await asyncio.sleep(0.02)
        return await super().get(key, offset, length, into)


TESTS = [name for name in dir(StoreSuite) if name.startswith("test_") and "processes" not in name]


def faults_found(kind: type[MemoryStore], *tests: str) -> set[str]:
    """Those of `tests` of the suite that a store does not pass."""

    class Suite(StoreSuite):
        big_bytes = 8 << 20
        name = secrets.token_hex(8)

        def make_store(self) -> Store:
            return kind(self.name)

    found = set()
    for name in tests:
        try:
            getattr(Suite(), name)()
        except Exception:
            found.add(name)
    return found


def test_a_sound_store_passes() -> None:
    assert faults_found(MemoryStore, *TESTS) == set()


@pytest.mark.parametrize(
    ("kind", "finds"),
    [
        (Overwrites, "test_nothing_is_overwritten"),
        (LooksThenPuts, "test_one_of_many_tasks_wins"),
        (WritesInPlace, "test_no_reader_sees_a_part"),
        (WritesInPlace, "test_cancelled_put_leaves_all_or_nothing"),
        (ReadsShort, "test_reads_past_the_end_are_refused"),
        (FirstBufferOnly, "test_what_was_put_is_got"),
        (ListsUnsorted, "test_list"),
        (ListsLookalikes, "test_list"),
        (TakesAnyKey, "test_bad_keys_are_refused"),
        (DeletesOnce, "test_delete"),
        (NeverNotFound, "test_what_does_not_exist"),
        (KeepsItsBuffers, "test_cancelled_put_leaves_all_or_nothing"),
        (WritesLate, "test_cancelled_get_lets_go_of_its_buffer"),
    ],
)
def test_the_suite_finds_a_broken_store(kind: type[MemoryStore], finds: str) -> None:
    assert faults_found(kind, finds) == {finds}


def test_the_race_of_processes_finds_a_store_that_overwrites(tmp_path: Path) -> None:
    """`memory://` in several processes is a store in which everybody wins."""

    class Suite(StoreSuite):
        shared_url = f"memory://{secrets.token_hex(8)}"

        def make_store(self) -> Store:
            return MemoryStore(self.shared_url.removeprefix("memory://"))

    with pytest.raises(AssertionError, match="exactly one winner"):
        Suite().test_one_of_many_processes_wins()


def test_the_suite_is_found_by_a_bare_pytest(tmp_path: Path) -> None:
    """A third party needs six lines, and no plugin for asyncio."""
    (tmp_path / "test_mine.py").write_text(
        "from ckptmgr.store.memory import MemoryStore\n"
        "from ckptmgr.testing import StoreSuite\n"
        "class TestMine(StoreSuite):\n"
        "    big_bytes = 1 << 20\n"
        "    def make_store(self):\n"
        "        return MemoryStore('mine')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "-p", "no:cacheprovider"]
    ran = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    tests = sum(name.startswith("test_") for name in dir(StoreSuite))
    assert f"{tests - 1} passed, 1 skipped" in ran.stdout, ran.stdout


# ---- the faulty store ----------------------------------------------------------

LOST = StoreUnreachableError("lost")


def faulty(*plan: Fault) -> FaultyStore:
    return FaultyStore(MemoryStore(secrets.token_hex(8)), plan)


async def outcomes(*calls: Awaitable[object]) -> list[object]:
    """What each call returned, or its error; one after the other."""
    found: list[object] = []
    for call in calls:
        try:
            found.append(await call)
        except StoreError as error:
            found.append(error)
    return found


async def test_the_nth_operation_fails_counted_over_all_methods() -> None:
    store = faulty(Fault(LOST, at=3))
    found = await outcomes(
        store.put_new("a", []), store.list(""), store.delete("a"), store.put_new("a", [])
    )
    assert found == [PutResult.OK, ["a"], LOST, PutResult.CONFLICT]


async def test_the_nth_operation_of_one_method_fails() -> None:
    store = faulty(Fault(LOST, at=2, operation="put_new"))
    found = await outcomes(*(store.put_new(key, []) for key in "abc"), store.list(""))
    assert found == [PutResult.OK, LOST, PutResult.OK, ["a", "c"]]


async def test_keys_choose_what_fails() -> None:
    store = faulty(Fault(LOST, key="commit/", and_later=True))
    found = await outcomes(
        store.put_new("man/1", []), store.put_new("commit/1", []), store.list("commit/")
    )
    assert found == [PutResult.OK, LOST, LOST]


async def test_an_ambiguous_answer_takes_effect_first() -> None:
    store = faulty(Fault(LOST, when="after"), Fault(LOST, operation="delete", when="after"))
    found = await outcomes(
        *(store.put_new("a", []), store.put_new("a", [])),
        *(store.delete("a"), store.list("")),
    )
    assert found == [LOST, PutResult.CONFLICT, LOST, []]


async def test_all_later_operations_fail_until_the_store_is_healed() -> None:
    full = StoreFullError("full")
    store = faulty(Fault(full, at=2, operation="put_new", and_later=True))
    assert await outcomes(*(store.put_new(key, []) for key in "abc")) == [PutResult.OK, full, full]
    store.plan(())
    assert await store.put_new("b", []) is PutResult.OK


async def test_reads_are_refused_and_writes_are_not() -> None:
    store = faulty(*refuse_reads())
    assert await store.put_new("a", []) is PutResult.OK
    for error in await outcomes(store.get("a"), store.list("")):
        assert isinstance(error, StoreUnreachableError)


async def test_a_dead_store_does_nothing() -> None:
    store = faulty(*dead(LOST))
    calls = (store.put_new("a", []), store.get("a"), store.list(""), store.delete("a"))
    assert await outcomes(*calls, store.make_durable("a")) == [LOST] * 5
    store.plan(())
    assert await store.list("") == []


async def test_a_gate_holds_an_operation() -> None:
    gate = asyncio.Event()
    store = faulty(Fault(operation="put_new", gate=gate, delay_seconds=0.001))
    put = asyncio.ensure_future(store.put_new("a", []))
    done, _ = await asyncio.wait({put}, timeout=0.01)
    assert not done
    assert await store.list("") == []
    gate.set()
    assert await put is PutResult.OK


async def test_every_operation_is_recorded_in_the_order_of_its_start() -> None:
    store = faulty(Fault(LOST, at=2))
    await outcomes(store.put_new("a", []), store.get("a"), store.list("x/"), store.delete("a"))
    await outcomes(store.make_durable("a"))
    assert store.operations == [
        *(("put_new", "a"), ("get", "a"), ("list", "x/"), ("delete", "a")),
        ("make_durable", "a"),
    ]


def test_it_declares_what_its_inner_store_does() -> None:
    inner = MemoryStore("x")
    inner.durable_on_return, inner.visibility_lag_seconds = False, 6.0
    outer = FaultyStore(inner)
    assert (outer.durable_on_return, outer.visibility_lag_seconds) == (False, 6.0)
    assert outer.url == "memory://x"
