"""EXPERIMENTAL: a ring client in Python alone, where 3FS's own library is not installed.

Written from the layout in wire.py, run against emulators only. It relies on the store order of
x86-64, and refuses other machines.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import uuid

from ckptmgr_hf3fs.client import Transfer
from ckptmgr_hf3fs.semaphore import NamedSemaphore, wait_at
from ckptmgr_hf3fs.shm import SHM, fresh_shm
from ckptmgr_hf3fs.wire import (
    ARGUMENTS,
    COMPLETION,
    CQE_HEAD,
    CQE_TAIL,
    FORBID_READ_HOLES,
    IOVS,
    SQE_HEAD,
    SQE_TAIL,
    SUBMISSION,
    SUBMIT_LINK,
    Layout,
    ring_name,
)


class OwnClient:
    """Registers by links below `virtual`, the mount's 3fs-virt directory."""

    name = "python (experimental)"

    def __init__(self, virtual: str) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise OSError(errno.ENOTSUP, "the ring client in Python needs x86-64")
        self._iovs = os.path.join(virtual, IOVS)

    def register(self, name: str, view: memoryview) -> OwnMemory:
        """As `Client.register`. The length is the file's own."""
        del view
        return OwnMemory(self._iovs, name)

    def ring(self, entries: int, *, for_read: bool) -> OwnRing:
        """As `Client.ring`."""
        return OwnRing(self._iovs, entries, for_read=for_read)


class OwnMemory:
    """A link in the directory of registered memory; the daemon maps what it names."""

    def __init__(self, iovs: str, name: str) -> None:
        identity = uuid.uuid4()
        self.identity = identity.bytes
        self._link = os.path.join(iovs, str(identity))
        os.symlink(os.path.join(SHM, name), self._link)

    def close(self) -> None:
        """As `Registered.close`."""
        os.unlink(self._link)


class OwnRing:
    """The client's side of the protocol in wire.py.

    A slot of the arguments belongs to the client until its submission is published by moving
    sqe_head, and again from when its completion was read. So a slot is never written while the
    daemon reads it, however the numbers wrap.
    """

    def __init__(self, iovs: str, entries: int, *, for_read: bool) -> None:
        self.entries = entries
        self._submit = NamedSemaphore(_semaphore_name(os.readlink(os.path.join(iovs, SUBMIT_LINK))))
        self._layout = layout = Layout(entries)
        self._free = list(range(entries))
        with fresh_shm(layout.nbytes) as (name, memory):
            self._memory = memory
            flags = FORBID_READ_HOLES if for_read else 0
            link = ring_name(uuid.uuid4(), for_read=for_read, flags=flags)
            self._link = os.path.join(iovs, link)
            os.symlink(os.path.join(SHM, name), self._link)
        self._marks = memoryview(memory)[:16].cast("i")
        self._anchor = ctypes.c_char.from_buffer(memory, layout.semaphore)  # keeps it mapped

    def prepare(self, transfer: Transfer, token: int) -> None:
        """As `Ring.prepare`."""
        head = self._marks[SQE_HEAD]
        after = (head + 1) % self._layout.slots
        if not self._free or after == self._marks[SQE_TAIL]:
            raise BlockingIOError(errno.EAGAIN, "the ring is full")
        slot = self._free.pop()
        memory = transfer.memory
        assert isinstance(memory, OwnMemory)
        ARGUMENTS.pack_into(
            self._memory,
            self._layout.arguments + ARGUMENTS.size * slot,
            memory.identity,
            transfer.offset,
            os.fstat(transfer.descriptor).st_ino,
            transfer.file_offset,
            transfer.nbytes,
            token,
        )
        at = self._layout.submissions + SUBMISSION.size * head
        SUBMISSION.pack_into(self._memory, at, slot, token)
        self._marks[SQE_HEAD] = after  # publishes the two writes above (x86-64 keeps their order)

    def submit(self) -> None:
        """As `Ring.submit`."""
        self._submit.post()

    def finished(self, seconds: float) -> list[tuple[int, int]]:
        """As `Ring.finished`."""
        found = self._completions()
        if not found and wait_at(ctypes.addressof(self._anchor), seconds):
            found = self._completions()
        if found:
            self._submit.post()  # there is room for completions again: the daemon may wait for it
        return found

    def _completions(self) -> list[tuple[int, int]]:
        head, tail = self._marks[CQE_HEAD], self._marks[CQE_TAIL]
        found = []
        while tail != head:
            at = self._layout.completions + COMPLETION.size * tail
            slot, _, result, token = COMPLETION.unpack_from(self._memory, at)
            self._free.append(slot)
            found.append((token, result))
            tail = (tail + 1) % self._layout.slots
        self._marks[CQE_TAIL] = tail
        return found

    def close(self) -> None:
        """As `Ring.close`."""
        os.unlink(self._link)
        self._submit.close()


def _semaphore_name(target: str) -> str:
    """'/x' of '/dev/shm/sem.x', which is how sem_open wants it.

    Raises:
        OSError: the mount names something else.
    """
    directory, name = os.path.split(target)
    if directory != SHM or not name.startswith("sem."):
        raise OSError(errno.EPROTO, "the mount names no semaphore", target)
    return "/" + name.removeprefix("sem.")
