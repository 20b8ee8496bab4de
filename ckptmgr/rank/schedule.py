"""Which steps are snapshotted. Pure: time and slots come in as arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptmgr.errors import UsageError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_EVERY = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")


@dataclass(frozen=True, slots=True)
class Every:
    """A cadence: every `steps` steps, or every `seconds` seconds; both zero means never."""

    steps: int = 0
    seconds: float = 0.0


def parse_every(every: int | str | None) -> Every:
    """Read `100` (steps), `"90s"`, `"5m"`, `"1h"` or None (only explicit saves).

    Raises:
        UsageError: something else, or not positive.
    """
    if every is None:
        return Every()
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return Every(steps=every)
    match = _EVERY.fullmatch(every) if isinstance(every, str) else None
    if match is None or float(match[1]) <= 0:
        raise UsageError(
            f"{every!r} is not a cadence",
            subject="every",
            hint='Write a number of steps (100) or a time ("90s", "5m", "1h").',
        )
    return Every(seconds=float(match[1]) * _UNITS[match[2]])


@dataclass(slots=True)
class Cadence:
    """Tells when a snapshot is due.

    One that could not be taken is made up for at the next multiple of `steps`, so that the steps
    in the store are the promised ones, or at the next call where the cadence is a time.
    """

    every: Every
    last_at: float

    def due(self, step: int, now: float) -> bool:
        """Whether `step` is to be snapshotted; `now` is monotonic seconds."""
        if self.every.steps:
            return step % self.every.steps == 0
        return self.every.seconds > 0 and now - self.last_at >= self.every.seconds

    def taken(self, now: float) -> None:
        """A snapshot was taken at `now`."""
        self.last_at = now


@dataclass(slots=True)
class Patience:
    """Tells a slow store from a dead one by the bytes that arrive in it."""

    seconds: float
    seen_bytes: int = 0
    since: float = 0.0

    def exhausted(self, progress_bytes: int, now: float) -> bool:
        """Whether nothing has arrived for `seconds`; the first call only starts to watch."""
        if progress_bytes != self.seen_bytes or self.since == 0.0:
            self.seen_bytes, self.since = progress_bytes, now
        return now - self.since >= self.seconds
