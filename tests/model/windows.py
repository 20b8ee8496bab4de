"""The plan that all ranks follow: windows as decide-once registers, with ranks that lose patience.

Variables: window/n, the register of the n-th window; slots/r, what each slot of rank r holds;
decided/x in the store, and settled/r/x once rank r has heard of it; took/r/x and left/r/x, whether
rank r snapshotted step x or left it out with the plan before its eyes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ckptmgr.rank import schedule
from ckptmgr.rank.schedule import Every, Outlook, Window
from ckptmgr.types import Outcome, Snapshot
from model.explore import Move, Process, System, ViolatedError, World

STEP_SECONDS = 0.5
"""Two steps are a window."""

EVERY_OTHER = Every(steps=2)


@dataclass(frozen=True)
class PlanRules:
    """The decisions, by default the product's; `without` names what a seeded bug leaves out."""

    next_window: Callable[..., Window | None] = schedule.next_window
    empty_window: Callable[..., Window] = schedule.empty_window
    slot_for: Callable[..., int | None] = schedule.slot_for
    still_undecided: Callable[..., tuple[int, ...]] = schedule.still_undecided
    without: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Course:
    """How far the ranks go, and how often they lose patience or hear nothing at all."""

    ranks: int = 2
    slots: int = 2
    steps: int = 5
    every: Every = EVERY_OTHER
    requests: bool = False
    empties: int = 1
    blinds: int = 1
    aborts: int = 1


class Slot(NamedTuple):
    """What a slot holds: nothing, a copy that has begun (0), or a sealed step."""

    generation: int = 0
    step: int = 0


class Place(NamedTuple):
    """Where a rank is. `scheduled` and after are rank 0's."""

    step: int = 1
    number: int = 0
    stop: int = 1
    free: tuple[int, ...] = ()
    blind: tuple[int, ...] = ()
    copying: tuple[int, int] | None = None
    empties: int = 0
    scheduled: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()
    proposed: bool = False
    proposal: Window | None = None


