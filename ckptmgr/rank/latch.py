"""A flag that one thread sets and another waits for, whatever signals do to either."""

from __future__ import annotations

import contextlib
import queue


class Latch:
    """What threading.Event is, for a thread that signals may interrupt at every instruction.

    An Event takes its lock in Python code: an exception in the middle of that leaves the lock
    taken, and the other thread waits for ever. Here a flag is the truth and the queue, which is C,
    only wakes; a wake-up may get lost, so that every wait has a bound and is repeated.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    def set(self) -> None:
        """Let everyone who waits go on."""
        self.is_set = True
        self._bell.put(None)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait; whether it was set. It may return early."""
        if not self.is_set:
            with contextlib.suppress(queue.Empty):
                self._bell.get(timeout=timeout_seconds)
                self._bell.put(None)  # for the next who waits
        return self.is_set
