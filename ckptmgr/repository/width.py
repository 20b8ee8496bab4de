"""How many calls a store is given at once: more as long as more are faster."""

from __future__ import annotations

AT_ONCE_MIN = 2
"""One pack is hashed while another is written. A single disk gains nothing from a third."""

AT_ONCE_MAX = 16
"""16 packs under way hide a whole second of latency at 1 GiB/s, and are a snapshot of 1 GiB. More
would only lengthen the queue in the store's client, which holds a part of each in memory."""

RISE_MIN = 1.15
"""Twice as many calls must bring at least this: the rate of a busy disk varies by a tenth."""

FALL_MIN = 0.95
"""Half as many calls are kept if they still bring this."""

ROUNDS_MIN, ROUNDS_MAX = 4, 64
"""Rounds between two tries: twice as many after each that brought nothing."""


class Width:
    """Climbs and descends by factors of two. Pure: it knows nothing but the rates it is told.

    `now` is the number of calls; a round is a measurement with that many under way.
    """

    def __init__(self, most: int = AT_ONCE_MAX) -> None:
        self.now = AT_ONCE_MIN
        self._most = most
        self._base = self.now
        self._base_rate = 0.0
        self._pause = ROUNDS_MIN
        self._left = 0
        self._upwards = True

    def saw(self, rate: float) -> None:
        """Learn the throughput of one round."""
        if self.now == self._base:
            self._base_rate = (self._base_rate + rate) / 2 if self._base_rate else rate
            self._left -= 1
            if self._left < 0:
                self._try()
            return
        is_better = rate >= self._base_rate * (RISE_MIN if self.now > self._base else FALL_MIN)
        if is_better:
            self._base, self._base_rate = self.now, rate
            self._pause = ROUNDS_MIN
            self._try()
        else:
            self.now = self._base
            self._left, self._pause = self._pause, min(2 * self._pause, ROUNDS_MAX)
            self._upwards = not self._upwards

    def unused(self) -> None:
        """So many were hardly ever under way: they are not needed, and can not be measured."""
        if self.now > self._base:
            self.now = self._base
            self._left = self._pause

    def _try(self) -> None:
        wanted = 2 * self._base if self._upwards else self._base // 2
        self.now = max(AT_ONCE_MIN, min(wanted, self._most))
        if self.now == self._base:  # at an end
            self._left = self._pause
            self._upwards = not self._upwards