class Rank:
    """One rank: its training thread, and the courier that brings windows and proposals."""

    def __init__(self, course: Course, decide: PlanRules, rank: int) -> None:
        self._course = course
        self._rules = decide
        self._r = rank

    def step(self, at: Place, w: World) -> list[Move]:
        moves: list[Move] = []
        if at.copying is not None:
            moves.append(self._seal(at, w))
        if at.proposal is not None:
            moves.append(self._deliver(at, w))
        if at.step > self._course.steps:
            return moves
        known = w["window", at.number + 1]
        if at.step < at.stop or (known is not None and at.step < known.start):
            moves.append(self._pass(at))
        elif known is not None:
            moves += self._enter(at, known, w)
        else:
            moves += self._wait(at)
        if self._r == 0 and not at.proposed:
            moves += self._propose(at, w, late=at.step >= at.stop)
        return moves

    # -- slots --------------------------------------------------------------------------------

    def _slots(self, w: World) -> tuple[Slot, ...]:
        found: tuple[Slot, ...] = w["slots", self._r] or (Slot(),) * self._course.slots
        return found

    def _sealed(self, w: World) -> list[tuple[Snapshot, Outcome]]:
        found = []
        for number, (generation, step) in enumerate(self._slots(w)):
            if step:
                snapshot = Snapshot(number, generation, 1, "", 0, 1, step, 0, 0, 0, 0.0, 0.0)
                found.append((snapshot, w["settled", self._r, step] or Outcome.UNDECIDED))
        return sorted(found, key=lambda pair: pair[0].generation)

    def _seal(self, at: Place, w: World) -> Move:
        assert at.copying is not None
        number, step = at.copying
        slots = list(self._slots(w))
        slots[number] = Slot(slots[number].generation, step)
        changes = {("slots", self._r): tuple(slots)}
        return (f"seal {step}", at._replace(copying=None), changes)

    def _begin(self, at: Place, w: World) -> tuple[Place, dict[Any, Any]]:
        sealed = self._sealed(w)
        number = self._rules.slot_for(self._course.slots, sealed, 1, at.free, None)
        if number is None:
            raise ViolatedError(f"W2 rank {self._r} has no slot for the planned step {at.step}")
        slots = list(self._slots(w))
        victim = slots[number].step
        if victim and victim == sealed[-1][0].step:
            raise ViolatedError(f"W4 rank {self._r} overwrites {victim}, its newest snapshot")
        settled = w["settled", self._r, victim] or Outcome.UNDECIDED
        if victim and settled is Outcome.UNDECIDED and victim not in at.free:
            raise ViolatedError(f"W4 rank {self._r} gives {victim} up, and nobody else does")
        slots[number] = Slot(1 + max(slot.generation for slot in slots), 0)
        changes = {("slots", self._r): tuple(slots), ("took", self._r, at.step): True}
        return at._replace(copying=(number, at.step)), changes

    # -- windows ------------------------------------------------------------------------------

    def _pass(self, at: Place) -> Move:
        left = {("left", self._r, at.step): True}
        return (f"step {at.step}", at._replace(step=at.step + 1), left)

    def _enter(self, at: Place, window: Window, w: World) -> list[Move]:
        first = None
        if window.snapshot:
            passed = (*at.blind, at.step)
            if "first step" in self._rules.without:
                passed = (at.step,)
            first = next((one for one in passed if window.start <= one < window.stop), None)
        if first == at.step and at.copying is not None:
            return []  # the copy that is under way ends before the next one begins
        free = () if "obey" in self._rules.without else window.free
        after = at._replace(
            number=at.number + 1, stop=window.stop, free=free, proposed=False, proposal=None
        )
        if self._r == 0:
            scheduled = (*at.scheduled, *([] if first is None else [first]))
            given_up = tuple(x for x in scheduled if x in {*at.given_up, *window.free})
            after = after._replace(scheduled=scheduled, given_up=given_up)
        label = f"enter {window.start}-{window.stop}"
        if first != at.step:
            return [(label, after, {})]
        after, changes = self._begin(after, w)
        return [(f"{label}: snapshot {at.step}", after._replace(step=at.step + 1), changes)]

    def _wait(self, at: Place) -> list[Move]:
        """What a rank does that has no plan: propose that nobody snapshots, or go on blind."""
        moves: list[Move] = []
        if len(at.blind) < self._course.blinds:
            blind = at._replace(step=at.step + 1, blind=(*at.blind, at.step))
            moves.append((f"step {at.step}, blind", blind, {}))
        if self._r and at.empties < self._course.empties:
            window = self._rules.empty_window(
                self._course.every, at.stop, at.step, STEP_SECONDS, self._r
            )
            empty = {("window", at.number + 1): window}
            moves.append(("nobody snapshots", at._replace(empties=at.empties + 1), empty))
        return moves

    # -- rank 0 -------------------------------------------------------------------------------

    def _propose(self, at: Place, w: World, *, late: bool) -> list[Move]:
        copying = at.copying[1] if at.copying is not None else None
        counted = [x for x in at.scheduled if x not in at.given_up]
        undecided = self._rules.still_undecided(counted, self._sealed(w), 1, copying)
        free = tuple(x for x in at.scheduled if x not in undecided)
        moves: list[Move] = []
        for requested in (False, True) if self._course.requests else (False,):
            for stuck in (False, True):
                start = max(at.stop, at.step)
                outlook = Outlook(start, STEP_SECONDS, 0.0, requested, undecided, free, stuck)
                window = self._rules.next_window(
                    self._course.every, self._course.slots, outlook, late=late
                )
                if window is not None:
                    self._check_free(at, w, window, stuck=stuck)
                    label = f"propose {window.start}-{window.stop} {window.snapshot} {window.free}"
                    moves.append((label, at._replace(proposed=True, proposal=window), {}))
        return moves

    def _check_free(self, at: Place, w: World, window: Window, *, stuck: bool) -> None:
        under_way = {s.step for s, outcome in self._sealed(w) if outcome is Outcome.UNDECIDED}
        if at.copying is not None:
            under_way.add(at.copying[1])
        lost = under_way.intersection(window.free).difference(at.given_up)
        if lost and not stuck:
            raise ViolatedError(f"W5 {sorted(lost)} are given up, and the store moves")

    def _deliver(self, at: Place, w: World) -> Move:
        key = ("window", at.number + 1)
        if w[key] is not None and "decide once" not in self._rules.without:
            return ("too late", at._replace(proposal=None), {})
        return ("publish", at._replace(proposal=None), {key: at.proposal})


