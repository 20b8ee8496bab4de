"""file:// objects as files of any POSIX file system, written so that a power cut loses none."""

from __future__ import annotations

import errno
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import quote

from ckptmgr.config import MIB
from ckptmgr.errors import ObjectNotFoundError, StoreError, UsageError
from ckptmgr.store.base import (
    Buffers,
    PutResult,
    Store,
    Wanted,
    check_key,
    check_prefix,
    range_length,
)
from ckptmgr.store.calls import Call, Calls
from ckptmgr.store.finding import Finding, clock_finding
from ckptmgr.store.mounts import mount_of
from ckptmgr.store.posix import (
    is_direct,
    is_page_aligned,
    is_regular,
    opened,
    start_direct,
    write_all,
)
from ckptmgr.store.tree import Tree, walk

THREADS = 8
"""Blocking calls at a time: more than one disk can use, few enough to lose when a mount hangs."""

DIRECT_BYTES_MIN = 1 * MIB
"""Smallest object written with O_DIRECT; below, the page cache is as fast and spares the call."""

READ_BYTES = 1 * MIB
"""Bytes copied at once from the page cache to `into`, which takes 0.2 ms: as long may a call that
is cancelled have to wait."""

WAIT_BYTES = 128 << 10
"""Bytes read at once where the medium must be waited for. They pass through a buffer that stays in
the CPU's cache, so that a read that comes back after its call was cancelled can not write into
memory that its owner has put to another use. Meanwhile the kernel reads ahead."""

TEMPORARIES = ".tmp"
"""Directory of unfinished objects; no key can name it, for its first character is a dot."""

LEFTOVER_SECONDS = 24 * 3600.0
"""Age at which an unfinished object is taken for a dead writer's: no put takes so long."""


