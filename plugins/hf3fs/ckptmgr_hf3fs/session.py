"""Rings, and what is registered for them, for one life of the mount's daemon."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from ckptmgr.errors import StoreUnreachableError
from ckptmgr_hf3fs.carry import PATIENCE_SECONDS, Carrier, RingsLostError
from ckptmgr_hf3fs.client import Client, Ring, Transfer
from ckptmgr_hf3fs.mount import Pulse, hold
from ckptmgr_hf3fs.regions import Rooms, close_quietly, piece_bytes
from ckptmgr_hf3fs.shm import sweep_shm

RINGS = 4
"""Rings in each direction, made when needed: a ring belongs to one call at a time, and every pack
in flight is a file of its own."""

ENTRIES = 64
"""Entries of a ring: 256 MiB in the largest pieces."""


@dataclass(frozen=True, slots=True)
class Lane:
    """A ring with rooms of its own."""

    ring: Ring
    rooms: Rooms


class Session:
    """What is registered with the daemon that serves `virtual` now. Ends when that is lost.

    Errors of making one are OSError: the mount has no rings, or the machine has none to give.
    """

    def __init__(
        self,
        virtual: str,
        client: Client,
        chunk_bytes: int,
        *,
        entries: int = ENTRIES,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        hold(virtual)
        sweep_shm()
        self.client = client
        self.piece_bytes = piece_bytes(chunk_bytes)
        self._entries = entries
        self._patience_seconds = patience_seconds
        self._pulse = Pulse(virtual)
        self._made = {True: 0, False: 0}
        self._lock = threading.Lock()
        self._lost = ""
        self._given_up: list[Lane] = []
        self._closed = False
        self._idle: dict[bool, queue.LifoQueue[Lane]] = {
            for_read: queue.LifoQueue() for for_read in (True, False)
        }
        try:  # a mount that refuses is met here, and not amid a save
            for for_read, lanes in self._idle.items():
                lanes.put(self._new_lane(for_read=for_read))
        except OSError:
            self.close()
            raise

    @property
    def lost(self) -> str:
        """Why nothing of this session is to be used any more, or ''."""
        return self._lost

    def run(
        self,
        *,
        for_read: bool,
        work: Callable[[Rooms], tuple[Iterator[Transfer | None], Callable[[Transfer], None]]],
        check: Callable[[], None],
    ) -> None:
        """Carry out `work` over a free ring: given its rooms, it returns the transfers and what is
        to be done when one of them has finished.

        Raises:
            RingsLostError: the session is over.
            StoreError: a transfer failed.
        """
        lane = self._free_lane(for_read=for_read)
        transfers, finished = work(lane.rooms)
        carrier = Carrier(
            lane.ring, transfers, finished, self._pulse.lost, check, self._patience_seconds
        )
        try:
            carrier.run()
        except RingsLostError as error:
            self._lost = error.message
            raise
        finally:
            if carrier.idle:
                lane.rooms.reset()  # a failure may have left some taken
                self._idle[for_read].put(lane)
            else:  # its memory may still be read or written: nobody uses it again
                self._lost = self._lost or "a ring was given up with transfers in it"
                self._given_up.append(lane)
            if self._closed:
                threading.Thread(target=self.close, daemon=True).start()

    def _free_lane(self, *, for_read: bool) -> Lane:
        with self._lock, suppress(queue.Empty):
            return self._idle[for_read].get_nowait()
        with self._lock:
            if self._made[for_read] < RINGS:
                try:
                    return self._new_lane(for_read=for_read)
                except OSError:
                    # No memory for one more, or the mount grants no more: the others do.
                    if not self._made[for_read]:
                        raise
        try:
            return self._idle[for_read].get(timeout=self._patience_seconds)
        except queue.Empty:
            raise StoreUnreachableError("no ring became free in time") from None

    def _new_lane(self, *, for_read: bool) -> Lane:
        rooms = Rooms(self.client, self.piece_bytes)
        try:
            lane = Lane(self.client.ring(self._entries, for_read=for_read), rooms)
        except OSError:
            close_quietly([rooms.memory])
            raise
        self._made[for_read] += 1
        return lane

    def close(self) -> None:
        """Take away from the daemon what no call uses; the rest goes with this process. A daemon
        that is amid a transfer ends it in its own mapping of the memory.
        """
        self._closed = True
        for lanes in self._idle.values():
            with suppress(queue.Empty):
                while True:
                    _close(lanes.get_nowait())
        while self._given_up:
            _close(self._given_up.pop())


def _close(lane: Lane) -> None:
    with suppress(OSError):
        lane.ring.close()
    close_quietly([lane.rooms.memory])
