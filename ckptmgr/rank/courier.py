"""The thread of a rank that moves plans between the training thread and the key-value store.

The training thread leaves a proposal and takes windows from a queue; it never talks to the store.
A store that hangs holds this thread and nothing else.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from ckptmgr.errors import CkptmgrError, RendezvousError
from ckptmgr.rank.group import Ranks, ask_pause_seconds
from ckptmgr.rank.schedule import FREE_STEPS_MAX, Window, decode_window, encode_window

AHEAD_MAX = 64
"""Windows that are read ahead by a rank that has fallen behind."""

BLOCK_WINDOWS = 256
"""Windows whose records are removed together, once every rank has read them."""

COUNT_SECONDS = 0.25
"""How often requests and progress are told and asked; less often by very many ranks."""

_FIRST_PAUSE_SECONDS = 0.001
_FAILED_PAUSE_SECONDS = 0.2
_LEAVE_SECONDS = 1.0
"""How long leaving waits for an answer that may never come; the thread ends with the process."""


class Courier:
    """Windows in their order, whoever proposed them; requests and progress of all ranks.

    Args:
        ranks: who takes part.
        progress_bytes: what this rank's host buffer has put into the store.
        tell: is called once for each time that the key-value store fails.
        spooled: steps of which this rank's part is in the spool of its host.
    """

    def __init__(
        self,
        ranks: Ranks,
        progress_bytes: Callable[[], int],
        tell: Callable[[str], None],
        spooled: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._rank, self._world = ranks.rank, ranks.world
        self._registers = ranks.registers()
        self._progress_bytes = progress_bytes
        self._tell = tell
        self._spooled = spooled
        self._spooled_told: deque[int] = deque(maxlen=FREE_STEPS_MAX)
        self._turn = threading.Condition()
        self._ended = threading.Event()
        self._ahead: deque[Window] = deque()
        self._read = 0  # the number of the last window that is known
        self._proposal: Window | None = None
        self._question: tuple[str, Window | None] | None = None
        self._answer: Window | None = None
        self._forgotten = 0
        self._seen_bytes = 0
        self._asked = self._asked_told = 0
        self._preempted = self._preempted_told = False
        self._counted_at = 0.0
        self._count_seconds = max(COUNT_SECONDS, 4 * ask_pause_seconds(self._world))
        self._pause = _FIRST_PAUSE_SECONDS
        self.answers = 0
        """How often the store has answered."""
        self.requests = 0
        """Snapshots that all ranks together have asked for, as far as rank 0 knows."""
        self.preemptions = 0
        """Ranks that were told that they will be ended, as far as rank 0 knows."""
        self.progress = 0
        """Bytes that all ranks together have put into the store, as far as rank 0 knows."""
        self.safe: frozenset[int] = frozenset()
        """Steps of which every rank's part is in a spool, as far as rank 0 knows: no slot is
        needed for them any more."""
        self.step = -1
        """The step that the training thread has reached."""
        self._thread = threading.Thread(target=self._run, name="ckptmgr plan", daemon=True)
        self._thread.start()

    # -- the training thread's side -----------------------------------------------------------

    def request(self) -> None:
        """Ask for a snapshot. Takes no lock: it may come from a signal handler."""
        self._asked += 1

    def preempt(self) -> None:
        """Ask for a snapshot after which all ranks leave. Takes no lock, as `request`."""
        self._preempted = True

    def propose(self, window: Window) -> None:
        """Offer the plan of the next window; dropped if that is decided already."""
        with self._turn:
            if not self._ahead:
                self._proposal = window
                self._wake()

    def next(self, wait_seconds: float) -> Window | None:
        """The next window in order; waits for one answer of the store, at most so long."""
        with self._turn:
            if not self._ahead and wait_seconds > 0:
                self._turn.wait(wait_seconds)
            return self._ahead[0] if self._ahead else None

    def hurry(self) -> None:
        """Somebody waits for the next window."""
        with self._turn:
            self._wake()

    def entered(self) -> None:
        """The window that `next` gave is over, or has begun: go on to the one after it."""
        with self._turn:
            self._ahead.popleft()
            self._wake()

    def settle(self, key: str, window: Window | None, wait_seconds: float) -> Window | None:
        """Put a plan that is not in the order of windows, or (None) wait for rank 0's."""
        with self._turn:
            self._question, self._answer = (key, window), None
            self._wake()
            self._turn.wait_for(lambda: self._answer is not None, wait_seconds)
            self._question = None
            return self._answer

    def _wake(self) -> None:
        self._pause = _FIRST_PAUSE_SECONDS
        self._turn.notify_all()

    def close(self) -> None:
        """End the thread; one that waits for a dead store is left behind."""
        with self._turn:
            self._ended.set()
            self._turn.notify_all()
        self._thread.join(_LEAVE_SECONDS)

    # -- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        failing = False
        while not self._ended.is_set():
            try:
                moved = self._move()
                failing = False
            except CkptmgrError as error:
                if not failing and not self._ended.is_set():
                    self._tell(f"no snapshots for now: {error}")
                failing, moved = True, False
            with self._turn:
                if not self._ended.is_set() and not moved:
                    self._turn.wait(_FAILED_PAUSE_SECONDS if failing else self._pause)
                    self._pause = min(2 * self._pause, ask_pause_seconds(self._world))

    def _move(self) -> bool:
        """One round of questions; whether there may be more to do at once."""
        moved = self._next_window()
        moved = self._settled() or moved
        if time.monotonic() - self._counted_at >= self._count_seconds:
            self._counted_at = time.monotonic()
            self._count()
        return moved

    def _next_window(self) -> bool:
        with self._turn:
            behind = not self._ahead or self._ahead[-1].stop <= self.step
            if not behind or len(self._ahead) >= AHEAD_MAX:
                return False
            number, proposal = self._read + 1, self._proposal
        key = f"window/{number}"
        if proposal is None:
            record = self._registers.read(key)
        else:
            record = self._registers.decide(key, encode_window(proposal))
        with self._turn:
            self.answers += 1
            if record is None:
                self._turn.notify_all()
                return self._proposal is not None
            self._ahead.append(decode_window(record))
            self._read, self._proposal = number, None
            self._turn.notify_all()
        if number % BLOCK_WINDOWS == 0:
            self._registers.count(f"passed/{number // BLOCK_WINDOWS}", 1)
        return True

    def _settled(self) -> bool:
        with self._turn:
            if self._question is None or self._answer is not None:
                return False
            key, window = self._question
        if window is None:
            record = self._registers.read(key)
        else:
            record = self._registers.decide(key, encode_window(window))
        with self._turn:
            if record is not None and self._question == (key, window):
                self._answer = decode_window(record)
                self._turn.notify_all()
        return False

    def _count(self) -> None:
        asked = self._asked
        if asked > self._asked_told:
            self._registers.count("requests", asked - self._asked_told)
            self._asked_told = asked
        if self._preempted and not self._preempted_told:
            self._registers.count("preemptions", 1)
            self._preempted_told = True
        here = self._progress_bytes()
        more = here - self._seen_bytes if here >= self._seen_bytes else here  # a new buffer
        if more:
            self._registers.count("progress", more)
            self._seen_bytes = here
        self._count_spooled()
        if self._rank == 0:
            self.requests = self._registers.count("requests")
            self.preemptions = self._registers.count("preemptions")
            self.progress = self._registers.count("progress")
            self._forget()

    def _count_spooled(self) -> None:
        """Tell, once each, which parts are spooled; rank 0 learns when those of all ranks are."""
        here = self._spooled()
        for step in here:
            if step not in self._spooled_told:
                self._registers.count(f"spooled/{step}", 1)
                self._spooled_told.append(step)
        if self._rank == 0:
            asked = [step for step in here if step not in self.safe]
            counts = {step: self._registers.count(f"spooled/{step}") for step in asked}
            new = {step for step, count in counts.items() if count == self._world}
            self.safe = frozenset(here) & (self.safe | new)

    def _forget(self) -> None:
        """Remove the records that every rank has read: the store lives as long as the job."""
        block = self._forgotten + 1
        if self._read <= block * BLOCK_WINDOWS:
            return
        if self._registers.count(f"passed/{block}") == self._world:
            first = self._forgotten * BLOCK_WINDOWS + 1
            with contextlib.suppress(RendezvousError):
                for number in range(first, first + BLOCK_WINDOWS):
                    self._registers.forget(f"window/{number}")
            self._forgotten = block


def settle_key(step: int) -> str:
    """The register of the plan of an explicit `save`."""
    return f"save/{step}"