class Store:
    """Commits what all ranks hold, gives others up, and tells each rank in its own time."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def step(self, aborts: int, w: World) -> list[Move]:
        moves: list[Move] = []
        ranks = range(self._course.ranks)
        for step in range(1, self._course.steps + 1):
            decided = w["decided", step]
            holders = [r for r in ranks if any(s.step == step for s in w["slots", r] or ())]
            if decided is None and holders:
                if len(holders) == self._course.ranks:
                    commit = {("decided", step): Outcome.COMMITTED}
                    moves.append((f"commit {step}", aborts, commit))
                if aborts < self._course.aborts:
                    abort = {("decided", step): Outcome.ABORTED}
                    moves.append((f"abort {step}", aborts + 1, abort))
            for r in holders if decided is not None else ():
                if w["settled", r, step] is None:
                    told = {("settled", r, step): decided}
                    moves.append((f"tell rank {r} of {step}", aborts, told))
        return moves


def windows_of(course: Course, decide: PlanRules) -> System:
    """Ranks that follow one plan, deciding by `decide`, and what must hold."""
    processes = [
        Process(f"rank {r}", Place(), Rank(course, decide, r).step) for r in range(course.ranks)
    ]
    processes.append(Process("store", 0, Store(course).step))

    def agree(step: int) -> Callable[[World], None]:
        def check(w: World) -> None:
            took = [r for r in range(course.ranks) if w["took", r, step]]
            left = [r for r in range(course.ranks) if w["left", r, step]]
            if took and left:
                raise ViolatedError(f"W1 step {step} is of rank {took[0]}, not of rank {left[0]}")

        return check

    def moves(old: World, new: World, changes: Any) -> None:
        for key in changes:
            if key[0] == "window" and new[key] != old[key]:
                _check_window(course, old, new, key[1])

    return System(
        tuple(processes),
        holds=tuple(agree(step) for step in range(1, course.steps + 1)),
        moves=moves,
        bits_of=lambda key: {"window": 7, "slots": 9, "took": 1, "left": 1}.get(key[0], 2),
        local_bits=20,
    )


def _check_window(course: Course, old: World, new: World, number: int) -> None:
    window = new["window", number]
    if old["window", number] is not None:
        raise ViolatedError(f"W7 window {number} is decided twice")
    before = old["window", number - 1] if number > 1 else None
    if before is not None and window.start < before.stop:
        raise ViolatedError(f"W7 window {number} begins before {before.stop}")
    if not window.snapshot:
        return
    free: set[int] = set(window.free)
    open_ = {window.start}
    for n in range(1, number):
        earlier = old["window", n]
        free |= set(earlier.free)
        if earlier.snapshot and old["took", 0, earlier.start]:
            open_.add(earlier.start)
    undecided = {x for x in open_ - free if old["decided", x] is None}
    if len(undecided) > course.slots - 1:
        raise ViolatedError(f"W3 {sorted(undecided)} are undecided at once")


COURSES = {
    "a cadence of steps": Course(),
    "requests": Course(every=Every(), requests=True, steps=4),
    "three ranks": Course(ranks=3, steps=3, every=Every(steps=1), aborts=0),
    "three slots": Course(slots=3, every=Every(steps=1), steps=4, empties=0),
}
COURSES_FULL = {
    "a cadence of steps": Course(steps=9, blinds=2, empties=2),
    "requests": Course(every=Every(), requests=True, steps=6, blinds=2),
    "three ranks": Course(ranks=3, steps=5, every=Every(steps=1)),
    "three slots": Course(slots=3, every=Every(steps=1), steps=6),
}


def _without(*names: str) -> PlanRules:
    return PlanRules(without=frozenset(names))


def _one_more(every: Every, slots: int, outlook: Outlook, *, late: bool) -> Window | None:
    return schedule.next_window(every, slots + 1, outlook, late=late)


def _unsaid(every: Every, slots: int, outlook: Outlook, *, late: bool) -> Window | None:
    window = schedule.next_window(every, slots, outlook, late=late)
    return window and Window(window.start, window.stop, window.snapshot, outlook.free)


def _any_slot(slots: int, sealed: Any, attempt: int, _free: Any, resumed: Any) -> int | None:
    every = [snapshot.step for snapshot, _ in sealed]
    return schedule.slot_for(slots, sealed, attempt, every, resumed)


def _newest_slot(slots: int, sealed: Any, _attempt: int, _free: Any, _resumed: Any) -> int:
    taken = {snapshot.slot for snapshot, _ in sealed}
    return [*(k for k in range(slots) if k not in taken), *(s.slot for s, _ in sealed[-1:])][0]


PLAN_BUGS = {
    "a window is decided twice": _without("decide once"),
    "who was blind snapshots where it is": _without("first step"),
    "a rank keeps what the plan gives up": _without("obey"),
    "one step too many is undecided": PlanRules(next_window=_one_more),
    "what is given up is not said": PlanRules(next_window=_unsaid),
    "what is undecided is forgotten": PlanRules(still_undecided=lambda *_: ()),
    "a rank gives up on its own": PlanRules(slot_for=_any_slot, without=frozenset({"obey"})),
    "the newest snapshot is overwritten": PlanRules(slot_for=_newest_slot),
}
