"""The 3FS store keeps every promise on an emulated mount, over rings and without, and its rules."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from ckptmgr.config import MIB
from ckptmgr.errors import StoreUnreachableError, UsageError
from ckptmgr.store.base import PutResult, Store, Wanted
from ckptmgr.store.local import LocalStore
from ckptmgr.store.posix import batches
from ckptmgr.store.registry import open_store
from ckptmgr.testing import StoreSuite
from ckptmgr_hf3fs import IO_VARIABLE, client_of
from ckptmgr_hf3fs.mount import virtual_directory
from ckptmgr_hf3fs.own import OwnClient
from ckptmgr_hf3fs.store import Hf3fsStore
from hf3fs.mounted import Mounted
from scale import RACE_PROCESSES, STORES, scaled


class OnTheMount(StoreSuite):
    """The suite below a root of its own; `io` is what the processes of a race use."""

    big_bytes = 20 * MIB  # many pieces, and more than the rooms of a ring
    race_processes = RACE_PROCESSES
    race_keys = scaled(20, 200)
    io: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _place(self, shared_mount: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = f"{shared_mount.point}/{self.io}"
        self.shared_url = self.url = f"hf3fs://{self.root}"
        monkeypatch.setenv(IO_VARIABLE, self.io)


class TestOverRings(OnTheMount):
    io = "python"

    def make_store(self) -> Store:
        return Hf3fsStore(self.root, self.url, OwnClient, ring_bytes_min=0, entries=8)


@pytest.mark.stores
@pytest.mark.skipif(not STORES, reason="NEEDS CKPTMGR_STORES=1: the whole suite without rings")
class TestWithoutRings(OnTheMount):
    io = "posix"

    def make_store(self) -> Store:
        return open_store(self.url)


# ---- which store serves a path ------------------------------------------------


@pytest.mark.parametrize("linked", [False, True])
def test_a_plain_path_on_the_mount_is_served_by_its_rules(
    shared_mount: Mounted, tmp_path: Path, linked: bool
) -> None:
    (tmp_path / "link").symlink_to(shared_mount.point)
    root = (tmp_path / "link" if linked else shared_mount.point) / f"plain/run {linked}"
    store = open_store(str(root))
    assert isinstance(store, Hf3fsStore)
    assert store.url == root.as_uri()

    async def main() -> None:
        assert await store.put_new("a/b", [memoryview(b"x" * MIB)]) is PutResult.OK
        assert await store.list("") == ["a/b"]
        await store.aclose()

    asyncio.run(main())
    assert (shared_mount.backing / f"plain/run {linked}/a/b").stat().st_size == MIB


def test_a_path_beside_the_mount_is_not(shared_mount: Mounted) -> None:
    assert type(open_store(str(shared_mount.backing))) is LocalStore
    assert type(open_store(f"{shared_mount.point}-else")) is LocalStore


def test_a_root_that_is_on_no_3fs_mount_is_neither_read_nor_made(tmp_path: Path) -> None:
    """An unmounted file system leaves an empty directory: it holds no steps, and gets none."""

    async def main() -> None:
        store = open_store(f"hf3fs://{tmp_path}/run7")
        for call in (
            store.put_new("a", []),
            store.get("a"),
            store.list(""),
            store.delete("a"),
            store.make_durable("a"),
        ):
            with pytest.raises(StoreUnreachableError, match="is not on a 3FS mount"):
                await call
        await store.aclose()

    asyncio.run(main())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("url", ["hf3fs://host/run7", "hf3fs:///run7?x=1", "hf3fs:///run7#x"])
def test_a_url_that_names_no_directory_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not the URL of a directory"):
        open_store(url)


def test_a_choice_of_io_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IO_VARIABLE, "fast")
    with pytest.raises(UsageError, match=r"CKPTMGR_HF3FS_IO=fast: is none of"):
        open_store("hf3fs:///mnt/run7")
    with pytest.raises(UsageError, match="can not be imported"):
        client_of("native")
    assert client_of("auto") is OwnClient
    assert client_of("posix") is None


# ---- the rules of the mount ----------------------------------------------------


def test_the_emulator_breaks_what_3fs_breaks(shared_mount: Mounted) -> None:
    """Were it an ordinary file system, the tests below would say nothing."""
    place = shared_mount.point / "facts"
    place.mkdir()
    file = place / "file"
    file.write_bytes(b"x")
    assert file.stat().st_blksize == 1 << 20
    assert place.stat().st_size == 0
    for call, number in (
        (lambda: os.setxattr(file, "user.x", b""), errno.ENOTSUP),
        (lambda: os.open(place, os.O_TMPFILE | os.O_RDWR), errno.ENOTSUP),
        (lambda: os.link(file, shared_mount.point / "3fs-virt/x"), errno.EPERM),
        (lambda: os.symlink("/etc/passwd", shared_mount.point / "3fs-virt/iovs/x"), errno.EINVAL),
    ):
        with pytest.raises(OSError, match=rf"\[Errno {number}\]"):
            call()
    (shared_mount.backing / "facts/other").write_bytes(b"")
    os.stat(place)
    assert not (place / "late").exists()
    (shared_mount.backing / "facts/late").write_bytes(b"")
    assert not (place / "late").exists(), "another node's file is not seen at once"
    os.rename(place, shared_mount.point / "3fs-virt/rm-rf/x")
    assert not (shared_mount.backing / "facts").exists()


@pytest.mark.parametrize("io", [None, OwnClient], ids=["posix", "rings"])
def test_a_size_that_the_kernel_remembers_cuts_nothing(
    shared_mount: Mounted, io: Callable[[str], OwnClient] | None
) -> None:
    """Attributes live for 30 s in the kernel: objects that another node wrote look short."""
    root = shared_mount.point / f"stale-{io is None}"
    behind = shared_mount.backing / root.name

    async def main() -> None:
        store = Hf3fsStore(str(root), f"hf3fs://{root}", io, ring_bytes_min=0)
        await store.put_new("a/first", [])
        content = os.urandom(2 * MIB)
        for name in ("whole", "range", "into", "many"):
            (behind / "a" / name).write_bytes(b"")
            assert (root / "a" / name).stat().st_size == 0
            (behind / "a" / name).write_bytes(content)
            assert (root / "a" / name).stat().st_size == 0, "the kernel remembers"
        assert await store.get("a/whole") == content
        assert await store.get("a/range", 5, MIB) == content[5 : 5 + MIB]
        into = memoryview(bytearray(len(content)))
        assert await store.get("a/into", into=into) == content
        await store.get_many([Wanted("a/many", 0, into[: MIB + 7])])
        assert into[: MIB + 7] == content[: MIB + 7]
        await store.aclose()

    asyncio.run(main())


def test_an_object_in_a_directory_that_was_looked_for_in_vain_is_put_and_got(
    shared_mount: Mounted,
) -> None:
    """Another node makes the directory, and the object, that this one remembers not to exist."""
    root = shared_mount.point / "vain"
    behind = shared_mount.backing / "vain"

    async def main() -> None:
        store = open_store(str(root))
        await store.put_new("first", [])
        assert await store.list("a/") == []
        (behind / "a").mkdir()
        (behind / "a/theirs").write_bytes(b"theirs")
        assert await store.put_new("a/theirs", [memoryview(b"ours")]) is PutResult.CONFLICT
        assert await store.get("a/theirs") == b"theirs"
        assert await store.put_new("a/ours", [memoryview(b"ours")]) is PutResult.OK
        assert await store.list("a/") == ["a/ours", "a/theirs"]
        await store.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("chunk_bytes", [64 << 10, MIB, 16 * MIB])
def test_without_rings_chunks_are_written_whole(chunk_bytes: int) -> None:
    offset = 0
    for batch in batches([memoryview(bytes(4096)), memoryview(bytes(40 * MIB))]):
        assert offset % chunk_bytes == 0
        offset += sum(map(len, batch))


def test_the_virtual_directory_may_be_mounted_apart(
    shared_mount: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container: a directory of the mount at one place, the virtual one at another."""
    from ckptmgr_hf3fs import mount as of_plugin

    file = shared_mount.point / "x"
    file.write_bytes(b"")
    device = os.stat(file).st_dev
    spelled = f"{os.major(device)}:{os.minor(device)}"
    rows = [
        of_plugin.Mount("/data", "fuse.hf3fs", spelled),
        of_plugin.Mount(f"{shared_mount.point}/3fs-virt", "fuse.hf3fs", spelled),
    ]
    monkeypatch.setattr(of_plugin, "read_mounts", lambda: rows)
    with file.open() as opened:
        assert virtual_directory(opened.fileno()) == f"{shared_mount.point}/3fs-virt"
        rows.pop()
        with pytest.raises(OSError, match="shows no directory of rings"):
            virtual_directory(opened.fileno())
