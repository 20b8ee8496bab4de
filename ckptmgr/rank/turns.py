"""Threads take turns, in the order in which they come, and each waits as long as it wants to."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ckptmgr.errors import UsageError

_LOOK_SECONDS = 0.01
"""How often a thread that waits looks whether it is its turn: what it waits for takes longer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """A place in the line."""

    thread: int


class Turns:
    """What is used by one thread at a time.

    A lock that is waited for with a bound is taken by a call, and an exception out of a signal
    handler right after that call leaves it taken for ever. A turn begins within the `try` that
    ends it, and both ends are one call of C. A forked child never has one: what it would use is its
    parent's.
    """

    def __init__(self) -> None:
        self._line: deque[_Turn] = deque()
        self._process = os.getpid()

    @property
    def is_taken(self) -> bool:
        """Whether some thread has its turn."""
        return bool(self._line)

    @property
    def is_ours(self) -> bool:
        """Whether this thread has its turn, or waits for it: a signal handler has interrupted it
        then, and must not wait for it.
        """
        me = threading.get_ident()
        return any(turn.thread == me for turn in tuple(self._line))

    def take(self, do: Callable[[], T], seconds_max: float) -> T:
        """Do it in this thread's turn, which must not be waited for by a thread that has it.

        Raises:
            UsageError: this process is a forked child.
            TimeoutError: others have not ended theirs within `seconds_max`; nothing was done.
            Exception: what `do` raises.
        """
        if os.getpid() != self._process:
            hint = "Ask in the process that entered the block."
            raise UsageError("is asked by a forked child", subject="daemon", hint=hint)
        end = time.monotonic() + seconds_max
        turn = _Turn(threading.get_ident())
        try:
            self._line.append(turn)
            while self._line[0] is not turn:
                if time.monotonic() >= end:
                    raise TimeoutError
                threading.Event().wait(_LOOK_SECONDS)
            found = do()
        finally:
            if turn in self._line:
                self._line.remove(turn)
        return found
