"""What a rank does when it is told that it will be ended; threads of its own, and no lock of step.

The training thread is asked for one more snapshot. It may be hung, in a loader or a collective, and
never come to its next step: what it sealed last is committed by the daemon in any case, and as the
time ends that is what the sources are told of: by words in host memory, so that a daemon that is
slow to answer, or is being started again, costs them nothing of their time.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec import structs

from ckptmgr.errors import CkptmgrError
from ckptmgr.preemption import Notice, Source
from ckptmgr.rank.link import Link
from ckptmgr.rank.pace import Pace
from ckptmgr.staging.control import Done, Preempt
from ckptmgr.telling import tell
from ckptmgr.types import Outcome, Snapshot

LOOK_SECONDS = 0.02
"""How often slots are looked at while a preemption is under way: words in shared memory."""

ANSWER_SECONDS_MAX, ANSWER_SHARE = 1.0, 0.2
"""What a source is left, of the time that it gave, to do something with the last commit."""

_LEAVE_SECONDS = 2.0


class Preempting:
    """The sources of one block, the thread that serves what they tell, and one that hands it on.

    A notice that comes while another one is served is of the same preemption. Without a source
    there is no thread.

    Raises:
        UsageError: a source can not listen here; none does then.
    """

    def __init__(self, sources: Sequence[Source], rank: int, link: Link, pace: Pace) -> None:
        self._sources = sources
        self._link, self._pace = link, pace
        self._notices: queue.SimpleQueue[tuple[Source, Notice] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._committed = -1
        self._thread = threading.Thread(target=self._run, name="ckptmgr preemption", daemon=True)
        self._telling: threading.Thread | None = None
        if not sources:
            return
        self._thread.start()
        try:
            for source in sources:
                source.listen(partial(self._told, source), rank)
        except BaseException:
            self.close()
            raise

    def _told(self, source: Source, notice: Notice) -> None:
        self._notices.put((source, notice))

    def follow(self, pace: Pace) -> None:
        """Ask this pace from now on, at once if a preemption is under way."""
        self._pace = pace
        if self._telling is not None:
            pace.preempt()

    def close(self) -> None:
        """End the sources and the threads; one that somebody holds up is left behind."""
        self._ended.set()
        self._notices.put(None)
        deadline = time.monotonic() + _LEAVE_SECONDS
        _leave(self._thread, deadline)
        _leave(self._telling, deadline)  # which that one may have started just now
        for source in self._sources:
            source.close()

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (told := self._notices.get()) is not None:
            self._serve(*told)
            for _ in range(self._notices.qsize()):
                if self._notices.get() is None:
                    return
        if self._pace.preempted and self._committed < 0:
            self._answer(set(), time.monotonic())  # another rank was told, and all leave

    def _serve(self, source: Source, notice: Notice) -> None:
        """Ask for a snapshot, tell the daemon, and tell the sources what becomes of it."""
        left = notice.seconds - min(ANSWER_SECONDS_MAX, ANSWER_SHARE * notice.seconds)
        deadline = time.monotonic() + left if notice.seconds else math.inf
        before = {snapshot for snapshot, _ in self._link.sealed_here()}
        self._pace.preempt()
        request = Preempt(source.name, notice.why, notice.seconds)
        self._telling = threading.Thread(
            target=self._tell_daemon, args=(request,), name="ckptmgr preempted", daemon=True
        )
        self._telling.start()
        self._answer(before, deadline)

    def _answer(self, before: set[Snapshot], deadline: float) -> None:
        last = self._await_last(before, deadline, committed=False)
        if last is None:
            return
        for one in self._sources:
            _tell(one, one.sealed, last.step)
        last = self._await_last(before, deadline, committed=True)
        if last is not None:
            self._committed = last.step
            for one in self._sources:
                _tell(one, one.committed, last.step)

    def _await_last(
        self, before: set[Snapshot], deadline: float, *, committed: bool
    ) -> Snapshot | None:
        """The newest snapshot that is not one of `before`, or any at all once the time is over; as
        soon as there is one that is `committed`, where that is asked for. None if the block is left
        first.
        """
        while True:
            ended = self._ended.wait(LOOK_SECONDS)
            late = ended or time.monotonic() >= deadline
            found = [
                snapshot
                for snapshot, outcome in self._link.sealed_here()
                if (late or snapshot not in before)
                and (outcome is Outcome.COMMITTED or not committed)
            ]
            if found or ended:
                return max(found, key=lambda s: s.generation, default=None)

    def _tell_daemon(self, request: Preempt) -> None:
        try:
            self._link.ask(request, Done)
            self._link.ask_later_daemons(structs.replace(request, again=True))
        except CkptmgrError as error:
            tell(f"preempted, and the daemon can not be told: {error}")


def _tell(source: Source, hear: Callable[[int], None], step: int) -> None:
    """Tell a source; what goes wrong in one keeps nobody from telling the others."""
    try:
        hear(step)
    except Exception as error:  # noqa: BLE001 - anybody's code, and nobody waits for this thread
        tell(f"preemption source {source.name!r} failed at step {step}: {error}")


def _leave(thread: threading.Thread | None, deadline: float) -> None:
    """Wait for a thread that was started to end."""
    if thread is not None and thread.is_alive():
        thread.join(max(deadline - time.monotonic(), 0))
