"""What a ring client is: memory that is registered with a mount, and rings that move bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol


class Registered(Protocol):
    """Shared memory that the mount's daemon has mapped and given to its network card."""

    def close(self) -> None:
        """Take it away from the daemon; what it has begun with it, it ends."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """`nbytes` between `offset` of registered memory and `file_offset` of an open file."""

    memory: Registered
    offset: int
    descriptor: int
    file_offset: int
    nbytes: int
    subject: str

    def rest(self, done: int) -> Transfer:
        """What is left of it behind its first `done` bytes."""
        return replace(
            self,
            offset=self.offset + done,
            file_offset=self.file_offset + done,
            nbytes=self.nbytes - done,
        )


class Ring(Protocol):
    """Transfers in one direction. One thread at a time uses a ring."""

    entries: int

    def prepare(self, transfer: Transfer, token: int) -> None:
        """Put a transfer into the ring; from now on the daemon may carry it out.

        Raises:
            BlockingIOError: the ring is full.
        """

    def submit(self) -> None:
        """Wake the daemon."""

    def finished(self, seconds: float) -> list[tuple[int, int]]:
        """(token, bytes or -errno) of what is done, in any order; waits so long for a first one."""

    def close(self) -> None:
        """Take the ring away from the daemon."""


class Client(Protocol):
    """Makes both, on one mount."""

    name: str

    def register(self, name: str, view: memoryview) -> Registered:
        """Register the file /dev/shm/`name`, which `view` maps from its first byte on. The name
        can be removed afterwards.
        """

    def ring(self, entries: int, *, for_read: bool) -> Ring:
        """A new ring; one for reading answers a hole with ENODATA."""
