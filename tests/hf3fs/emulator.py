"""An emulator of what a client sees of a 3FS mount, as a process of its own that can be killed.

A FUSE file system over a plain directory, of the mount's type, with its rules: names, errors,
virtual directories, caches of the kernel, rings. It knows the layout of rings from the description
of 3FS and not from the plugin, so that both can not be wrong in the same way unseen. What it is
not: a cluster, RDMA, several nodes. It is harsher than 3FS in one thing: fsync does not make the
kernel forget attributes.

A file in the directory of faults makes the next operation of that kind go wrong (see Faults).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import mfusepy as fuse
from emulated_rings import DEV_SHM, Memories, RefusedError, Submissions

ATTRIBUTE_SECONDS, NEGATIVE_SECONDS = 30, 5
MAGIC_REQUEST, MAGIC_NUMBER, FSYNC_REQUEST = 0x80046802, 0x8F3F5FFF, 0x8004680B
VIRTUAL = "/3fs-virt"
DIRECTORIES = ("iovs", "rm-rf", "get-conf", "set-conf")


class Faults:
    """Files by which a test says what goes wrong: `take` uses one up, `active` leaves it there.

    fsync, flush, write: errno of the next one; fsync and flush lose what was written, as the mount
    does, and a second one says that all is well. ring-error: errno of the next transfer.
    ring-short: most bytes that the next one moves. ring-hold: nothing in a ring is begun while it
    is there. dryrun: writes do nothing, as usr.dryrun_bench_mode makes them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def active(self, name: str) -> bool:
        return (self._directory / name).exists()

    def take(self, name: str) -> int | None:
        path = self._directory / name
        try:
            number = int(path.read_text())
            path.unlink()
        except FileNotFoundError:
            return None
        return number

    def strike(self, name: str) -> None:
        number = self.take(name)
        if number is not None:
            raise fuse.FuseOSError(number)


