"""When many ranks snapshot: the training thread's side of the plan that they all follow."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ckptmgr.config import DRAIN_SECONDS
from ckptmgr.errors import HostMemoryError, RanksMissingError
from ckptmgr.rank.courier import Courier, settle_key
from ckptmgr.rank.handle import Stats
from ckptmgr.rank.pace import (
    SLOT_LOOK_SECONDS,
    SLOT_WAIT_SECONDS_MAX,
    Look,
    patience_seconds,
)
from ckptmgr.rank.schedule import (
    FREE_STEPS_MAX,
    Every,
    Outlook,
    Patience,
    Window,
    empty_window,
    next_window,
    slot_for,
    still_undecided,
)
from ckptmgr.types import Snapshot, StepId

PLAN_SECONDS_MAX = 1.0
"""Longest wait of `step` for a plan of rank 0, and for an answer of the key-value store."""

SAVE_PLAN_SECONDS_MAX = DRAIN_SECONDS
"""Longest wait of `save` for rank 0, which waits for the store as long as bytes arrive there."""

_NEW_STEP_WEIGHT = 0.3
_BEGINNING = Window(0, 1, snapshot=False)
"""Before the first plan; no rank waits in it, because no step is less than 0."""


class Planner:
    """The gate of one rank: it enters a window only with its plan, and waits for it in bounds.

    Rank 0 proposes the next window when it enters one. A rank that waits in vain for
    PLAN_SECONDS_MAX proposes that nobody snapshots; it does not wait for rank 0 again until it
    sees a plan of rank 0. If the key-value store does not answer either, it goes on `blind`,
    without snapshots, until it has read all it missed.
    """

    def __init__(
        self,
        rank: int,
        every: Every,
        slots: int,
        attempt: int,
        plans: Courier,
        stats: Stats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank, self._every, self._slots, self._attempt = rank, every, slots, attempt
        self._plans = plans
        self._stats = stats
        self._clock = clock
        self._patience = Patience(patience_seconds(every))
        self._resumed: StepId | None = None
        self._window = _BEGINNING
        self._free: tuple[int, ...] = ()
        self._blind_since: int | None = None
        self._blind_steps: deque[int] = deque(maxlen=FREE_STEPS_MAX)
        self._waits_for_rank_0 = True
        self._step, self._step_at, self._step_seconds = -1, 0.0, 0.0
        # What rank 0 has to remember to propose:
        self._proposed = False
        self._giving_up: frozenset[int] = frozenset()
        self._keeps_up = True
        self._scheduled: deque[int] = deque(maxlen=FREE_STEPS_MAX)
        self._given_up: set[int] = set()
        self._last_at = clock()
        self._requests_seen = self._requests_served = 0
        self.preempted = False

    # -- the gate -----------------------------------------------------------------------------

    def due(self, step: int, look: Callable[[], Look]) -> bool:
        """As promised by Pace; at most PLAN_SECONDS_MAX for rank 0, and as much for the store."""
        self._measure(step)
        snapshot = self._pass(step, look)
        if self._rank == 0 and not self._proposed:
            self._propose(step, look(), copying=step if snapshot else None, late=False)
        return snapshot

    def _measure(self, step: int) -> None:
        now = self._clock()
        if 0 <= self._step < step:
            sample = (now - self._step_at) / (step - self._step)
            weight = _NEW_STEP_WEIGHT if self._step_seconds else 1.0
            self._step_seconds += weight * (sample - self._step_seconds)
        self._step, self._step_at = step, now
        self._plans.step = step

    def _pass(self, step: int, look: Callable[[], Look]) -> bool:
        """Enter every window up to `step`; whether it is the step that all ranks snapshot."""
        while step >= self._window.stop:
            window = self._await(step, look)
            if window is None:
                self._blind_steps.append(step)
                return False
            if step < window.start:
                return False
            self._enter(window)
            if window.snapshot and self._snapshotted(window, step) == step:
                return True
        return False

    def _snapshotted(self, window: Window, step: int) -> int | None:
        """The step that the ranks snapshot in a window: the first one of the loop in it."""
        passed = (*self._blind_steps, step)
        first = next((one for one in passed if window.start <= one < window.stop), None)
        if first is not None:
            self._schedule(first)
        return first

    def _schedule(self, step: int) -> None:
        self._scheduled.append(step)
        self._last_at = self._clock()

    def _enter(self, window: Window) -> None:
        self._plans.entered()
        self._window = window
        self._proposed = False
        self._blind_since = None
        if window.by == 0:
            self._waits_for_rank_0 = True
        if window.snapshot:
            self._requests_served = self._requests_seen
        if window.leave:
            self.preempted = True
        self._obey(window)

    def _obey(self, window: Window) -> None:
        """What the plan calls free is given up here too, if it was not decided."""
        self._free = window.free
        self._stats.superseded += len(self._giving_up.intersection(window.free))
        self._giving_up = frozenset()
        given_up = self._given_up.union(window.free)
        self._given_up = given_up.intersection(self._scheduled)

    def _await(self, step: int, look: Callable[[], Look]) -> Window | None:
        """The window after the present one, or None if the key-value store keeps silent."""
        known = self._plans.next(0.0)
        if known is not None or self._blind_since == self._plans.answers:
            return known
        self._plans.hurry()
        known = self._lead(step, look) if self._rank == 0 else self._follow(step)
        known = known or self._listen()
        if known is None:
            self._blind_since = self._plans.answers
        return known

    def _follow(self, step: int) -> Window | None:
        """Wait for rank 0; then propose that nobody snapshots, so that training goes on."""
        known = self._listen() if self._waits_for_rank_0 else None
        if known is None:
            self._waits_for_rank_0 = False
            stop, seconds = self._window.stop, self._step_seconds
            self._plans.propose(empty_window(self._every, stop, step, seconds, self._rank))
        return known

    def _listen(self) -> Window | None:
        """Wait for the next window, whoever proposed it."""
        deadline = self._clock() + PLAN_SECONDS_MAX
        known = self._plans.next(0.0)
        while known is None and (left := deadline - self._clock()) > 0:
            known = self._plans.next(left)
        return known

    # -- rank 0 -------------------------------------------------------------------------------

    def _lead(self, step: int, look: Callable[[], Look]) -> Window | None:
        """Propose what is due now; a store that has kept up gets a moment to free a slot."""
        deadline = self._clock() + SLOT_WAIT_SECONDS_MAX
        while not self._proposed and not self._propose(step, look(), copying=None, late=False):
            if not self._keeps_up or self._clock() >= deadline:
                self._keeps_up = False
                self._stats.delayed += 1
                self._propose(step, look(), copying=None, late=True)
                return None
            known = self._plans.next(SLOT_LOOK_SECONDS)
            if known is not None:
                return known
        return None

    def _propose(self, step: int, look: Look, *, copying: int | None, late: bool) -> bool:
        """Propose the next window, unless it is better to wait; `copying` has just been begun."""
        outlook = self._outlook(step, look, copying)
        window = next_window(self._every, self._slots, outlook, late=late)
        if window is None:
            return False
        self._proposed = True
        self._keeps_up = self._keeps_up or window.snapshot
        self._giving_up = frozenset(outlook.undecided).intersection(window.free)
        self._requests_seen = self._plans.requests
        self._plans.propose(window)
        return True

    def _outlook(self, step: int, look: Look, copying: int | None) -> Outlook:
        start = max(self._window.stop, step)  # the loop may have left out the steps between
        undecided = self._undecided(look, copying)
        expected = self._clock() + (start - step) * self._step_seconds
        return Outlook(
            start=start,
            step_seconds=self._step_seconds,
            since_seconds=expected - self._last_at,
            requested=self._plans.requests > self._requests_served,
            undecided=undecided,
            free=tuple(one for one in self._scheduled if one not in undecided),
            stuck=len(undecided) > self._slots - 2 and self._is_stuck(),
            preempted=self._plans.preemptions > 0 and not self.preempted,
        )

    def _undecided(self, look: Look, copying: int | None) -> tuple[int, ...]:
        needless = self._given_up | self._plans.safe
        counted = [one for one in self._scheduled if one not in needless]
        begun = look.copying if copying is None else copying
        return still_undecided(counted, look.sealed, self._attempt, begun)

    def _is_stuck(self) -> bool:
        return self._patience.exhausted(self._plans.progress, self._clock())

    # -- slots --------------------------------------------------------------------------------

    def slot(self, step: int, look: Callable[[], Look]) -> int | None:  # noqa: ARG002
        """As promised by Pace; the plan of the window says which slots are free."""
        return slot_for(self._slots, look().sealed, self._attempt, self._free, self._resumed)

    def slot_anew(
        self,
        step: int,
        look: Callable[[], Look],
        wait: Callable[[Snapshot], None],  # noqa: ARG002
    ) -> int:
        """As promised by Pace.

        Raises:
            HostMemoryError: no slot is free.
        """
        slot = self.slot(step, look)
        if slot is None:
            raise HostMemoryError("no slot is free", subject=f"step {step}")
        return slot

    def slot_soon(
        self, step: int, look: Callable[[], Look], wait: Callable[[Snapshot], None]
    ) -> int:
        """As promised by Pace; rank 0 waits for the store, the others for rank 0.

        Raises:
            RanksMissingError: rank 0 has not come to this save.
            HostMemoryError: no slot is free.
        """
        self._measure(step)
        own = Window(step, step + 1, snapshot=True, free=self._freed(look, wait))
        plan = self._plans.settle(
            settle_key(step), own if self._rank == 0 else None, SAVE_PLAN_SECONDS_MAX
        )
        if plan is None:
            raise RanksMissingError(f"did not come to save({step}) in time", subject="rank 0")
        self._obey(plan)
        self._schedule(step)
        return self.slot_anew(step, look, wait)

    def _freed(self, look: Callable[[], Look], wait: Callable[[Snapshot], None]) -> tuple[int, ...]:
        """Rank 0: the steps that need no slot, once there are enough of them."""
        pause = threading.Event()
        while self._rank == 0:
            seen = look()
            undecided = self._undecided(seen, None)
            too_many = max(0, len(undecided) - (self._slots - 2))
            if not too_many or self._is_stuck():
                self._giving_up = frozenset(undecided[:too_many])
                return tuple(one for one in self._scheduled if one not in undecided[too_many:])
            oldest = [s for s, _ in seen.sealed if s.step == undecided[0]]
            pause.wait(SLOT_LOOK_SECONDS)
            for snapshot in oldest:
                wait(snapshot)
        return ()

    def taken(self) -> None:
        """The plan knows what was scheduled; a copy that fails is seen in the slots."""

    def request(self) -> None:
        """As promised by Pace."""
        self._plans.request()

    def preempt(self) -> None:
        """As promised by Pace."""
        self._plans.preempt()

    def resumed_from(self, step: StepId) -> None:
        """As promised by Pace."""
        self._resumed = step
        self._step = -1

    def close(self) -> None:
        """As promised by Pace."""
        self._plans.close()
