"""A token bucket: how long to wait so that bytes go no faster than a limit."""

from __future__ import annotations

import time
from collections.abc import Callable

BITS_PER_BYTE = 8
BITS_PER_GIGABIT = 1e9


def bytes_per_second(gbps: float) -> float:
    """Bytes per second of `gbps` gigabits (10^9 bits) per second: 8 Gbit/s are 1 GB/s."""
    return gbps * BITS_PER_GIGABIT / BITS_PER_BYTE


class Bucket:
    """Gives out the seconds of a link of `rate` bytes per second, one after the other.

    Whoever reserves first goes first. The bytes that begin within any t seconds are at most
    `rate` * t and one reservation more; a pause is not saved up for a burst.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        assert rate > 0
        self.rate = rate
        self._clock = clock
        self._free_at = clock()

    def reserve(self, nbytes: int) -> float:
        """Seconds to wait before `nbytes` may begin; they are given out, used or not."""
        now = self._clock()
        begins_at = max(self._free_at, now)
        self._free_at = begins_at + nbytes / self.rate
        return begins_at - now
