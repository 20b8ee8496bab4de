"""Rings of 3FS's own library, `hf3fs_fuse`, where it is installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from hf3fs_fuse import io  # type: ignore[import-not-found]

from ckptmgr_hf3fs.client import Transfer
from ckptmgr_hf3fs.wire import FORBID_READ_HOLES


@dataclass(frozen=True, slots=True)
class _SharedFile:
    """What the library asks of `multiprocessing.shared_memory.SharedMemory`, which would delete
    the file of another process when this one ends.
    """

    name: str
    buf: memoryview


class NativeClient:
    """Makes rings by the library, for the mount whose virtual directory is `virtual`."""

    name = "hf3fs_fuse"

    def __init__(self, virtual: str) -> None:
        self._mount_point = os.path.dirname(virtual)

    def register(self, name: str, view: memoryview) -> NativeMemory:
        """As `Client.register`."""
        return NativeMemory(io.make_iovec(_SharedFile(name, view), self._mount_point))

    def ring(self, entries: int, *, for_read: bool) -> NativeRing:
        """As `Client.ring`."""
        flags = FORBID_READ_HOLES if for_read else 0
        made = io.make_ioring(self._mount_point, entries, for_read, 0, flags=flags)
        return NativeRing(made, entries, for_read=for_read)


class NativeMemory:
    """An iovec of the library, which takes it away from the daemon when it is forgotten."""

    def __init__(self, iovec: Any) -> None:
        self.iovec = iovec

    def close(self) -> None:
        """As `Registered.close`."""
        self.iovec = None


class NativeRing:
    """An ioring of the library. It registers each file while a transfer of it is in the ring."""

    def __init__(self, ring: Any, entries: int, *, for_read: bool) -> None:
        self.entries = entries
        self._ring = ring
        self._for_read = for_read
        self._in_flight: dict[int, tuple[_Token, int]] = {}
        self._users: dict[int, int] = {}

    def prepare(self, transfer: Transfer, token: int) -> None:
        """As `Ring.prepare`."""
        memory = transfer.memory
        assert isinstance(memory, NativeMemory)
        piece = memory.iovec[transfer.offset : transfer.offset + transfer.nbytes]
        # The library keeps a bare pointer to what it gives back: it must live as long.
        kept = _Token(token)
        self._use(transfer.descriptor)
        try:
            self._ring.prepare(
                piece, self._for_read, transfer.descriptor, transfer.file_offset, userdata=kept
            )
        except OSError:
            self._leave(transfer.descriptor)
            raise
        self._in_flight[token] = (kept, transfer.descriptor)

    def submit(self) -> None:
        """As `Ring.submit`."""
        self._ring.submit()

    def finished(self, seconds: float) -> list[tuple[int, int]]:
        """As `Ring.finished`."""
        done = self._ring.wait(
            max_results=self.entries, min_results=1, timeout=timedelta(seconds=seconds)
        )
        found = [(one.userdata.number, one.result) for one in done]
        for token, _ in found:
            _, descriptor = self._in_flight.pop(token)
            self._leave(descriptor)
        return found

    def close(self) -> None:
        """As `Ring.close`."""
        self._ring = None

    def _use(self, descriptor: int) -> None:
        if descriptor not in self._users:
            # A ring that was lost may have left this number registered for a file since closed.
            io.deregister_fd(descriptor)
            io.register_fd(descriptor)
        self._users[descriptor] = self._users.get(descriptor, 0) + 1

    def _leave(self, descriptor: int) -> None:
        """Deregister a file with its last transfer: it must be before it is closed."""
        self._users[descriptor] -= 1
        if not self._users[descriptor]:
            del self._users[descriptor]
            io.deregister_fd(descriptor)


@dataclass(frozen=True, slots=True)
class _Token:
    number: int
