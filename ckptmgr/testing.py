"""For everyone who writes a store or wants to break one: `StoreSuite` is the contract of
`ckptmgr.store.base` as tests, and `FaultyStore` wraps any store and fails as planned.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import multiprocessing
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from unittest import SkipTest

from ckptmgr.errors import ObjectNotFoundError, StoreError, StoreUnreachableError, UsageError
from ckptmgr.store.base import PutResult, Store, Wanted
from ckptmgr.store.faulty import Fault, FaultyStore, dead, refuse_reads
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore

MIB = 1 << 20

__all__ = ["Fault", "FaultyStore", "StoreSuite", "dead", "refuse_reads"]

Test = Callable[["StoreSuite", Store], Awaitable[None]]


def _with_store(test: Test) -> Callable[[StoreSuite], None]:
    """Make a plain test method of a coroutine: a new store, an event loop of its own."""

    def run(suite: StoreSuite) -> None:
        async def main() -> None:
            store = suite.make_store()
            try:
                await test(suite, store)
                await suite._clean(store)
            finally:
                await store.aclose()

        asyncio.run(main())

    run.__doc__ = test.__doc__
    return run


class StoreSuite:
    """Every promise of `Store` as a test. Subclass it as `TestMyStore` and give `make_store`.

    Tests are plain methods that run their own event loop: pytest finds them without a plugin, as
    does any other runner. Each test uses keys of its own, so the place may be shared and need not
    be empty. `make_store` returns a new handle each time; within one test all handles must show the
    same objects. Set `shared_url` (an attribute or a property) where other processes can open the
    same objects by `open_store`; without it races between processes are not tested.
    """

    shared_url: str | None = None

    big_bytes: int = 65 * MIB
    """Size of the big objects, a multiple of 4096: longer than a pack."""

    race_processes: int = 16
    race_keys: int = 200
    """So many processes race for so many keys; fewer where each put takes long."""

    def make_store(self) -> Store:
        """A new handle on the place under test."""
        raise NotImplementedError

    def _key(self) -> str:
        """A key that no other test uses, of two segments."""
        top = f"suite-{secrets.token_hex(8)}"
        self._tops = [*getattr(self, "_tops", []), top]
        return f"{top}/x"

    async def _clean(self, store: Store) -> None:
        """Delete what a test that passed has put."""
        for top in getattr(self, "_tops", []):
            for key in await store.list(f"{top}/"):
                await store.delete(key)
            await store.prune(f"{top}/")

    @_with_store
    async def test_what_was_put_is_got(self, store: Store) -> None:
        """Any bytes, in any number of buffers, come back."""
        key = self._key()
        for size in (0, 1, 13, 4095, 4096, 4097, 3 * MIB + 5):
            content = os.urandom(size)
            views = [memoryview(content)[:5], memoryview(b""), memoryview(content)[5:]]
            assert await store.put_new(f"{key}/{size}", views) is PutResult.OK
            assert bytes(await store.get(f"{key}/{size}")) == content

    @_with_store
    async def test_no_buffers_make_an_empty_object(self, store: Store) -> None:
        """An object of no bytes is an object."""
        key = self._key()
        assert await store.put_new(key, []) is PutResult.OK
        assert bytes(await store.get(key)) == b""
        assert await store.list(f"{key.partition('/')[0]}/") == [key]
        assert await store.put_new(key, [memoryview(b"x")]) is PutResult.CONFLICT

    @_with_store
    async def test_more_buffers_than_a_system_call_takes(self, store: Store) -> None:
        """5,000 buffers of odd sizes."""
        key, content = self._key(), os.urandom(20_000)
        views = [memoryview(content)[start : start + 4] for start in range(0, len(content), 4)]
        assert await store.put_new(key, views) is PutResult.OK
        assert bytes(await store.get(key)) == content

    @_with_store
    async def test_big_page_aligned_object(self, store: Store) -> None:
        """Pages of shared memory, as the daemon writes packs."""
        with mmap.mmap(-1, self.big_bytes) as pages:  # closing it fails if a view is kept
            pages[:] = _noise(self.big_bytes)
            whole = memoryview(pages)
            middle = self.big_bytes // 8192 * 4096
            await self._put_and_compare(store, [whole[:middle], whole[middle:]])
            whole.release()

    @_with_store
    async def test_big_odd_object(self, store: Store) -> None:
        """A size and an address that are no multiples of anything."""
        content = memoryview(_noise(self.big_bytes))[1:-2]
        await self._put_and_compare(store, [content[:777], content[777:]])

    async def _put_and_compare(self, store: Store, buffers: list[memoryview]) -> None:
        key, expected = self._key(), b"".join(buffers)
        for buffer in buffers:
            assert buffer.contiguous
        assert await store.put_new(key, buffers) is PutResult.OK
        into = memoryview(bytearray(len(expected)))
        assert await store.get(key, 0, into=into) is into
        assert bytes(into) == expected, "the object is not what was put"
        await store.delete(key)
        for buffer in buffers:
            buffer.release()

    @_with_store
    async def test_nothing_is_overwritten(self, store: Store) -> None:
        """A second put is a CONFLICT and changes nothing, equal bytes or not."""
        key = self._key()
        assert await store.put_new(key, [memoryview(b"first")]) is PutResult.OK
        assert await store.put_new(key, [memoryview(b"second")]) is PutResult.CONFLICT
        assert await store.put_new(key, [memoryview(b"first")]) is PutResult.CONFLICT
        assert bytes(await store.get(key)) == b"first"

    @_with_store
    async def test_ranges(self, store: Store) -> None:
        """Offset and length, up to and at the end."""
        key, content = self._key(), os.urandom(10_000)
        await store.put_new(key, [memoryview(content)])
        for offset, length in ((0, 0), (0, 1), (4095, 2), (9_999, 1), (10_000, 0), (17, 9_983)):
            got = await store.get(key, offset, length)
            assert bytes(got) == content[offset : offset + length]
        assert bytes(await store.get(key, 9_000)) == content[9_000:]
        assert bytes(await store.get(key, 10_000)) == b""

    @_with_store
    async def test_into(self, store: Store) -> None:
        """`into` is filled exactly, `length` ignored, and what lies around it untouched."""
        key, content = self._key(), os.urandom(10_000)
        await store.put_new(key, [memoryview(content)])
        room = bytearray(b"." * 6_000)
        into = memoryview(room)[500:5_500]
        assert await store.get(key, 3_000, 1, into) is into
        assert room == b"." * 500 + content[3_000:8_000] + b"." * 500
        nothing = memoryview(bytearray())
        assert await store.get(key, 10_000, into=nothing) is nothing

    @_with_store
    async def test_get_many(self, store: Store) -> None:
        """Many ranges of several objects at once, each to its place; one that is not there fails
        the whole, and leaves alone what nobody asked for.
        """
        top, content = self._key(), os.urandom(300_000)
        for number in range(3):
            await store.put_new(f"{top}/{number}", [memoryview(content)[number:]])
        room = memoryview(bytearray(b"." * 64_100))
        wanted = [
            Wanted(f"{top}/{n % 3}", 1_000 * n, room[1_000 * n : 1_000 * n + 999])
            for n in range(64)
        ]
        await store.get_many([*wanted, Wanted(f"{top}/0", 299_999, room[64_000:64_001])])
        for n, one in enumerate(wanted):
            start = one.offset + n % 3
            assert bytes(one.into) == content[start : start + 999]
            assert room[1_000 * n + 999] == ord(".")
        assert bytes(room[64_000:]) == content[299_999:300_000] + b"." * 99
        await store.get_many([])
        missing = Wanted(f"{top}/9", 0, room[:5])
        assert isinstance(await _error_of(store.get_many([missing])), ObjectNotFoundError)
        beyond = Wanted(f"{top}/2", 299_990, room[:9])
        error = await _error_of(store.get_many([wanted[0], beyond]))
        assert isinstance(error, StoreError)
        assert "is too short" in str(error)

    @_with_store
    async def test_reads_past_the_end_are_refused(self, store: Store) -> None:
        """Never fewer bytes than were asked for."""
        key = self._key()
        await store.put_new(key, [memoryview(b"0123456789")])
        for offset, length, into in (
            (0, 11, None),
            (10, 1, None),
            (11, None, None),
            (11, 0, None),
            (1 << 40, None, None),
            (0, 1 << 50, None),
            (3, None, memoryview(bytearray(8))),
        ):
            error = await _error_of(store.get(key, offset, length, into))
            assert isinstance(error, StoreError), f"{offset}, {length}: {error!r}"
            assert not isinstance(error, (StoreUnreachableError, ObjectNotFoundError))
            assert "is too short" in str(error)

    @_with_store
    async def test_what_does_not_exist(self, store: Store) -> None:
        """Typed errors for get and make_durable; nothing for list and delete."""
        key = self._key()
        for call in (store.get(key), store.get(key, 5, 5), store.make_durable(key)):
            assert isinstance(await _error_of(call), ObjectNotFoundError)
        await store.delete(key)
        assert await store.list(key + "/") == []

    @_with_store
    async def test_delete(self, store: Store) -> None:
        """Gone for get and list, twice is once, and the key is free again."""
        key = self._key()
        await store.put_new(key, [memoryview(b"old")])
        await store.delete(key)
        await store.delete(key)
        assert isinstance(await _error_of(store.get(key)), ObjectNotFoundError)
        assert await store.list(key.partition("/")[0] + "/") == []
        assert await store.put_new(key, [memoryview(b"new")]) is PutResult.OK
        assert bytes(await store.get(key)) == b"new"

    @_with_store
    async def test_prune_takes_no_object(self, store: Store) -> None:
        """What is there stays, also below the prefix, and what is put there later is found."""
        key = self._key()
        await store.put_new(f"{key}/a/b", [])
        await store.put_new(f"{key}/c", [])
        await store.delete(f"{key}/a/b")
        await store.prune(f"{key}/")
        assert await store.list(f"{key}/") == [f"{key}/c"]
        assert await store.put_new(f"{key}/a/b", []) is PutResult.OK
        assert await store.list(f"{key}/") == [f"{key}/a/b", f"{key}/c"]

    @_with_store
    async def test_list(self, store: Store) -> None:
        """Every key below the prefix, sorted as strings, and no key that only looks like it."""
        top = self._key()
        names = ["a/b/c", "a/b-c", "a/b.c", "a/bc", "a0/x", "a/B", "z", "a/10", "a/9", "tmp/x"]
        for name in names:
            await store.put_new(f"{top}/{name}", [])
        keys = sorted(f"{top}/{name}" for name in names)
        assert await store.list(f"{top}/") == keys
        assert set(keys) <= set(await store.list(""))
        below = [key for key in keys if key.startswith(f"{top}/a/")]
        assert await store.list(f"{top}/a/") == below
        assert await store.list(f"{top}/a/b/") == [f"{top}/a/b/c"]
        assert await store.list(f"{top}/z/") == []

    @_with_store
    async def test_another_handle_sees_it(self, store: Store) -> None:
        """What one handle put, another gets, lists, makes durable and deletes."""
        key, other = self._key(), self.make_store()
        try:
            await store.put_new(key, [memoryview(b"shared")])
            await asyncio.sleep(store.visibility_lag_seconds)
            assert bytes(await other.get(key)) == b"shared"
            assert key in await other.list(key.partition("/")[0] + "/")
            await other.make_durable(key)
            assert await other.put_new(key, []) is PutResult.CONFLICT
            await other.delete(key)
        finally:
            await other.aclose()

    @_with_store
    async def test_bad_keys_are_refused(self, store: Store) -> None:
        """UsageError, before anything is touched."""
        bad = ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", ".a", "a/.b", "-a", "a b", "a\nb"]
        bad += ["a\0", "\u00e4", "a\\b", "a:b", "a" * 129, "/".join(["a"] * 300)]
        for key in bad:
            calls = (
                store.put_new(key, []),
                store.get(key),
                store.delete(key),
                store.make_durable(key),
            )
            for error in [await _error_of(call) for call in calls]:
                assert isinstance(error, UsageError), repr(key)
        for prefix in ("a", "/", "../", "a//", ".tmp/"):
            assert isinstance(await _error_of(store.list(prefix)), UsageError), repr(prefix)
        assert isinstance(await _error_of(store.get(self._key(), -1)), (UsageError, StoreError))

    @_with_store
    async def test_one_of_many_tasks_wins(self, store: Store) -> None:
        """16 tasks put each of 10 keys: one OK each, and its bytes are there."""
        top = self._key()
        for number in range(10):
            key = f"{top}/{number}"
            contents = [_content(writer, 5_000) for writer in range(16)]
            results = await asyncio.gather(
                *(store.put_new(key, [memoryview(content)]) for content in contents)
            )
            assert results.count(PutResult.OK) == 1
            assert bytes(await store.get(key)) == contents[results.index(PutResult.OK)]

    @_with_store
    async def test_one_of_many_threads_wins(self, store: Store) -> None:
        """8 threads, each with a handle and an event loop of its own, race for 25 keys."""
        top, start = self._key(), threading.Barrier(8)
        won: list[list[int]] = [[] for _ in range(8)]

        def race(writer: int) -> None:
            mine = self.make_store()
            start.wait(timeout=60)
            won[writer] = asyncio.run(_race(mine, top, writer, 25))

        def all_at_once() -> None:
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(race, range(8)))

        await asyncio.to_thread(all_at_once)
        await _check_race(store, top, won, 25)

    @_with_store
    async def test_one_of_many_processes_wins(self, store: Store) -> None:
        """`race_processes` race for `race_keys`, where other processes can open the store."""
        if self.shared_url is None:
            raise SkipTest("other processes can not open this store: shared_url is not set")
        top = self._key()
        writers, keys = self.race_processes, self.race_keys
        won = await asyncio.to_thread(_race_of_processes, self.shared_url, top, writers, keys)
        await _check_race(store, top, won, keys)

    @_with_store
    async def test_no_reader_sees_a_part(self, store: Store) -> None:
        """While a big object is put, it is absent or whole, for get and for list."""
        top, content = self._key(), _noise(self.big_bytes)
        put = asyncio.ensure_future(store.put_new(f"{top}/big", [memoryview(content)]))
        seen: set[int | None] = set()
        while not put.done():
            await asyncio.sleep(0)  # a store that never waits would starve the put
            seen.add(await _size_of(store, f"{top}/big"))
            if await store.list(f"{top}/"):
                seen.add(await _size_of(store, f"{top}/big"))
        assert await put is PutResult.OK
        assert seen <= {None, len(content)}, "a reader saw a part of an object"
        assert await store.list(f"{top}/") == [f"{top}/big"]

    @_with_store
    async def test_cancelled_put_leaves_all_or_nothing(self, store: Store) -> None:
        """Whenever it is cancelled, and whatever its buffers are used for afterwards."""
        top = self._key()
        for turn in range(12):
            buffer = bytearray(_content(turn, 8 * MIB))
            original = bytes(buffer)
            put = asyncio.ensure_future(store.put_new(f"{top}/{turn}", [memoryview(buffer)]))
            await asyncio.wait({put}, timeout=0.001 * turn)
            put.cancel()
            with suppress(asyncio.CancelledError):
                await put
            buffer[:] = bytes(len(buffer))
            again = await store.put_new(f"{top}/{turn}", [memoryview(original)])
            assert again in (PutResult.OK, PutResult.CONFLICT)
            assert bytes(await store.get(f"{top}/{turn}")) == original, "a torn object"

    @_with_store
    async def test_cancelled_get_lets_go_of_its_buffer(self, store: Store) -> None:
        """Once the call has ended, `into` is its owner's."""
        key, content = self._key(), _noise(8 * MIB)
        await store.put_new(key, [memoryview(content)])
        for turn in range(12):
            into = bytearray(len(content))
            get = asyncio.ensure_future(store.get(key, into=memoryview(into)))
            await asyncio.wait({get}, timeout=0.0005 * turn)
            get.cancel()
            with suppress(asyncio.CancelledError):
                await get
            into[:] = bytes(len(into))
            assert bytes(await store.get(key)) == content
            assert not any(into), "a read wrote into a buffer that was given back"

    @_with_store
    async def test_shared_memory_changes_nothing(self, store: Store) -> None:
        """Memory that is shared is put like any other, and can be unmapped once it is not."""
        key, content = self._key(), _noise(2 * MIB)
        with _mapped_file(content) as (pages, path), memoryview(pages) as memory:
            store.share(memory, path)
            for start in (0, 4096, 4097):
                with memory[start:] as part:
                    await store.put_new(f"{key}/{start}", [part])
            store.unshare(memory)
            store.unshare(memory)
        for start in (0, 4096, 4097):
            assert bytes(await store.get(f"{key}/{start}")) == content[start:]

    @_with_store
    async def test_declared_constants(self, store: Store) -> None:
        """Constants of the right kind, and a URL that opens the same place where it is shared."""
        assert isinstance(store.durable_on_return, bool)
        assert store.visibility_lag_seconds >= 0.0
        assert store.exclusive in (True, False, None)
        assert "://" in store.url