class LocalStore(Store):
    """Objects as files below `root`, an absolute path; the root is made by the first `put_new`.

    Exclusive and atomic by link(2), which every POSIX file system decides in one place. All
    blocking calls run in THREADS threads.

    A file system with rules of its own is a subclass: `_write_bytes`, `_read_bytes` and `_size` are
    the three steps that may be done in another way. The order around them is the same everywhere.
    """

    durable_on_return = False
    """Another process may have linked an object and not yet synced its directory."""

    def __init__(self, root: str) -> None:
        if not root.startswith("/"):
            raise UsageError("is not an absolute path", subject=repr(root))
        # A subclass may know of a longer one.
        self.visibility_lag_seconds = max(self.visibility_lag_seconds, mount_of(root).lag_seconds)
        self._tree = Tree(root)
        self._calls = Calls(THREADS)
        self._bounce = threading.local()
        self._direct = True
        self._knows_nowait = hasattr(os, "RWF_NOWAIT")  # not in a Python built for an old libc
        self._swept = False

    @property
    def url(self) -> str:
        """As `Store.url`."""
        return "file://" + quote(self._tree.root)

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """As `Store.put_new`."""
        parts = check_key(key).split("/")
        return await self._calls.run(key, lambda call: self._put(call, parts, buffers))

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """As `Store.get`."""
        parts = check_key(key).split("/")

        def read(call: Call[Any]) -> memoryview:
            with self._object(key, parts) as (_, descriptor):
                wanted = len(into) if into is not None else length
                size = self._size(descriptor, None if wanted is None else offset + wanted)
                count = range_length(key, size, offset, length, into)
                room = memoryview(bytearray(count)) if into is None else into
                self._read_bytes(key, descriptor, offset, room, call)
                return room

        return await self._calls.run(key, read)

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """As `Store.get_many`, in one thread: neighbours in an object are one read to the kernel,
        which reads ahead, and callers that want more threads make more calls.
        """
        by_key: dict[str, list[Wanted]] = {}
        for one in wanted:
            by_key.setdefault(check_key(one.key), []).append(one)

        def read(call: Call[Any]) -> None:
            for key, ranges in by_key.items():
                call.subject = key
                with self._object(key, key.split("/")) as (_, descriptor):
                    for one in sorted(ranges, key=lambda one: one.offset):
                        size = self._size(descriptor, one.offset + len(one.into))
                        range_length(key, size, one.offset, None, one.into)
                        self._read_bytes(key, descriptor, one.offset, one.into, call)

        await self._calls.run("", read)

    async def uncache(self, key: str) -> None:
        """As `Store.uncache`. Pages that are not on the medium yet stay: objects are synced before
        they have a name.
        """
        parts = check_key(key).split("/")

        def drop(_call: Call[Any]) -> None:
            with suppress(ObjectNotFoundError), self._object(key, parts) as (_, descriptor):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

        await self._calls.run(key, drop)

    async def list(self, prefix: str) -> list[str]:
        """As `Store.list`."""
        parts = check_prefix(prefix).split("/")[:-1]
        return await self._calls.run(prefix, lambda call: _keys(self._tree, call, prefix, parts))

    async def delete(self, key: str) -> None:
        """As `Store.delete`. Directories that become empty stay until `prune`: a writer that has
        just opened one could not link its object into it, and would have to write it again.
        """
        parts = check_key(key).split("/")

        def unlink(call: Call[Any]) -> None:
            with (
                suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError),
                self._tree.directory(parts[:-1], durable=False) as directory,
            ):
                call.check()
                os.unlink(parts[-1], dir_fd=directory)

        await self._calls.run(key, unlink)

    async def prune(self, prefix: str) -> None:
        """As `Store.prune`: directories. A put that loses one of them is tried again.

        Only of what no other process needs: what it knows to be durable it knows by inode, which a
        directory that is made anew may get again before it is durable.
        """
        parts = check_prefix(prefix).split("/")[:-1]
        await self._calls.run(prefix, lambda call: self._tree.prune(parts, call.check))

    async def make_durable(self, key: str) -> None:
        """As `Store.make_durable`."""
        parts = check_key(key).split("/")

        def sync(_call: Call[Any]) -> None:
            with self._object(key, parts, durable=True) as (directory, descriptor):
                os.fsync(descriptor)
                os.fsync(directory)

        await self._calls.run(key, sync)

    async def examine(self, key: str, put_between: tuple[float, float]) -> Sequence[Finding]:
        """As `Store.examine`: the clock that dates files may be a server's."""
        parts = check_key(key).split("/")

        def look(_call: Call[Any]) -> float:
            with self._object(key, parts) as (_, descriptor):
                return os.fstat(descriptor).st_mtime

        return [clock_finding(await self._calls.run(key, look), *put_between)]

    async def sweep_temporaries(self, older_than_seconds: float) -> int:
        """Delete unfinished objects that were last written so long ago; returns how many.

        Safe at any time: a writer that is robbed of its file fails with StoreUnreachableError
        and its caller writes the object again.
        """
        newest = time.time() - older_than_seconds
        return await self._calls.run(TEMPORARIES, lambda call: self._sweep(call, newest))

    async def aclose(self) -> None:
        """Calls that hang in the kernel are left to it."""
        self._calls.close()

    def _put(self, call: Call[Any], parts: Sequence[str], buffers: Buffers) -> PutResult:
        """The order of these steps is the promise; tests/crash cuts the power between them."""
        name = secrets.token_hex(16)
        with (
            self._tree.directory(parts[:-1], durable=True, make=True) as directory,
            self._tree.directory([TEMPORARIES], durable=False, make=True) as temporaries,
        ):
            if not self._swept:
                self._swept = True
                self._sweep(call, time.time() - LEFTOVER_SECONDS)
            try:
                self._write(call, name, temporaries, buffers)
                call.check()
                if not _link(name, temporaries, parts[-1], directory):
                    return PutResult.CONFLICT
                os.fsync(directory)
                return PutResult.OK
            finally:
                with suppress(OSError):  # a leftover harms nobody and is swept
                    os.unlink(name, dir_fd=temporaries)

    def _write(self, call: Call[Any], name: str, at: int, buffers: Buffers) -> None:
        """Write a new file to stable storage. After any error, close too, it must be thrown away:
        the kernel reports lost pages once, and a second fsync would say that all is well.
        """
        with opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, at) as descriptor:
            self._write_bytes(call, descriptor, buffers)

    def _write_bytes(self, call: Call[Any], descriptor: int, buffers: Buffers) -> None:
        """Write `buffers` into an empty file, and to stable storage."""
        wants_direct = (
            self._direct and sum(map(len, buffers)) >= DIRECT_BYTES_MIN and is_page_aligned(buffers)
        )
        if wants_direct:
            self._direct = start_direct(descriptor)
        write_all(descriptor, buffers, call.check)
        if wants_direct and not is_direct(descriptor):
            self._direct = False
        os.fsync(descriptor)

    def _size(self, descriptor: int, _end: int | None) -> int:
        """Bytes of an object, of which those before `_end` are wanted (None: all of them)."""
        return os.fstat(descriptor).st_size

    @contextmanager
    def _object(
        self, key: str, parts: Sequence[str], *, durable: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Descriptors of the directory of an object and of the object."""
        with ExitStack() as stack:
            try:
                directory = stack.enter_context(self._tree.directory(parts[:-1], durable=durable))
                # Without O_NONBLOCK a pipe under the name of an object would wait for a writer.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = stack.enter_context(opened(parts[-1], flags, directory))
            except (FileNotFoundError, NotADirectoryError):
                raise _not_found(key) from None
            if not is_regular(descriptor):
                raise _not_found(key)
            yield directory, descriptor

    def _read_bytes(
        self, key: str, descriptor: int, offset: int, into: memoryview, call: Call[Any]
    ) -> None:
        """Fill `into`: what is in the page cache at once, what is not as WAIT_BYTES says."""
        while len(into):
            piece = into[:READ_BYTES]
            count = call.while_wanted(partial(self._cached, descriptor, offset, piece))
            if not count:
                found = self._waited_for(descriptor, offset, len(piece))
                if not (count := len(found)):
                    raise StoreError("is too short: it was cut while it was read", subject=key)
                call.deliver(found, piece[:count])
            into, offset = into[count:], offset + count

    def _waited_for(self, descriptor: int, offset: int, count: int) -> memoryview:
        """The next bytes, when the medium has given them, in a buffer of this thread."""
        if not hasattr(self._bounce, "view"):
            self._bounce.view = memoryview(bytearray(WAIT_BYTES))
        room: memoryview = self._bounce.view[:count]
        return room[: os.preadv(descriptor, [room], offset)]

    def _cached(self, descriptor: int, offset: int, into: memoryview) -> int:
        """Bytes at the head of `into` that could be read without waiting for the medium."""
        if not self._knows_nowait:
            return 0
        try:
            return os.preadv(descriptor, [into], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._knows_nowait = False
            return 0

    def _sweep(self, call: Call[Any], newest: float) -> int:
        swept = 0
        with (
            suppress(FileNotFoundError),
            self._tree.directory([TEMPORARIES], durable=False) as temporaries,
        ):
            for name in os.listdir(temporaries):
                call.check()
                with suppress(FileNotFoundError, IsADirectoryError):  # its writer was faster
                    if os.stat(name, dir_fd=temporaries, follow_symlinks=False).st_mtime <= newest:
                        os.unlink(name, dir_fd=temporaries)
                        swept += 1
        return swept


def _keys(tree: Tree, call: Call[Any], prefix: str, parts: Sequence[str]) -> list[str]:
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(tree.directory(parts, durable=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(walk(directory, prefix, call.check))


def _not_found(key: str) -> ObjectNotFoundError:
    return ObjectNotFoundError("does not exist", subject=key)


def _link(name: str, temporaries: int, target: str, directory: int) -> bool:
    """Give the temporary file its key; False if the key is taken."""
    try:
        os.link(name, target, src_dir_fd=temporaries, dst_dir_fd=directory, follow_symlinks=False)
    except FileExistsError:
        # NFS may repeat a request that worked and answer EEXIST: a second name of the temporary
        # file, which nobody else can know, shows that the first request made it.
        return os.stat(name, dir_fd=temporaries, follow_symlinks=False).st_nlink > 1
    return True
