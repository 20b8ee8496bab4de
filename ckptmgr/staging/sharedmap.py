"""A shared file mapping that can be populated without the GIL, and a full memory barrier."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading

from ckptmgr.errors import HostMemoryError

POPULATE_PIECE_BYTES = 32 << 20
"""Populated per call, so that a stop is heard within about 30 ms."""

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # Linux 5.14
_MADV_HUGEPAGE = 14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_barrier_lock = threading.Lock()


def memory_barrier() -> None:
    """Order all memory accesses before this call before all accesses after it.

    CPython's lock is a semaphore (or futex word): acquire is a read-modify-write with acquire
    order and release one with release order, and acquire cannot pass an earlier release. Two
    pairs in a row therefore form a full barrier on aarch64; x86 needs none for plain stores, but
    the locked instruction is one as well. About 0.1 us.
    """
    with _barrier_lock:
        pass
    with _barrier_lock:
        pass


class SharedMap:
    """`length` bytes of file `fd`, mapped shared and writable; `view` is the memory."""

    def __init__(self, fd: int, length: int) -> None:
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._fd = fd
        self._length = length
        self.view = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(anchor)
        del anchor
        # Only advice: most systems do not allow huge pages on tmpfs.
        _libc.madvise(self._address, length, _MADV_HUGEPAGE)

    def populate(
        self, start: int, end: int, stop: threading.Event | None = None, *, to_read: bool = False
    ) -> None:
        """Make the pages from `start` to `end` present and writable; ends early on `stop`.

        With `to_read` those that exist are mapped, 16 at a time, and need not be writable.

        The call is made through ctypes because it releases the GIL and `mmap.madvise` does not.
        """
        advice = _MADV_POPULATE_READ if to_read else _MADV_POPULATE_WRITE
        at = start
        while at < end and not (stop is not None and stop.is_set()):
            piece = min(POPULATE_PIECE_BYTES, end - at)
            if _libc.madvise(self._address + at, piece, advice) != 0:
                self._populate_failed(ctypes.get_errno())
                return
            at += piece

    def _populate_failed(self, number: int) -> None:
        if number == errno.EINVAL:  # an older kernel: reserve the pages, they fault in when used
            try:
                os.posix_fallocate(self._fd, 0, self._length)
            except OSError as error:
                number = error.errno or errno.ENOSPC
            else:
                return
        raise HostMemoryError(
            f"shared memory can not be populated: {os.strerror(number)}",
            hint="Enlarge /dev/shm or raise the memory limit of the job's cgroup.",
        )

    def close(self) -> None:
        """Unmap; where a view of the memory is still in use, the memory goes with that view."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