@contextmanager
def _mapped_file(content: bytes) -> Iterator[tuple[mmap.mmap, str]]:
    """A file of shared memory; that it can be unmapped at the end says that no view is kept."""
    path = f"/dev/shm/ckptmgr-suite-{secrets.token_hex(8)}"  # noqa: S108 - made with O_EXCL, 0600
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(descriptor, len(content))
        with mmap.mmap(descriptor, len(content)) as pages:
            pages[:] = content
            yield pages, path
    finally:
        os.close(descriptor)
        os.unlink(path)


def _noise(size: int) -> bytes:
    """Bytes that no two blocks of share, cheaper than os.urandom."""
    block = os.urandom(64 * 1024)
    counted = (number.to_bytes(8, "little") + block for number in range(size // len(block) + 1))
    return b"".join(counted)[:size]


def _content(writer: int, size: int) -> bytes:
    return (writer.to_bytes(4, "little") * (size // 4 + 1))[:size]


async def _error_of(call: Awaitable[object]) -> Exception | None:
    try:
        await call
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return error
    return None


async def _size_of(store: Store, key: str) -> int | None:
    try:
        return len(await store.get(key))
    except ObjectNotFoundError:
        return None


async def _race(store: Store, top: str, writer: int, keys: int) -> list[int]:
    """The numbers of the keys that this writer won; closes the store."""
    won = []
    for number in range(keys):
        content = memoryview(_content(writer, 100 + writer))
        if await store.put_new(f"{top}/{number}", [content]) is PutResult.OK:
            won.append(number)
    await store.aclose()
    return won


async def _check_race(store: Store, top: str, won: list[list[int]], keys: int) -> None:
    assert sorted(chain.from_iterable(won)) == list(range(keys)), "not exactly one winner per key"
    for writer, numbers in enumerate(won):
        for number in numbers:
            assert bytes(await store.get(f"{top}/{number}")) == _content(writer, 100 + writer)


def _race_of_processes(url: str, top: str, writers: int, keys: int) -> list[list[int]]:
    """What each won. They are forked from a fresh process, which has no threads to lose."""
    command = [sys.executable, "-m", "ckptmgr.testing", url, top, str(writers), str(keys)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=240 + 2 * keys)
    won: list[list[int]] = json.loads(ran.stdout)
    return won


def _fork_and_race(url: str, top: str, writers: int, keys: int) -> list[list[int]]:
    fork = multiprocessing.get_context("fork")
    start, won = fork.Barrier(writers), fork.Queue()

    def race(writer: int) -> None:
        # As the product opens it: an answer that was lost on the way is not a lost race.
        store = RetryingStore(open_store(url))
        start.wait(timeout=60)
        won.put((writer, asyncio.run(_race(store, top, writer, keys))))

    for writer in range(writers):
        fork.Process(target=race, args=(writer,), daemon=True).start()
    found = dict(won.get(timeout=120 + keys) for _ in range(writers))
    return [found[writer] for writer in range(writers)]


if __name__ == "__main__":
    _url, _top, *_counts = sys.argv[1:]
    json.dump(_fork_and_race(_url, _top, *map(int, _counts)), sys.stdout)
