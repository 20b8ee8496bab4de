"""The mount: where its virtual directory is, how large a file really is, whether it still lives."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from contextlib import suppress

from ckptmgr.errors import StoreUnreachableError
from ckptmgr.store.mounts import Mount, mount_of, read_mounts
from ckptmgr.store.tree import Tree
from ckptmgr_hf3fs.wire import IOVS, SUBMIT_LINK

FILE_SYSTEM = "fuse.hf3fs"
VIRTUAL = "3fs-virt"

NEGATIVE_SECONDS = 5.0
"""How long a mount remembers that a name did not exist (its default for negative entries). Names
that exist are remembered for 30 s, and so are attributes: those of an object never change, but
while it is written here the mount may remember a size from before the rings had written."""

PULSE_SECONDS = 1.0
"""Least time between two looks whether the daemon lives; it costs the daemon one request."""

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_AT_STATX_FORCE_SYNC = 0x2000
_STATX_SIZE = 0x200
_STATX_BYTES = 256
_STATX_SIZE_AT = 40


def fresh_size(descriptor: int) -> int:
    """Size of an open file as the mount's daemon knows it, and not as the kernel remembers it."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
    if _libc.statx(descriptor, b"", flags, _STATX_SIZE, found) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "statx")
    return int.from_bytes(found.raw[_STATX_SIZE_AT : _STATX_SIZE_AT + 8], "little")


class MountedTree(Tree):
    """Directories below a root that lies on a 3FS mount, or else is not touched: the directory
    that an unmounted file system leaves behind holds no checkpoints, and must get none.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._devices: set[int] = set()

    def _root_descriptor(self, *, make: bool) -> int:
        """As `Tree`.

        Raises:
            StoreUnreachableError: the root is on no 3FS mount, now.
        """
        if not self._devices:
            self._check_mounted()
        try:
            descriptor = super()._root_descriptor(make=False)
        except FileNotFoundError:
            self._check_mounted()
            descriptor = super()._root_descriptor(make=make)
        if os.fstat(descriptor).st_dev not in self._devices:
            try:
                self._check_mounted()
            except StoreUnreachableError:
                os.close(descriptor)
                raise
        return descriptor

    def _check_mounted(self) -> None:
        mount = mount_of(self.root)
        if mount.kind != FILE_SYSTEM:
            self._devices = set()
            raise StoreUnreachableError(
                f"is not on a 3FS mount, but on {mount.point} ({mount.kind})",
                subject=self.root,
                hint="Mount 3FS there; saves resume by themselves.",
            )
        self._devices.add(_device_number(mount))


def virtual_directory(descriptor: int) -> str:
    """The directory of virtual files of the mount that an open file is on.

    In a container directories of one file system may be mounted apart from each other, the virtual
    one too.

    Raises:
        OSError: the mount shows none, or does not answer.
    """
    device = os.fstat(descriptor).st_dev
    for mount in read_mounts():
        if mount.kind == FILE_SYSTEM and _device_number(mount) == device:
            apart = os.path.basename(mount.point) == VIRTUAL
            point = mount.point if apart else os.path.join(mount.point, VIRTUAL)
            if os.path.lexists(os.path.join(point, IOVS, SUBMIT_LINK)):
                return point
    raise OSError(errno.ENOENT, "the mount shows no directory of rings")


def _device_number(mount: Mount) -> int:
    major, minor = mount.device.split(":")
    return os.makedev(int(major), int(minor))


class Pulse:
    """Whether the daemon that served `virtual` when this was made still serves it.

    Asked in a thread of its own, because to ask a daemon that hangs is to hang.
    """

    def __init__(self, virtual: str) -> None:
        self._link = os.path.join(virtual, IOVS, SUBMIT_LINK)
        self._target = os.readlink(self._link)
        self._asked = time.monotonic()
        self._asking: threading.Thread | None = None
        self._lost = ""

    def lost(self) -> str:
        """Why the daemon is known to be gone, or ''. Returns at once."""
        running = self._asking is not None and self._asking.is_alive()
        if not self._lost and not running and time.monotonic() - self._asked >= PULSE_SECONDS:
            self._asked = time.monotonic()
            self._asking = threading.Thread(target=self._ask, name="ckptmgr-pulse", daemon=True)
            self._asking.start()
        return self._lost

    def _ask(self) -> None:
        try:
            target = os.readlink(self._link)
        except OSError as error:
            self._lost = f"the daemon of the mount is gone ({error.strerror})"
            return
        if target != self._target:
            self._lost = "another daemon serves the mount"


_held: dict[str, tuple[int, int]] = {}
"""Path -> descriptor and device."""

_held_lock = threading.Lock()


def hold(virtual: str) -> None:
    """Keep the directory of registered memory open for the life of this process.

    Whenever a process closes it, and so when it dies, the daemon takes away all that the process
    has registered. So it is opened once for all stores of the process, and neither closed nor even
    listed. One of a mount that is gone is replaced.
    """
    path = os.path.join(virtual, IOVS)
    with _held_lock:
        device = os.stat(path).st_dev
        old, old_device = _held.get(path, (-1, -1))
        if device == old_device:
            return
        _held[path] = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), device
        if old >= 0:
            with suppress(OSError):
                os.close(old)
