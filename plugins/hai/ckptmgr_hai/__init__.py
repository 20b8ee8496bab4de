"""ckptmgr on the HAI platform: jobs are suspended at any time, and have 5 to 10 seconds then.

The platform sets a flag on the node of rank 0; ranks elsewhere hear of it by the plan of the job.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from ckptmgr.preemption import Notice, Source, Told
from ckptmgr.telling import tell
from ckptmgr_hai.flag import Flag
from ckptmgr_hai.platform import Platform, carried_step
from ckptmgr_hai.watchdog import awake

__all__ = ["SuspendSource", "awake", "carried_step"]

POLL_SECONDS = 0.2
"""The flag stands for 5 seconds; a look at it takes microseconds."""

STAY_SECONDS_MAX = 30.0
"""How long a process waits for its end after the last commit: three times the longest window."""

WINDOW_SECONDS = 5.0
"""From the flag to the end of the job, if nobody acknowledges it; then it is twice that."""


class SuspendSource(Source):
    """The suspend flag, and the answers to it.

    Rank 0 acknowledges, which gains five seconds. As soon as the last step is committed, or with
    the one before if no newer is sealed in four seconds, it carries the step over (whole-life
    state) and says that the job can be suspended. On the platform that call does not return, and
    the pods are ended. Leaving the block waits for that on every rank: a process that ended by
    itself would be taken for a task that is done, and the task would not be queued again.

    Args:
        is_set: looks at the flag; the platform's own if left out.
        platform: who is answered; the platform if left out.
        window_seconds: what the platform leaves (`suspend_waiting_seconds`).
    """

    name = "hai"

    def __init__(
        self,
        is_set: Callable[[], bool] | None = None,
        platform: Platform | None = None,
        window_seconds: float = WINDOW_SECONDS,
    ) -> None:
        self._is_set = is_set or Flag().is_set
        self._platform = platform or Platform()
        self._window_seconds = window_seconds
        self._leads = False
        self._suspended = False
        self._is_over = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def listen(self, told: Told, rank: int) -> None:
        """As promised by Source."""
        self._leads = rank == 0
        self._thread = threading.Thread(
            target=self._watch, args=(told,), name="ckptmgr suspend flag", daemon=True
        )
        self._thread.start()

    def _watch(self, told: Told) -> None:
        before = False
        while not self._ended.wait(POLL_SECONDS):
            try:
                now = self._is_set()
            except OSError as error:
                tell(f"no suspend flag: {error}")
                return
            if now and not before:
                self._suspended = True
                told(Notice("suspend flag", self._window_seconds))
                if self._leads:
                    self._platform.acknowledge()
            before = now

    def committed(self, step: int) -> None:
        """As promised by Source; where the flag has not come (another source), nobody is told."""
        self._is_over = True
        if self._leads and self._suspended:
            self._platform.carry(step)
            self._platform.suspend()

    def close(self) -> None:
        """As promised by Source."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_over and os.environ.get("MARSV2_TASK_TYPE") == "training":
            threading.Event().wait(STAY_SECONDS_MAX)
