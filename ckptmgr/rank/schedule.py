"""Which steps are snapshotted, alone or agreed by all ranks. Pure: time and slots are arguments.

Ranks that choose for themselves never commit, so many ranks follow one plan: windows of steps, each
a record that is decided once. Only the first call of `step` in a window may snapshot
(docs/decisions/0010-windows.md).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ckptmgr.errors import ControlProtocolError, UsageError
from ckptmgr.staging.slots import Sealed
from ckptmgr.types import MALFORMED, StepId

WINDOW_SECONDS = 1.0
"""Length of a window: how late a request may be heard, how often the key-value store is asked."""

WINDOW_STEPS_MAX = 100
"""Longest window in steps: a loop that suddenly becomes slower is held to it for so many steps."""

FREE_STEPS_MAX = 16
"""Steps that a plan names as free: several times the slots that any rank has."""

_STEP_MAX = 1 << 62
_RECORD_BYTES_MAX = 1 << 10

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_EVERY = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")


@dataclass(frozen=True, slots=True)
class Every:
    """A cadence: every `steps` steps, or every `seconds` seconds; both zero means never."""

    steps: int = 0
    seconds: float = 0.0


def parse_every(every: int | str | None) -> Every:
    """Read `100` (steps), `"90s"`, `"5m"`, `"1h"` or None (only explicit saves).

    Raises:
        UsageError: something else, or not positive.
    """
    if every is None:
        return Every()
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return Every(steps=every)
    match = _EVERY.fullmatch(every) if isinstance(every, str) else None
    if match is None or float(match[1]) <= 0:
        raise UsageError(
            f"{every!r} is not a cadence",
            subject="every",
            hint='Write a number of steps (100) or a time ("90s", "5m", "1h").',
        )
    return Every(seconds=float(match[1]) * _UNITS[match[2]])


@dataclass(slots=True)
class Cadence:
    """Tells when a snapshot is due.

    One that could not be taken is made up for at the next multiple of `steps`, so that the steps
    in the store are the promised ones, or at the next call where the cadence is a time.
    """

    every: Every
    last_at: float

    def due(self, step: int, now: float) -> bool:
        """Whether `step` is to be snapshotted; `now` is monotonic seconds."""
        if self.every.steps:
            return step % self.every.steps == 0
        return self.every.seconds > 0 and now - self.last_at >= self.every.seconds

    def taken(self, now: float) -> None:
        """A snapshot was taken at `now`."""
        self.last_at = now


@dataclass(slots=True)
class Patience:
    """Tells a slow store from a dead one by the bytes that arrive in it."""

    seconds: float
    seen_bytes: int = 0
    since: float = 0.0

    def exhausted(self, progress_bytes: int, now: float) -> bool:
        """Whether nothing has arrived for `seconds`; the first call only starts to watch."""
        if progress_bytes != self.seen_bytes or self.since == 0.0:
            self.seen_bytes, self.since = progress_bytes, now
        return now - self.since >= self.seconds


StepNumber = Annotated[int, msgspec.Meta(ge=0, le=_STEP_MAX)]


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The plan of the steps [start, stop), proposed `by` a rank.

    `snapshot`: the first call of `step` in it is snapshotted. `free`: steps of this attempt whose
    slots every rank may write again, because they are decided or given up. `leave`: that snapshot
    is for a preemption, after which the ranks may leave their loops together.
    """

    start: StepNumber
    stop: StepNumber
    snapshot: bool
    free: Annotated[tuple[StepNumber, ...], msgspec.Meta(max_length=FREE_STEPS_MAX)] = ()
    by: Annotated[int, msgspec.Meta(ge=0, le=_STEP_MAX)] = 0
    leave: bool = False

    def __post_init__(self) -> None:
        if self.stop <= self.start:
            raise ValueError("a window without steps")


_decode = msgspec.json.Decoder(Window).decode


def encode_window(window: Window) -> str:
    """The record of a window: JSON, because the key-value stores of torch take text."""
    return msgspec.json.encode(window).decode()


def decode_window(record: bytes) -> Window:
    """The window of a record.

    Raises:
        ControlProtocolError: it is no record of a window.
    """
    try:
        if len(record) > _RECORD_BYTES_MAX:
            raise ControlProtocolError(f"record of {len(record)} bytes", subject="window")
        return _decode(record)
    except MALFORMED as error:
        raise ControlProtocolError(f"malformed record: {error}", subject="window") from error


