"""What a job asks of store and host: the size of its state, how often, and in how many slots."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptmgr.config import DEFAULT_SLOTS, GIB
from ckptmgr.errors import UsageError
from ckptmgr.present import size

_TIME = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Load:
    """`state_bytes` is what all ranks of this host save at a step; 0 where nobody knows."""

    state_bytes: int = 0
    every_seconds: float = 300.0
    slots: int = DEFAULT_SLOTS

    @property
    def memory_bytes(self) -> int:
        """Host memory that the snapshots of this host need."""
        return self.slots * self.state_bytes


def load_of(state_gib: float, every: str) -> Load:
    """The load that the options of a command describe.

    Raises:
        UsageError: a negative size, or no time.
    """
    if not 0 <= state_gib < 1 << 20:
        raise UsageError(f"{state_gib} is not a size in GiB", subject="--state-gib")
    return Load(int(state_gib * GIB), seconds_of(every))


def seconds_of(every: str) -> float:
    """Seconds of `90s`, `5m` or `1h`.

    Raises:
        UsageError: something else.
    """
    match = _TIME.fullmatch(every)
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"{every!r} is not a time", subject="--every", hint="Write 90s, 5m or 1h.")
    return float(match[1]) * _SECONDS[match[2]]


def rate(bytes_per_second: float) -> str:
    """Bytes per second for people."""
    return f"{size(bytes_per_second)}/s"
