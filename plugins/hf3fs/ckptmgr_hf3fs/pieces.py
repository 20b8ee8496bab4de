"""What is to be moved, cut into transfers: from shared memory where it lies, else through rooms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ckptmgr.store.base import Buffers
from ckptmgr.types import PAGE_BYTES
from ckptmgr_hf3fs.client import Registered, Transfer
from ckptmgr_hf3fs.regions import Rooms

Find = Callable[[memoryview], tuple[Registered, int] | None]
"""Where in registered memory a view lies; None if it does not."""

Moves = tuple[Iterator[Transfer | None], Callable[[Transfer], None]]


class Writing:
    """Transfers that write `buffers` into a file from its first byte on.

    A transfer never goes past a multiple of the piece size in the file. `copied_bytes` counts what
    went through a room.
    """

    def __init__(
        self, descriptor: int, buffers: Buffers, rooms: Rooms, find: Find, subject: str
    ) -> None:
        self._descriptor = descriptor
        self._subject = subject
        self._buffers = buffers
        self._rooms = rooms
        self._find = find
        self._at = 0
        self._room: int | None = None
        self._filled = 0
        self.copied_bytes = 0

    def transfers(self) -> Iterator[Transfer | None]:
        """The transfers in the order of the file; None while every room is in use."""
        for view in self._buffers:
            # A view of less than a page gains nothing, and there may be thousands.
            found = self._find(view) if len(view) >= PAGE_BYTES else None
            if found is None:
                yield from self._through_rooms(view)
            else:
                yield from self._flush()
                yield from self._straight(*found, len(view))
        yield from self._flush()

    def finished(self, transfer: Transfer) -> None:
        """Take note of a transfer that is done: its room is free again."""
        if transfer.memory is self._rooms.memory:
            self._rooms.give(transfer.offset)

    def _left_in_piece(self) -> int:
        return self._rooms.room_bytes - self._at % self._rooms.room_bytes

    def _straight(self, memory: Registered, offset: int, nbytes: int) -> Iterator[Transfer]:
        end = offset + nbytes
        while offset < end:
            length = min(self._left_in_piece(), end - offset)
            yield Transfer(memory, offset, self._descriptor, self._at, length, self._subject)
            offset += length
            self._at += length

    def _through_rooms(self, view: memoryview) -> Iterator[Transfer | None]:
        rest = view
        while len(rest):
            while self._room is None:
                self._room, self._filled = self._rooms.take(), 0
                if self._room is None:
                    yield None
            length = min(self._left_in_piece(), len(rest))
            start = self._room + self._filled
            self._rooms.view[start : start + length] = rest[:length]
            self.copied_bytes += length
            self._filled += length
            self._at += length
            rest = rest[length:]
            if self._at % self._rooms.room_bytes == 0:
                yield from self._flush()

    def _flush(self) -> Iterator[Transfer]:
        if self._room is not None and self._filled:
            start = self._at - self._filled
            yield Transfer(
                self._rooms.memory,
                self._room,
                self._descriptor,
                start,
                self._filled,
                self._subject,
            )
            self._room, self._filled = None, 0


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of an open file, and where they are wanted."""

    descriptor: int
    offset: int
    into: memoryview
    subject: str


class Reading:
    """Transfers that read `ranges`, each through a room: so that what the daemon still writes when
    a caller has given up is a room, and never memory that its owner uses for something else.
    """

    def __init__(
        self,
        ranges: Sequence[Range],
        rooms: Rooms,
        deliver: Callable[[memoryview, memoryview], None],
    ) -> None:
        self._ranges = ranges
        self._rooms = rooms
        self._deliver = deliver
        self._targets: dict[int, memoryview] = {}

    def transfers(self) -> Iterator[Transfer | None]:
        """The transfers, range by range; None while every room is in use."""
        for wanted in self._ranges:
            done = 0
            while done < len(wanted.into):
                room = self._rooms.take()
                if room is None:
                    yield None
                    continue
                at = wanted.offset + done
                length = min(
                    self._rooms.room_bytes - at % self._rooms.room_bytes, len(wanted.into) - done
                )
                self._targets[room] = wanted.into[done : done + length]
                yield Transfer(
                    self._rooms.memory, room, wanted.descriptor, at, length, wanted.subject
                )
                done += length

    def finished(self, transfer: Transfer) -> None:
        """Bring what was read to where it is wanted."""
        start = transfer.offset
        try:
            target = self._targets.pop(start)
            self._deliver(self._rooms.view[start : start + transfer.nbytes], target)
        finally:
            self._rooms.give(start)
