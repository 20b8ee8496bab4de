"""The host buffer that a daemon lends to a rank: opened for writing, what is in it, its pages."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from ckptmgr.errors import HostBufferDamagedError, HostMemoryError
from ckptmgr.rank.latch import Latch
from ckptmgr.rank.pagelocks import PageLocks
from ckptmgr.staging.control import Attached
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.telling import tell
from ckptmgr.types import Snapshot

_POPULATE_PAUSE_SECONDS = 0.1


def left_in(buffer: HostBuffer) -> list[Snapshot]:
    """What a restore may read, newest first; of a damaged record the daemon tells."""
    found = []
    for slot in range(buffer.capacity.slots):
        with contextlib.suppress(HostBufferDamagedError):
            found.append(buffer.snapshot(slot))
    sealed = [snapshot for snapshot in found if snapshot is not None]
    return sorted(sealed, key=lambda one: one.generation, reverse=True)


def open_locked(attached: Attached) -> HostBuffer:
    """The buffer that the daemon lends, with this process as its writer.

    Raises:
        HostMemoryError: it has another one.
    """
    if attached.note:
        tell(attached.note, stacklevel=2)
    buffer = HostBuffer.open(Path(attached.path))
    if not buffer.lock_for_writing():
        buffer.close()
        raise HostMemoryError("has another writer", subject=attached.path)
    return buffer


class Pages:
    """The pages of a buffer. A thread faults them in, slot after slot, and locks them for a GPU in
    use, so that the first snapshot is fast too.

    A buffer with snapshots in it has its pages already. Until `restored` is set a restore may read
    them, and they are mapped for that only: to make them all writable meanwhile takes longer than
    the copy. And an attempt that `resumes` has something to restore, for which the daemon needs the
    cores.
    """

    def __init__(self, buffer: HostBuffer, restored: Latch, *, resumes: bool) -> None:
        self.locks = PageLocks()
        self._buffer, self._restored = buffer, restored
        self._stop = threading.Event()
        self._done = [threading.Event() for _ in range(buffer.capacity.slots)]
        self._error: HostMemoryError | None = None
        left = left_in(buffer)
        waits = resumes or bool(left)
        self._thread = threading.Thread(
            target=self._populate, args=(left, waits), name="ckptmgr populate", daemon=True
        )
        self._thread.start()

    def _populate(self, left: list[Snapshot], waits: bool) -> None:
        buffer, stop = self._buffer, self._stop
        try:
            for snapshot in left:
                buffer.map_to_read(snapshot, stop)
            while waits and not (self._restored.is_set or stop.is_set()):
                self._restored.wait(_POPULATE_PAUSE_SECONDS)
            for slot, done in enumerate(self._done):
                buffer.populate(slot, stop)
                if not stop.is_set():
                    self.locks.lock_ahead(buffer.data(slot))
                done.set()
        except HostMemoryError as error:
            self._error = error
        finally:
            for done in self._done:
                done.set()

    def wait(self, slot: int) -> None:
        """Wait until every page of a slot is there, and locked.

        Raises:
            HostMemoryError: there is not enough shared memory.
        """
        self._done[slot].wait()
        if self._error is not None:
            raise self._error
        self.locks.lock(self._buffer.data(slot))

    def close(self) -> None:
        """End that, and unlock them: the buffer may be closed then."""
        self._stop.set()
        self._thread.join()
        self.locks.release()
