"""Keeps the platform's log watchdog content while nothing else is logged: a long restore."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WATCHDOG_SECONDS = 1800.0
"""Without a line in the log for so long the platform fails all pods, or for HF_WATCHDOG_TIME."""

LINES_PER_WATCHDOG = 6
"""So that a node that is slow to write does not miss one."""


@contextmanager
def awake(doing: str = "restoring", seconds: float | None = None) -> Iterator[None]:
    """Write a line now and then, every `seconds` (default: a sixth of what the watchdog allows)."""
    if seconds is None:
        given = os.environ.get("HF_WATCHDOG_TIME", "")
        allowed = float(given) if given.isdecimal() and int(given) else WATCHDOG_SECONDS
        seconds = allowed / LINES_PER_WATCHDOG
    over = threading.Event()

    def write() -> None:
        while not over.wait(seconds):
            sys.stdout.write(f"ckptmgr: {doing}\n")
            sys.stdout.flush()

    thread = threading.Thread(target=write, name="ckptmgr watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
