"""What a store and a codec give, measured over bytes, so that one slow call does not decide."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

from ckptmgr.config import MIB

BLOCK_BYTES = 128 * MIB
"""Least bytes of one measurement: two packs, 0.1 s of a fast disk. Shorter ones are noise."""

BLOCKS = 5
"""A rate is the median of so many measurements: two that a hiccup spoiled change nothing, and a
store that has changed for good is known after three, 384 MiB."""

RATIO_HALF_BYTES = 1024 * MIB
"""The past of a ratio counts half after so many bytes: weights and optimizer state alternate."""


class Meter:
    """The rate of something that several calls share: bytes over the time in which any ran.

    The rate of one call says little: two that share a link have half of it each.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.running = 0
        self._since = 0.0
        self._blocks: deque[float] = deque(maxlen=BLOCKS)
        self._open_block()

    def _open_block(self) -> None:
        self._bytes, self._seconds, self._calls, self._most = 0, 0.0, 0, self.running

    def begin(self) -> None:
        """A call begins."""
        if not self.running:
            self._since = self._clock()
        self.running += 1
        self._most = max(self._most, self.running)

    def end(self, nbytes: int) -> None:
        """A call has moved `nbytes`."""
        now = self._clock()
        self._seconds += now - self._since
        self._bytes += nbytes
        self._calls += 1
        self.running -= 1
        self._since = now
        # Calls that share a link tend to end together: a block has all of such a group.
        if self._bytes >= BLOCK_BYTES and self._calls >= self._most and self._seconds > 0:
            self._blocks.append(self._bytes / self._seconds)
            self._open_block()

    def drop(self) -> None:
        """A call failed; its time says nothing."""
        self.running -= 1
        self._since = self._clock()

    @property
    def rate(self) -> float:
        """Bytes per second, or 0 where nothing is known."""
        if self._blocks:
            return statistics.median(self._blocks)
        return self._bytes / self._seconds if self._seconds > 0 else 0.0


class Ratio:
    """A quotient of sums whose past fades with what is added to its upper one."""

    def __init__(self, half: float = RATIO_HALF_BYTES) -> None:
        self._half = half
        self._above = self._below = 0.0

    def saw(self, above: float, below: float) -> None:
        """Add one observation."""
        keep = 0.5 ** (above / self._half)
        self._above = self._above * keep + above
        self._below = self._below * keep + below

    @property
    def value(self) -> float:
        """The quotient, or 0 where nothing is known."""
        return self._above / self._below if self._below > 0 else 0.0
