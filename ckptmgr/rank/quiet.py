"""When the training thread is not writing: known from outside, while it does what it likes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Protocol

from ckptmgr.rank.pieces import Waited

LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 0.001, 0.05
"""Pause between two looks at the training thread: from a small operation to a long backward."""

SPINNING_SECONDS = 10.0
"""A thread that is awake for so long while the training thread sleeps works for somebody else."""


class Awaited(Waited, Protocol):
    """Knows, too, whether a thread waits for the copy that is not the one that trains."""

    awaited: bool


def wait_until_quiet(trainer: int, task: int, turn: Awaited) -> None:
    """Wait until every write that was under way when this was called has ended, and is counted.

    Args:
        trainer: the training thread, by Python's number.
        task: the same, by the kernel's.
        turn: tells that it has come to rest, or that another thread waits.
    """
    seen = _place(trainer)
    pause = LOOK_SECONDS_MIN
    sleep, since = _sleep(task), time.monotonic()
    alone_since = since
    while seen is not None and not turn.rests() and _place(trainer) == seen:
        before, sleep = sleep, _sleep(task)
        now = time.monotonic()
        if sleep is None or sleep != before:
            since = now
        elif turn.awaited:
            if now - since < SPINNING_SECONDS and _workers_awake():
                alone_since = now
            elif now - max(since, alone_since) >= LOOK_SECONDS_MAX:
                return
        turn.wait_for_rest(pause)
        pause = min(2 * pause, LOOK_SECONDS_MAX)


def _place(thread: int) -> tuple[FrameType, int] | None:
    """Where a thread is: its innermost Python frame and the instruction in it; None if it ended.

    Equal places may be two visits; different ones prove that the call in between has ended. What is
    below a `__torch_dispatch__` is part of the operation that was called outside of torch, which is
    counted when that has returned.
    """
    found = frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "__torch_dispatch__":
            found = _caller_of_torch(frame)
        frame = frame.f_back
    return None if found is None else (found, found.f_lasti)


def _caller_of_torch(frame: FrameType) -> FrameType:
    """The frame that called what led here through torch's own Python, which wraps a dispatch."""
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] != "torch":
            break
    return frame


def _sleep(task: int) -> int | None:
    """Which sleep a thread is in, by the kernel's count; None if it is awake, or ended."""
    try:
        told = Path(f"/proc/self/task/{task}/status").read_text(errors="replace")
    except OSError:
        return None
    facts = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    asleep = facts.get("State", "").split()[:1] == ["S"]
    return int(facts["voluntary_ctxt_switches"]) if asleep else None


def _workers_awake() -> bool:
    """Whether a thread of this process that Python does not know runs, or would: one of OpenMP may
    still be writing what the training thread waits for.
    """
    known = {thread.native_id for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) not in known:
            with contextlib.suppress(OSError):
                if (task / "stat").read_bytes().rpartition(b") ")[2][:1] in b"RD":
                    return True
    return False
