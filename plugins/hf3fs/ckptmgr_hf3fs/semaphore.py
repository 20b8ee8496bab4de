"""POSIX semaphores in shared memory: one that wakes the mount's daemon, one that wakes us."""

from __future__ import annotations

import ctypes
import errno
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sem_open.restype = ctypes.c_void_p
_libc.sem_open.argtypes = [ctypes.c_char_p, ctypes.c_int]
for _name in ("sem_post", "sem_close"):
    getattr(_libc, _name).argtypes = [ctypes.c_void_p]


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class NamedSemaphore:
    """A semaphore that another process made; `name` starts with a slash."""

    def __init__(self, name: str) -> None:
        self._pointer = _libc.sem_open(name.encode(), 0)
        if not self._pointer:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)

    def post(self) -> None:
        """Wake whoever waits."""
        _libc.sem_post(self._pointer)

    def close(self) -> None:
        """Unmap it; it lives on for others."""
        _libc.sem_close(self._pointer)


def wait_at(address: int, seconds: float) -> bool:
    """Wait at most so long for the semaphore at `address`; whether it was posted.

    By the monotonic clock: a clock that is set back must not make a wait longer.
    """
    until = time.monotonic() + seconds
    limit = _Timespec(int(until), int(until % 1 * 1e9))
    if _libc.sem_clockwait(ctypes.c_void_p(address), time.CLOCK_MONOTONIC, ctypes.byref(limit)):
        number = ctypes.get_errno()
        if number not in (errno.ETIMEDOUT, errno.EINTR):
            raise OSError(number, os.strerror(number), "sem_clockwait")
        return False
    return True
