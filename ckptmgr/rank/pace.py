"""When one rank snapshots, and into which slot: its own cadence, patience and slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ckptmgr.config import PATIENCE_SECONDS_MIN
from ckptmgr.rank.handle import Stats
from ckptmgr.rank.schedule import Cadence, Every, Patience
from ckptmgr.staging.slots import Sealed, free_slot, superseded_slot
from ckptmgr.types import Snapshot, StepId

SLOT_WAIT_SECONDS_MAX = 0.25
"""Longest pause of `step` for a store that has kept up so far: ten commits of a small state."""

SLOT_LOOK_SECONDS = 0.002
"""How often a slot is looked at: its outcome is a word in shared memory, there is no wake-up."""


@dataclass(frozen=True, slots=True)
class Look:
    """What host memory holds: the sealed snapshots, the step whose copy is not finished, and the
    bytes that have reached the store so far.
    """

    sealed: Sealed
    copying: int | None
    progress_bytes: int


class Pace(Protocol):
    """Decides for the training thread, which calls the methods in this order for every step.

    `preempted`: the snapshot that `preempt` asked for was taken, by the plan on all ranks alike.
    """

    preempted: bool

    def due(self, step: int, look: Callable[[], Look]) -> bool:
        """Whether `step` is to be snapshotted now."""

    def slot(self, step: int, look: Callable[[], Look]) -> int | None:
        """The slot for a step that is due, or None: then it is made up for later."""

    def slot_soon(
        self, step: int, look: Callable[[], Look], wait: Callable[[Snapshot], None]
    ) -> int:
        """The slot for an explicit save; `wait` waits a moment for a snapshot to be decided."""

    def slot_anew(
        self, step: int, look: Callable[[], Look], wait: Callable[[Snapshot], None]
    ) -> int:
        """The slot for the same step in another buffer."""

    def taken(self) -> None:
        """The snapshot was taken."""

    def request(self) -> None:
        """Snapshot at the next opportunity. May be called by a signal handler."""

    def preempt(self) -> None:
        """Snapshot at the next opportunity, the last one. Any thread may call it."""

    def resumed_from(self, step: StepId) -> None:
        """What this attempt goes on from."""

    def close(self) -> None:
        """The block is left."""


def patience_seconds(every: Every) -> float:
    """How long nothing may arrive in the store before a step is given up."""
    return max(PATIENCE_SECONDS_MIN, every.seconds)


class OwnPace:
    """The pace of a rank that is alone."""

    def __init__(
        self, every: Every, slots: int, stats: Stats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._slots = slots
        self._stats = stats
        self._clock = clock
        self._cadence = Cadence(every, clock())
        self._patience = Patience(patience_seconds(every))
        self._keeps_up = True
        self._requested = self._preempting = self.preempted = False

    def due(self, step: int, look: Callable[[], Look]) -> bool:  # noqa: ARG002
        """As promised by Pace."""
        return self._asked() or self._cadence.due(step, self._clock())

    def _asked(self) -> bool:
        return self._requested or (self._preempting and not self.preempted)

    def slot(self, step: int, look: Callable[[], Look]) -> int | None:  # noqa: ARG002
        """As promised by Pace; a store that has kept up so far gets a moment to free a slot.

        A small state in a fast loop is due again before its last commit has returned from fsync.
        A store that misses the moment once is not waited for until it has caught up by itself.
        """
        slot = self._slot_now(look())
        if slot is not None:
            self._keeps_up = True
            return slot
        pause, deadline = threading.Event(), self._clock() + SLOT_WAIT_SECONDS_MAX
        while self._keeps_up and slot is None:
            pause.wait(SLOT_LOOK_SECONDS)
            slot = self._slot_now(look())
            self._keeps_up = slot is not None or self._clock() < deadline
        return slot

    def slot_soon(
        self,
        step: int,  # noqa: ARG002
        look: Callable[[], Look],
        wait: Callable[[Snapshot], None],
    ) -> int:
        """As promised by Pace; waits for the oldest undecided snapshot as long as bytes arrive."""
        while True:
            seen = look()
            slot = self._slot_now(seen)
            if slot is not None:
                return slot
            oldest = superseded_slot(seen.sealed)
            if oldest is not None:
                wait(oldest)

    def slot_anew(
        self, step: int, look: Callable[[], Look], wait: Callable[[Snapshot], None]
    ) -> int:
        """As promised by Pace."""
        return self.slot_soon(step, look, wait)

    def _slot_now(self, look: Look) -> int | None:
        """A slot to write, or None while the store is slow but moving."""
        slot = free_slot(self._slots, look.sealed)
        if slot is not None:
            return slot
        if not self._patience.exhausted(look.progress_bytes, self._clock()):
            return None
        victim = superseded_slot(look.sealed)
        if victim is None:
            return None
        self._stats.superseded += 1
        return victim.slot

    def taken(self) -> None:
        """As promised by Pace."""
        self._requested = False
        self.preempted = self._preempting
        self._cadence.taken(self._clock())

    def request(self) -> None:
        """As promised by Pace."""
        self._requested = True

    def preempt(self) -> None:
        """As promised by Pace."""
        self._preempting = True

    def resumed_from(self, step: StepId) -> None:
        """The slots of one rank tell it all it needs."""

    def close(self) -> None:
        """Nothing to end."""
