"""How far training came: words that a trainer stores at each step, and that survive it."""

from __future__ import annotations

import time

from ckptmgr.types import PAGE_BYTES, Reach

_AT = (PAGE_BYTES + 2048) // 8
"""In the daemon's page, behind its own words (docs/format.md section 1)."""


def reach(memory: memoryview, attempt: int, step: int) -> None:
    """Tell how far training has come, in the memory of a host buffer; costs a microsecond."""
    words, times, now = memory.cast("Q"), memory.cast("d"), time.time()
    if words[_AT] != attempt:
        words[_AT] = 0
        words[_AT + 1], times[_AT + 2] = step, now
        words[_AT + 3], times[_AT + 4] = step, now
        words[_AT] = attempt
        return
    words[_AT + 3], times[_AT + 4] = step, now


def reached(memory: memoryview) -> Reach | None:
    """How far the last trainer that told of a step has come; None if none has."""
    words, times = memory.cast("Q"), memory.cast("d")
    if not words[_AT]:
        return None
    told = words[_AT], words[_AT + 1], times[_AT + 2], words[_AT + 3], times[_AT + 4]
    return Reach(*told)