@dataclass(frozen=True, slots=True)
class Outlook:
    """What rank 0 knows when it proposes a window.

    Args:
        start: the first step that the window can have.
        step_seconds: how long a step takes; 0 where that is not known.
        since_seconds: time from the last snapshot until `start` is expected.
        requested: a rank asked for a snapshot.
        undecided: scheduled steps that are neither decided nor given up, oldest first.
        free: the other steps that were scheduled, oldest first.
        stuck: nothing has arrived in the store for longer than the patience.
        preempted: a rank was told that it will be ended.
    """

    start: int
    step_seconds: float
    since_seconds: float
    requested: bool
    undecided: tuple[int, ...]
    free: tuple[int, ...]
    stuck: bool
    preempted: bool = False


def next_window(every: Every, slots: int, outlook: Outlook, *, late: bool) -> Window | None:
    """What rank 0 proposes; None where the snapshot that is due may be possible a little later.

    At most `slots` - 1 scheduled steps are undecided, the new one included. A store that is stuck
    costs the oldest undecided steps their slots. `late` means that there is no later.
    """
    at_multiple = every.steps > 0 and outlook.start % every.steps == 0
    after_time = 0 < every.seconds <= outlook.since_seconds
    due = at_multiple or after_time or outlook.requested or outlook.preempted
    too_many = max(0, len(outlook.undecided) - (slots - 2))
    given_up = outlook.undecided[:too_many] if due and outlook.stuck else ()
    fits = len(given_up) == too_many
    if due and not fits and not late:
        return None
    # A snapshot at a multiple is for that step alone: a loop that leaves it out has none to take.
    stop = outlook.start + 1 if at_multiple else _stop(every, outlook.start, outlook.step_seconds)
    free = (*outlook.free, *given_up)[-FREE_STEPS_MAX:]
    snapshot = due and fits
    leave = snapshot and outlook.preempted
    return Window(outlook.start, stop, snapshot, free, leave=leave)


def empty_window(
    every: Every, previous_stop: int, step: int, step_seconds: float, rank: int
) -> Window:
    """What a rank proposes that has waited at `step` in vain: nobody snapshots up to `stop`."""
    return Window(previous_stop, _stop(every, step, step_seconds), snapshot=False, by=rank)


def _stop(every: Every, start: int, step_seconds: float) -> int:
    """Where a window ends: after about WINDOW_SECONDS, and at the next multiple of the cadence."""
    length = min(WINDOW_SECONDS / step_seconds, WINDOW_STEPS_MAX) if step_seconds > 0 else 1
    stop = start + max(int(length), 1)
    return min(stop, (start // every.steps + 1) * every.steps) if every.steps else stop


def still_undecided(
    scheduled: Iterable[int], sealed: Sealed, attempt: int, copying: int | None
) -> tuple[int, ...]:
    """Those of the scheduled steps for which something may still come into the store.

    A step that rank 0 itself has neither sealed nor is `copying` can not be committed any more.
    """
    waiting = {
        snapshot.step
        for snapshot, outcome in sealed
        if snapshot.attempt == attempt and not outcome.decided
    }
    return tuple(step for step in scheduled if step in waiting or step == copying)


def slot_for(
    slots: int,
    sealed: Sealed,
    attempt: int,
    free: Collection[int],
    resumed: StepId | None = None,
) -> int | None:
    """The slot that a rank writes for a window whose plan says `free`.

    Empty slots come first, then the oldest snapshot that is decided, free, or of another attempt:
    its ranks have gone another way since. The newest sealed snapshot of this attempt is never
    written; before there is one, that is what was resumed from, or else the newest of all.
    None if every slot is needed, which a plan that was followed rules out.
    """
    taken = {snapshot.slot for snapshot, _ in sealed}
    for slot in range(slots):
        if slot not in taken:
            return slot
    own = [snapshot for snapshot, _ in sealed if snapshot.attempt == attempt]
    found = [snapshot for snapshot, _ in sealed if snapshot.id == resumed]
    kept = max(own or found or [s for s, _ in sealed], key=lambda s: s.generation)
    usable = [
        snapshot
        for snapshot, outcome in sealed
        if snapshot is not kept
        and (outcome.decided or snapshot.attempt != attempt or snapshot.step in free)
    ]
    return min(usable, key=lambda s: s.generation).slot if usable else None
