"""Registered memory: rooms of our own that bytes pass through, and memory that others share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ckptmgr.config import MIB
from ckptmgr.store.posix import address
from ckptmgr_hf3fs.client import Client, Registered
from ckptmgr_hf3fs.shm import fresh_shm, linked_shm

ROOMS_BYTES = 16 * MIB
"""Memory of one ring's rooms: four of the largest, so that one is copied while others move."""

PIECE_BYTES_MAX = 4 * MIB
"""Most bytes of one transfer; the storage client takes 4 MB at a time from its batches."""

_PIECE_BYTES_MIN = 1 * MIB


def piece_bytes(chunk_bytes: int) -> int:
    """Unit at whose multiples a file is cut into transfers, for a file in chunks of `chunk_bytes`.

    Whole chunks, as large as is of use: a part of a chunk costs the storage a copy of it. Chunk
    sizes are powers of two, so a piece that is smaller than a chunk lies within one.
    """
    return min(max(chunk_bytes, _PIECE_BYTES_MIN), PIECE_BYTES_MAX)


class Rooms:
    """Rooms of equal size in memory of our own. For one thread at a time."""

    def __init__(self, client: Client, room_bytes: int) -> None:
        with fresh_shm(ROOMS_BYTES) as (name, memory):
            self.view = memoryview(memory)
            self.memory = client.register(name, self.view)
        self.room_bytes = room_bytes
        self._free: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Every room is free again, whoever took it: nothing is reading or writing any."""
        self._free = list(range(0, ROOMS_BYTES, self.room_bytes))

    def take(self) -> int | None:
        """Offset of a room, which is the caller's until `give`; None if all are taken."""
        return self._free.pop() if self._free else None

    def give(self, offset: int) -> None:
        """Give a room back; nothing may be reading or writing it any more."""
        self._free.append(offset)


@dataclass(slots=True)
class Shared:
    """Memory that its owner shares, and its registration with the present session."""

    owner: memoryview
    view: memoryview
    start: int
    nbytes: int
    path: str
    registered: Registered | None = None
    refused: str = ""


class SharedMemory:
    """All that is shared with a store. Methods may be called by any thread."""

    def __init__(self) -> None:
        self._shared: dict[int, Shared] = {}
        self._lock = threading.Lock()
        self._registering = threading.Lock()

    def add(self, memory: memoryview, path: str) -> None:
        """Keep a view, so that no other memory can take its address before `remove`."""
        view = memory[:]
        with self._lock:
            self._shared[id(memory)] = Shared(memory, view, address(view), len(view), path)

    def remove(self, memory: memoryview) -> Registered | None:
        """Let go of it; its registration is left to the caller, because to end it may hang."""
        with self._lock:
            shared = self._shared.pop(id(memory), None)
        if shared is None:
            return None
        shared.view.release()
        return shared.registered

    def find(self, view: memoryview, client: Client) -> tuple[Registered, int] | None:
        """The registered memory that `view` lies in, and where; registers it when first needed."""
        at = address(view)
        with self._lock:
            for shared in self._shared.values():
                offset = at - shared.start
                if offset >= 0 and offset + len(view) <= shared.nbytes:
                    break
            else:
                return None
        with self._registering:  # not the other lock: the daemon may hang, `add` must not
            registered = self._register(shared, client)
        return (registered, offset) if registered is not None else None

    def _register(self, shared: Shared, client: Client) -> Registered | None:
        if shared.registered is None and not shared.refused:
            try:
                with linked_shm(shared.path) as name:
                    shared.registered = client.register(name, shared.view)
            except (OSError, ValueError) as error:
                # It is not in /dev/shm, or let go of meanwhile, or the daemon refuses it: copied.
                shared.refused = str(error)
        return shared.registered

    def forget(self) -> list[Registered]:
        """All registrations, which are of a session that is over; the next one makes new ones."""
        with self._lock:
            found = [shared.registered for shared in self._shared.values()]
            for shared in self._shared.values():
                shared.registered, shared.refused = None, ""
        return [registered for registered in found if registered is not None]


def close_quietly(registered: Sequence[Registered]) -> None:
    """End registrations of a mount that may be gone."""
    for one in registered:
        with suppress(OSError):
            one.close()
