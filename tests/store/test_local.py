"""LocalStore keeps every promise, and steps out of its directory for nobody."""

from __future__ import annotations

import asyncio
import mmap
import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.config import MIB
from ckptmgr.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreUnreachableError,
    UsageError,
)
from ckptmgr.store import local, posix
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.retry import RetryingStore
from ckptmgr.testing import StoreSuite
from processes import needs_root
from scale import RACE_PROCESSES


class TestPromises(StoreSuite):
    race_processes = RACE_PROCESSES

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"
        self.shared_url = self.root.as_uri()

    def make_store(self) -> Store:
        return LocalStore(str(self.root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "new" / "store"


def temporaries(root: Path) -> list[str]:
    return os.listdir(root / local.TEMPORARIES)


# ---- what lies on disk --------------------------------------------------------


async def test_only_its_user_can_read_it(store: LocalStore, root: Path) -> None:
    await store.put_new("a/b/key", [memoryview(b"x")])
    for path in (root, root / "a", root / "a/b", root / local.TEMPORARIES):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "a/b/key").stat().st_mode) == 0o600
    assert (root / "a/b/key").stat().st_nlink == 1
    assert temporaries(root) == []


async def test_the_order_of_the_durable_steps(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("a/first", [])
    steps: list[str] = []

    def spy(name: str, subject: int) -> None:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            what = args[subject]
            if isinstance(what, int):
                what = os.path.relpath(os.readlink(f"/proc/self/fd/{what}"), root)
            steps.append(f"{name} {'temp' if len(str(what)) >= 32 else what}")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name, subject in (("pwritev", 0), ("fsync", 0), ("link", 1), ("unlink", 0), ("mkdir", 0)):
        spy(name, subject)
    await store.put_new("a/second", [memoryview(b"x")])
    assert steps == ["pwritev temp", "fsync temp", "link second", "fsync a", "unlink temp"]
    steps.clear()
    await store.put_new("a/b/third", [memoryview(b"x")])
    assert steps == [
        *("mkdir b", "fsync a"),
        *("pwritev temp", "fsync temp", "link third", "fsync a/b", "unlink temp"),
    ]
    steps.clear()
    await store.make_durable("a/b/third")
    assert steps == ["fsync a/b/third", "fsync a/b"]


async def test_make_durable_of_another_process_syncs_the_whole_chain_once(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("a/b/key", [memoryview(b"x")])
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    other = LocalStore(str(root))
    await other.make_durable("a/b/key")
    below = [path for path in synced if not path.startswith("..")]
    assert below == [".", "a", "a/b/key", "a/b"]
    assert synced[0] == "..", "the name of the root itself"
    synced.clear()
    await other.make_durable("a/b/key")
    assert synced == ["a/b/key", "a/b"]
    await other.aclose()


async def test_a_directory_made_anew_is_made_durable_anew(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("a/key", [])
    (root / "a/key").unlink()
    (root / "a").rename(root / "moved")
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert await store.put_new("a/key", []) is PutResult.OK
    assert root.stat().st_ino in synced


# ---- links and strangers -------------------------------------------------------


async def test_no_link_is_followed_for_an_object(
    store: LocalStore, root: Path, outside: Path
) -> None:
    await store.put_new("a/real", [])
    (root / "a/link").symlink_to(outside / "object")
    for call in (store.get("a/link"), store.make_durable("a/link")):
        with pytest.raises(StoreError):
            await call
    assert await store.put_new("a/link", [memoryview(b"x")]) is PutResult.CONFLICT
    assert await store.list("") == ["a/real"]
    await store.delete("a/link")
    assert (outside / "object").read_bytes() == b"not of the store"


async def test_no_link_is_followed_for_a_directory(
    store: LocalStore, root: Path, outside: Path
) -> None:
    await store.put_new("a/real", [])
    (root / "b").symlink_to(outside)
    for call in (
        store.put_new("b/new", []),
        store.get("b/object"),
        store.make_durable("b/object"),
        store.list("b/"),
        store.delete("b/object"),
    ):
        with pytest.raises(StoreError, match="symbolic link"):
            await call
    assert await store.list("") == ["a/real"]
    assert os.listdir(outside) == ["object"]


async def test_a_link_in_place_of_the_temporaries_is_refused(
    store: LocalStore, root: Path, outside: Path
) -> None:
    root.mkdir(parents=True)
    (root / local.TEMPORARIES).symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        await store.put_new("key", [memoryview(b"x")])
    with pytest.raises(StoreError, match="symbolic link"):
        await store.sweep_temporaries(0)
    assert os.listdir(outside) == ["object"]


async def test_the_path_of_the_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    root.mkdir(parents=True)
    (tmp_path / "alias").symlink_to(root)
    store = LocalStore(str(tmp_path / "alias"))
    await store.put_new("key", [memoryview(b"x")])
    assert (root / "key").read_bytes() == b"x"
    await store.aclose()


async def test_a_pipe_does_not_hang_a_reader(store: LocalStore, root: Path) -> None:
    await store.put_new("a/real", [])
    os.mkfifo(root / "a/pipe")
    with pytest.raises(ObjectNotFoundError):
        await store.get("a/pipe")
    assert await store.list("a/") == ["a/real"]


async def test_names_that_are_no_keys_are_not_listed(store: LocalStore, root: Path) -> None:
    await store.put_new("a/real", [])
    for name in (".hidden", "a/.x", "a/with space", "a/-dash", "a/" + "n" * 200, "a/ü"):
        (root / name).write_bytes(b"")
    (root / local.TEMPORARIES / "left").write_bytes(b"")
    assert await store.list("") == ["a/real"]


async def test_a_key_below_an_object(store: LocalStore) -> None:
    await store.put_new("a", [])
    for call in (store.get("a/b"), store.make_durable("a/b")):
        with pytest.raises(ObjectNotFoundError):
            await call
    with pytest.raises(StoreError) as caught:
        await store.put_new("a/b", [])
    assert not isinstance(caught.value, StoreUnreachableError)
    await store.delete("a/b")
    assert await store.list("a/") == []


async def test_a_directory_is_no_object(store: LocalStore) -> None:
    await store.put_new("a/b", [])
    with pytest.raises(ObjectNotFoundError):
        await store.get("a")
    await store.delete("a")
    assert await store.list("") == ["a/b"]


def test_a_relative_root_is_refused() -> None:
    with pytest.raises(UsageError):
        LocalStore("relative/path")


# ---- temporary files -----------------------------------------------------------


async def test_sweeping_takes_only_what_is_old(store: LocalStore, root: Path) -> None:
    assert await store.sweep_temporaries(0) == 0
    await store.put_new("key", [])
    old, new = root / local.TEMPORARIES / "old", root / local.TEMPORARIES / "new"
    for path in (old, new):
        path.write_bytes(b"left by a writer that was killed")
    os.utime(old, (time.time() - 100, time.time() - 100))
    assert await store.sweep_temporaries(50) == 1
    assert temporaries(root) == ["new"]


async def test_a_writer_whose_file_was_swept_is_told_to_write_again(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("first", [])
    real = os.link

    def sweep_then_link(*args: object, **kwargs: object) -> None:
        for name in temporaries(root):
            (root / local.TEMPORARIES / name).unlink()
        real(*args, **kwargs)

    monkeypatch.setattr(os, "link", sweep_then_link)
    with pytest.raises(StoreUnreachableError):
        await store.put_new("key", [memoryview(b"x")])
    monkeypatch.setattr(os, "link", real)
    assert await store.put_new("key", [memoryview(b"x")]) is PutResult.OK


async def test_a_link_that_answers_twice_is_ours(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: the reply to the first request was lost, the repeated one finds our own name."""
    real = os.link

    def link_twice(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        real(*args, **kwargs)

    monkeypatch.setattr(os, "link", link_twice)
    assert await store.put_new("key", [memoryview(b"x")]) is PutResult.OK
    assert await store.put_new("key", [memoryview(b"x")]) is PutResult.CONFLICT


# ---- O_DIRECT ------------------------------------------------------------------


@pytest.fixture
def pages() -> Iterator[memoryview]:
    with mmap.mmap(-1, 4 * MIB) as mapped:
        mapped[:] = os.urandom(4 * MIB)
        view = memoryview(mapped)
        yield view
        view.release()


async def test_where_o_direct_is_refused_the_page_cache_is_used_from_then_on(
    store: LocalStore, pages: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwritev, 0

    def pwritev(descriptor: int, views: list[memoryview], offset: int) -> int:
        nonlocal refused
        if posix.is_direct(descriptor) and offset:
            refused += 1
            raise OSError(22, "Invalid argument")
        return real(descriptor, [view[: 1 * MIB] for view in views[:1]], offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    for key in ("one", "two"):
        assert await store.put_new(key, [pages]) is PutResult.OK
        assert await store.get(key) == pages
    assert refused <= 1


def test_batches_hold_every_byte_once() -> None:
    content = memoryview(os.urandom(40 * MIB))
    small = [content[start : start + 3] for start in range(0, 9_000, 3)]
    buffers = [*small, content[9_000:9_000], content[9_000:]]
    batches = list(posix.batches(buffers))
    assert b"".join(view for batch in batches for view in batch) == content
    for batch in batches:
        assert len(batch) <= posix.IOV_MAX
        assert sum(map(len, batch)) <= posix.WRITE_BYTES_MAX


def test_only_whole_pages_go_directly(pages: memoryview) -> None:
    assert posix.is_page_aligned([pages, pages[4096:8192], pages[:0]])
    assert not posix.is_page_aligned([pages[:4095]])
    assert not posix.is_page_aligned([pages[8:4104]])
    assert posix.is_page_aligned([pages.toreadonly()])


# ---- calls that hang -----------------------------------------------------------


async def test_calls_that_hang_are_given_up_and_harm_nobody(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_new("first", [])
    wakes, entered, real = threading.Event(), threading.Semaphore(0), os.pwritev

    def hang(*args: object) -> int:
        entered.release()
        wakes.wait(60)
        return real(*args)

    monkeypatch.setattr(os, "pwritev", hang)
    content = bytearray(b"sealed")
    calls = [
        asyncio.ensure_future(store.put_new(f"hung/{n}", [memoryview(content)]))
        for n in range(local.THREADS)
    ]
    for _ in calls:
        assert await asyncio.to_thread(entered.acquire, timeout=60)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    with pytest.raises(StoreUnreachableError, match="hang"):
        await store.get("first")
    content[:] = b"reused"
    wakes.set()
    while temporaries(root):
        await asyncio.sleep(0.01)
    assert await store.list("hung/") == []
    assert await store.put_new("next", [memoryview(b"x")]) is PutResult.OK


# ---- the root comes and goes ---------------------------------------------------


async def test_a_deleted_root_is_an_empty_store(store: LocalStore, root: Path) -> None:
    await store.put_new("a/key", [memoryview(b"old")])
    root.rename(root.with_name("moved"))
    assert await store.list("") == []
    with pytest.raises(ObjectNotFoundError):
        await store.get("a/key")
    assert await store.put_new("a/key", [memoryview(b"new")]) is PutResult.OK


@pytest.mark.root
@pytest.mark.parametrize("below", ["", "run7"])
async def test_an_unmounted_store_is_not_written_to_the_disk_below(
    tmp_path: Path, below: str
) -> None:
    needs_root()
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount_point)]
    store = LocalStore(str(mount_point / below).rstrip("/"))
    subprocess.run(mount, check=True)
    try:
        await store.put_new("a/key", [])
        subprocess.run(["umount", mount_point], check=True)
        for call in (store.put_new("a/new", []), store.list(""), store.get("a/key")):
            with pytest.raises(StoreUnreachableError, match="Mount"):
                await call
        assert os.listdir(mount_point) == []
        subprocess.run(mount, check=True)
        assert await store.put_new("a/new", []) is PutResult.OK
    finally:
        subprocess.run(["umount", mount_point], check=False)
        await store.aclose()


async def test_leftovers_of_dead_writers_go_with_the_first_put(tmp_path: Path) -> None:
    temporaries = tmp_path / ".tmp"
    temporaries.mkdir(mode=0o700)
    old, young = temporaries / "old", temporaries / "young"
    for path in (old, young):
        path.write_bytes(b"half an object")
    os.utime(old, (0, 0))
    store = LocalStore(str(tmp_path))
    try:
        await store.put_new("a/b", [memoryview(b"x")])
    finally:
        await store.aclose()
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("place", ["/proc/nope", "/proc/nope/deeper", "/sys/nope"])
async def test_a_root_that_can_not_be_made_is_said_at_once(place: str) -> None:
    """Through the retries, which would go on for four minutes."""
    store = RetryingStore(LocalStore(place))
    with pytest.raises(StoreError, match="can not be made") as raised:
        await store.put_new("a", [memoryview(b"x")])
    assert raised.value.subject == place
    assert "Give a URL" in raised.value.hint
    await store.aclose()


async def test_a_root_that_was_there_is_waited_for(root: Path, store: LocalStore) -> None:
    """Its mount point may be a place where nothing can be made, until it is mounted again."""
    await store.put_new("a", [memoryview(b"x")])
    root.rename(root.with_name("moved"))
    tree = store._tree
    tree.root = "/proc/nope"
    with pytest.raises(StoreUnreachableError):
        await store.put_new("b", [memoryview(b"x")])
    tree.root = str(root)
    root.with_name("moved").rename(root)
    assert await store.put_new("b", [memoryview(b"x")]) is PutResult.OK


async def test_what_is_known_of_directories_is_bounded(
    root: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that runs for months makes three for every step."""
    monkeypatch.setattr("ckptmgr.store.tree.DURABLE_MAX", 4)
    for step in [*range(20), *range(20)]:
        await store.put_new(f"a/{step}/{'x' * (1 + step)}", [memoryview(b"x")])
        assert len(store._tree._durable) <= 4
    assert len(await store.list("a/")) == 20
