"""3FS's own library as ring client: a stand-in of its interface, over the emulated mount."""

from __future__ import annotations

import asyncio
import errno
import importlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ckptmgr.config import MIB
from ckptmgr.errors import StoreError
from ckptmgr.store.base import PutResult, Wanted
from ckptmgr_hf3fs import client_of
from ckptmgr_hf3fs.client import Client, Transfer
from ckptmgr_hf3fs.own import OwnClient, OwnMemory, OwnRing
from ckptmgr_hf3fs.store import Hf3fsStore
from hf3fs.mounted import Mounted


class Iovec:
    """Knows its own length when it is sliced, as the library's does; its end is its removal."""

    def __init__(self, memory: OwnMemory, offset: int, nbytes: int, base: Iovec | None) -> None:
        self.memory, self.offset, self.nbytes, self.base = memory, offset, nbytes, base
        self.result, self.userdata = 0, None

    def __getitem__(self, part: slice) -> Iovec:
        start, stop, step = part.indices(self.nbytes)
        assert step == 1
        return Iovec(self.memory, self.offset + start, stop - start, self)

    def __del__(self) -> None:
        if self.base is None:
            self.memory.close()


class Ioring:
    """The library's ring: it wants files registered, and keeps no reference to what it returns."""

    def __init__(self, fake: Fake, ring: OwnRing, *, for_read: bool) -> None:
        self.fake, self.ring, self.for_read = fake, ring, for_read
        self.prepared: dict[int, tuple[Iovec, int]] = {}
        self.alive: dict[int, Any] = {}
        self.next = 0

    def prepare(self, iov: Iovec, read: bool, fd: int, off: int, userdata: object = None) -> Ioring:
        if fd not in self.fake.registered:
            raise OSError(errno.EBADF, "is not registered")
        if read != self.for_read or not iov.nbytes:
            raise OSError(errno.EINVAL, "can not be prepared")
        self.ring.prepare(Transfer(iov.memory, iov.offset, fd, off, iov.nbytes, ""), self.next)
        self.prepared[self.next] = (iov, id(userdata))
        self.fake.objects[id(userdata)] = userdata
        self.next += 1
        return self

    def submit(self) -> Ioring:
        self.ring.submit()
        return self

    def wait(
        self, *, max_results: int = 0, min_results: int = 0, timeout: timedelta | None = None
    ) -> list[Iovec]:
        assert timeout is not None, "without a timeout it waits for ever when the daemon dies"
        assert max_results >= min_results > 0
        done = []
        for token, result in self.ring.finished(timeout.total_seconds()):
            iov, kept = self.prepared.pop(token)
            iov.result, iov.userdata = result, self.fake.objects.pop(kept)
            done.append(iov)
        return done


class Fake:
    """hf3fs_fuse.io, as far as it is documented."""

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.objects: dict[int, Any] = {}

    def make_iovec(self, shm: Any, mount_point: str, block_size: int = 0, numa: int = -1) -> Iovec:
        iovs = os.path.join(mount_point, "3fs-virt/iovs")
        return Iovec(OwnMemory(iovs, shm.name), 0, len(shm.buf), None)

    def make_ioring(
        self, mount_point: str, entries: int, for_read: bool = True, io_depth: int = 0, **more: Any
    ) -> Ioring:
        assert (io_depth, more) == (0, {"flags": 2 if for_read else 0})
        client = OwnClient(os.path.join(mount_point, "3fs-virt"))
        return Ioring(self, client.ring(entries, for_read=for_read), for_read=for_read)

    def register_fd(self, fd: int) -> None:
        if fd in self.registered:
            raise OSError(errno.EINVAL, "is registered")
        self.registered.add(fd)

    def deregister_fd(self, fd: int) -> None:
        self.registered.discard(fd)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    made = Fake()
    package = ModuleType("hf3fs_fuse")
    io = SimpleNamespace(**{name: getattr(made, name) for name in vars(Fake) if name[0] != "_"})
    monkeypatch.setattr(package, "io", io, raising=False)
    monkeypatch.setitem(sys.modules, "hf3fs_fuse", package)
    sys.modules.pop("ckptmgr_hf3fs.native", None)
    yield made
    sys.modules.pop("ckptmgr_hf3fs.native", None)


def test_the_library_is_taken_where_it_can_be_imported(fake: Fake) -> None:
    native = importlib.import_module("ckptmgr_hf3fs.native").NativeClient
    assert client_of("auto") is client_of("native") is native
    assert client_of("python") is OwnClient


def test_objects_go_over_the_library_and_every_file_is_deregistered(
    shared_mount: Mounted, fake: Fake
) -> None:
    content = os.urandom(9 * MIB + 5)

    async def main() -> None:
        make = client_of("native")
        assert make is not None
        root = shared_mount.point / "native"
        store = Hf3fsStore(str(root), f"hf3fs://{root}", make, ring_bytes_min=0, entries=4)
        for turn in range(3):
            key = f"a/{turn}"
            assert await store.put_new(key, [memoryview(content)[turn:]]) is PutResult.OK
            assert await store.get(key) == content[turn:]
        into = memoryview(bytearray(4 * MIB))
        wanted = [Wanted(f"a/{n % 3}", n * 7, into[n * MIB // 4 :][: MIB // 4]) for n in range(16)]
        await store.get_many(wanted)
        for one in wanted:
            start = one.offset + int(one.key[-1])
            assert one.into == content[start : start + len(one.into)]
        shared_mount.fault("ring-error", errno.EIO)
        with pytest.raises(StoreError):
            await store.put_new("b", [memoryview(content)])
        assert store.ring_bytes == 3 * len(content) - 3
        assert fake.registered == set(), "closed files must not stay registered"
        assert fake.objects == {}
        await store.aclose()

    asyncio.run(main())


def test_a_file_number_that_a_lost_ring_left_registered_is_used_again(
    shared_mount: Mounted, fake: Fake
) -> None:
    make = client_of("native")
    assert make is not None
    client: Client = make(f"{shared_mount.point}/3fs-virt")
    path = shared_mount.point / "again"
    path.write_bytes(b"x")
    descriptor = os.open(path, os.O_RDWR)
    fake.registered.add(descriptor)
    ring = client.ring(2, for_read=True)
    memory = shared_mount.point  # never read: the daemon is not waken
    name = f"ckptmgr-hf3fs-{os.getpid()}-again"
    with open(f"/dev/shm/{name}", "w+b") as file:
        file.write(bytes(4096))
    registered = client.register(name, memoryview(bytes(4096)))
    os.unlink(f"/dev/shm/{name}")
    ring.prepare(Transfer(registered, 0, descriptor, 0, 1, str(memory)), 1)
    ring.submit()
    assert ring.finished(10.0) == [(1, 1)]
    assert fake.registered == set()
    ring.close()
    registered.close()
    os.close(descriptor)
