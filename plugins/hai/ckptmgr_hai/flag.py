"""The suspend flag: one byte of System V shared memory on the node of rank 0, read by ctypes.

The platform's helper writes b'1' there and, when its patience is over, b'0'. Neither hfai nor
sysv_ipc is needed to see it.
"""

from __future__ import annotations

import ctypes
import errno
import os

FLAG_KEY = 7123378543
"""What the platform calls the segment; a key_t has 32 bits of it (0xa896216f)."""

_FAILED = ctypes.c_void_p(-1).value
_SHM_RDONLY = 0o10000


class Flag:
    """The byte of one node; a segment that does not exist yet may come."""

    def __init__(self, key: int = FLAG_KEY) -> None:
        self._key = ctypes.c_int32(key & 0xFFFFFFFF).value
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.shmat.restype = ctypes.c_void_p
        self._libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        self._libc.shmdt.argtypes = [ctypes.c_void_p]

    def is_set(self) -> bool:
        """Whether the platform wants this job to end; False where there is no flag.

        The segment is attached for each look: a helper that is started again makes a new one.

        Raises:
            OSError: it is there and can not be read.
        """
        segment = self._libc.shmget(self._key, 0, 0)
        if segment < 0:
            return self._none("shmget")
        address = self._libc.shmat(segment, None, _SHM_RDONLY)
        if address == _FAILED:
            return self._none("shmat")
        try:
            return ctypes.string_at(address, 1) == b"1"
        finally:
            self._libc.shmdt(address)

    def _none(self, call: str) -> bool:
        number = ctypes.get_errno()
        # EINVAL, EIDRM: it was removed between the two calls.
        if number in (errno.ENOENT, errno.EINVAL, errno.EIDRM):
            return False
        raise OSError(number, f"{call}: {os.strerror(number)}")