class Mount(fuse.Operations):  # type: ignore[misc]
    """The operations of the mount. `opened` knows the descriptors of an inode, for the rings."""

    use_ns: ClassVar[bool] = True

    def __init__(self, backing: Path, faults: Faults, chunk_bytes: int) -> None:
        self.backing = str(backing)
        self.faults = faults
        self.chunk_bytes = chunk_bytes
        self.opened: dict[int, list[int]] = {}
        self.guard = threading.Lock()
        self.submissions = Submissions()
        self.memories = Memories(self)
        self.locks: dict[str, bytes] = {}
        self.directories: dict[int, tuple[str, int]] = {}
        self.settings = {"usr.dryrun_bench_mode": "false", "usr.negative_timeout": "5"}

    def init(self, path: str) -> None:
        """Threads begin here: libfuse may fork before."""
        self.memories.start()

    def below(self, path: str) -> str:
        return self.backing + path

    # -- names --------------------------------------------------------------------------------

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        if path == VIRTUAL or path.startswith(VIRTUAL + "/"):
            return self._virtual(path)
        found = os.fstat(fh) if fh is not None else os.lstat(self.below(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
        attributes = {name: getattr(found, name) for name in names}
        attributes["st_mtime"] = found.st_mtime_ns // 10**9 * 10**9
        attributes["st_blksize"] = self.chunk_bytes
        if stat.S_ISDIR(found.st_mode):
            attributes["st_size"] = 0
        return attributes

    def _virtual(self, path: str) -> dict[str, Any]:
        parts = path.split("/")[2:]
        if not parts or (parts[0] in DIRECTORIES and len(parts) == 1):
            number = (1 << 60) + (DIRECTORIES.index(parts[0]) + 1 if parts else 0)
            return {"st_mode": stat.S_IFDIR | 0o777, "st_nlink": 2, "st_ino": number}
        self.readlink(path)  # says what is not there, or not this user's
        return {"st_mode": stat.S_IFLNK | 0o777, "st_nlink": 1, "st_size": 64}

    def opendir(self, path: str) -> int:
        pid = fuse.fuse_get_context()[2]
        with self.guard:
            handle = max(self.directories, default=0) + 1
            self.directories[handle] = (path, pid)
        return handle

    def releasedir(self, path: str, fh: int) -> int:
        """With the directory of registered memory goes what the process registered."""
        with self.guard:
            opened, pid = self.directories.pop(fh)
        if opened == f"{VIRTUAL}/iovs":
            self.memories.reap(pid)
        return 0

    def readdir(self, path: str, fh: int) -> Iterator[Any]:
        if path == VIRTUAL:
            yield from ((name, {"st_mode": stat.S_IFDIR, "st_ino": 1}, 0) for name in DIRECTORIES)
        elif path == f"{VIRTUAL}/iovs":
            names = (*self.submissions.links, *self.memories.names())
            yield from ((name, {"st_mode": stat.S_IFLNK, "st_ino": 1}, 0) for name in names)
        else:
            with os.scandir(self.below(path)) as entries:
                for entry in entries:
                    kind = entry.stat(follow_symlinks=False)
                    yield entry.name, {"st_mode": kind.st_mode, "st_ino": kind.st_ino}, 0
            if path == "/":
                yield VIRTUAL[1:], {"st_mode": stat.S_IFDIR, "st_ino": 1 << 60}, 0

    def readlink(self, path: str) -> str:
        where, _, name = path.removeprefix(VIRTUAL + "/").partition("/")
        if not path.startswith(VIRTUAL + "/"):
            return os.readlink(self.below(path))
        if where == "iovs" and name in self.submissions.links:
            return self.submissions.links[name]
        if where == "iovs":
            return self.memories.target(name, fuse.fuse_get_context()[0])
        if where == "get-conf" and name in self.settings:
            return self.settings[name]
        raise fuse.FuseOSError(errno.ENOENT)

    def symlink(self, target: str, source: str) -> int:
        """`target` is the new name, `source` what it leads to."""
        where, _, name = target.removeprefix(VIRTUAL + "/").partition("/")
        if not target.startswith(VIRTUAL + "/"):
            os.symlink(source, self.below(target))
        elif where == "iovs":
            uid, _, pid = fuse.fuse_get_context()
            try:
                self.memories.add(name, source, uid, pid)
            except RefusedError as error:
                raise fuse.FuseOSError(errno.EINVAL) from error
        elif where == "set-conf" and name in self.settings:
            self.settings[name] = source
        else:
            raise fuse.FuseOSError(errno.EPERM)
        return 0

    def unlink(self, path: str) -> int:
        where, _, name = path.removeprefix(VIRTUAL + "/").partition("/")
        if not path.startswith(VIRTUAL + "/"):
            os.unlink(self.below(path))
        elif where == "iovs":
            self.memories.remove(name, fuse.fuse_get_context()[0])
        else:
            raise fuse.FuseOSError(errno.EPERM)
        return 0

    def rename(self, old: str, new: str) -> int:
        if new.startswith(f"{VIRTUAL}/rm-rf/"):
            gone = self.below(old)
            if os.path.isdir(gone):
                shutil.rmtree(gone)
            else:
                os.unlink(gone)
        elif VIRTUAL in (old[: len(VIRTUAL)], new[: len(VIRTUAL)]):
            raise fuse.FuseOSError(errno.EPERM)
        else:
            os.rename(self.below(old), self.below(new))
        return 0

    def link(self, target: str, source: str) -> int:
        if target.startswith(VIRTUAL):
            raise fuse.FuseOSError(errno.EPERM)
        os.link(self.below(source), self.below(target), follow_symlinks=False)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self.below(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self.below(path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self.below(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        os.chown(self.below(path), uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        os.utime(self.below(path), ns=times)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self.backing)
        free = found.f_bavail * found.f_frsize >> 21
        size = {"f_bsize": 2 << 20, "f_frsize": 2 << 20, "f_blocks": 2 * free}
        return {**size, "f_bfree": free, "f_bavail": free, "f_namemax": 255}

    # -- what 3FS has, and what it has not ----------------------------------------------------

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        if name != "hf3fs.lock" or not os.path.isdir(self.below(path)):
            raise fuse.FuseOSError(errno.ENOTSUP)
        if value not in (b"try_lock", b"preempt_lock", b"unlock", b"clear"):
            raise fuse.FuseOSError(errno.EINVAL)
        self.locks[path] = value
        return 0

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        raise fuse.FuseOSError(errno.ENODATA)

    def ioctl(self, path: str, cmd: int, arg: Any, fh: int, flags: int, data: Any) -> int:
        if cmd == MAGIC_REQUEST:
            ctypes.memmove(data, MAGIC_NUMBER.to_bytes(4, "little"), 4)
        elif cmd != FSYNC_REQUEST:
            raise fuse.FuseOSError(errno.EINVAL)
        return 0

    # -- files ----------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        """For reading and writing whatever was asked: rings do both by one descriptor."""
        kept = flags & (os.O_TRUNC | os.O_EXCL)
        return self._keep(os.open(self.below(path), kept | os.O_RDWR | os.O_NOFOLLOW))

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        return self._keep(os.open(self.below(path), flags, mode))

    def _keep(self, descriptor: int) -> int:
        with self.guard:
            self.opened.setdefault(os.fstat(descriptor).st_ino, []).append(descriptor)
        return descriptor

    def release(self, path: str, fh: int) -> int:
        number = os.fstat(fh).st_ino
        with self.guard:
            self.opened[number].remove(fh)
            if not self.opened[number]:
                del self.opened[number]
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self.faults.strike("write")
        if self.faults.active("dryrun"):
            return len(data)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self.below(path) if fh is None else fh, length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        return self._flushed("fsync", fh)

    def flush(self, path: str, fh: int) -> int:
        return self._flushed("flush", fh)

    def _flushed(self, fault: str, fh: int) -> int:
        number = self.faults.take(fault)
        if number is not None:
            os.ftruncate(fh, 0)  # the bytes are gone, and the next fsync knows of nothing
            raise fuse.FuseOSError(number)
        return 0


class Served(fuse.FUSE):  # type: ignore[misc]
    """What mfusepy leaves out: rename has flags, and 3FS takes none."""

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        return -errno.EINVAL if flags else int(super().rename_fuse_3(old, new, flags))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("backing", "mountpoint", "faults"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--chunk-bytes", type=int, default=1 << 20)
    given = parser.parse_args()
    mount = Mount(given.backing, Faults(given.faults), given.chunk_bytes)
    try:
        Served(
            mount,
            str(given.mountpoint),
            foreground=True,
            use_ino=True,
            hard_remove=True,
            attr_timeout=ATTRIBUTE_SECONDS,
            entry_timeout=ATTRIBUTE_SECONDS,
            negative_timeout=NEGATIVE_SECONDS,
            fsname=f"hf3fs.emulated-{uuid.uuid4().hex[:8]}",
            subtype="hf3fs",
        )
    finally:
        mount.submissions.unlink()


if __name__ == "__main__":
    assert Path(DEV_SHM).is_dir()
    main()
