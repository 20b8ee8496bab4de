"""What the daemon has seen of a job's latest steps, for people who look at it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from ckptmgr.repository.commit import Decision
from ckptmgr.types import Snapshot, StepId, StepState, Tags

PASSAGES_MAX = 120
"""Steps remembered of each job: ten hours at one step in five minutes; a wide screen shows 90."""

LATELY_SECONDS = 180.0
"""A failure is over, too, when it has not been met again for so long. A store that hangs fails once
in 60 s and is tried again within 30 s (STORE_TIMEOUT_SECONDS, RETRY_SECONDS_MAX)."""


@dataclass(slots=True)
class Passage:
    """One step on its way into the store, as this host has seen it.

    `raw_bytes` and `stored_bytes` are those of all ranks. `here_raw_bytes` were written by this
    host, in `seconds` from the first of its writes to the decision, as `here_stored_bytes`. Times
    are Unix seconds, and None for what has not been seen.
    """

    id: StepId
    state: StepState = StepState.UNDECIDED
    world: int = 0
    raw_bytes: int | None = None
    stored_bytes: int | None = None
    sealed_at: float | None = None
    begun_at: float | None = None
    committed_at: float | None = None
    here_raw_bytes: int = 0
    here_stored_bytes: int = 0
    seconds: float | None = None
    stall_seconds: float | None = None
    mirrored: bool = False
    why: str = ""
    tags: Tags = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failed try of a store operation, none of which has worked since `since`."""

    kind: str
    why: str
    since: float
    at: float


class History:
    """The latest steps of one job, and whether its store fails. Kept in memory only."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._passages: OrderedDict[StepId, Passage] = OrderedDict()
        self._failure: Failure | None = None

    @property
    def passages(self) -> list[Passage]:
        """All that is remembered, oldest step first."""
        return sorted(self._passages.values(), key=lambda passage: passage.id)

    @property
    def failure(self) -> Failure | None:
        """What the store says, if it fails now."""
        found = self._failure
        return found if found and self._clock() - found.at < LATELY_SECONDS else None

    # -- what the daemon tells ----------------------------------------------------------------

    def writing(self, snapshot: Snapshot) -> None:
        """A rank's snapshot is being written to the store; perhaps not for the first time."""
        passage = self._of(snapshot.id)
        passage.world = snapshot.world
        passage.sealed_at = passage.sealed_at or snapshot.sealed_at
        passage.begun_at = passage.begun_at or self._clock()
        passage.stall_seconds = max(passage.stall_seconds or 0.0, snapshot.stall_seconds)

    def wrote(self, snapshot: Snapshot, stored_bytes: int) -> None:
        """A rank's snapshot is in the store, and its step decided."""
        passage = self._of(snapshot.id)
        passage.here_raw_bytes += snapshot.data_bytes
        passage.here_stored_bytes += stored_bytes
        if passage.begun_at is not None:
            passage.seconds = max(self._clock() - passage.begun_at, 1e-3)

    def committed(self, decision: Decision) -> None:
        """The step is a checkpoint."""
        passage = self._of(decision.id)
        passage.state = StepState.COMMITTED
        passage.world, passage.tags, passage.why = decision.world, decision.tags, ""
        passage.raw_bytes, passage.stored_bytes = decision.raw_bytes, decision.stored_bytes
        passage.sealed_at, passage.committed_at = decision.sealed_at, self._clock()
        self.moved()

    def given_up(self, step: StepId, why: str) -> None:
        """The step will never be a checkpoint."""
        passage = self._of(step)
        passage.state, passage.why = StepState.ABORTED, why

    def mirrored(self, step: StepId) -> None:
        """The mirror holds a step; one that is not remembered needs no note."""
        if step in self._passages:
            self._passages[step].mirrored = True

    def failed(self, kind: str, why: str) -> None:
        """One try of a store operation failed."""
        now, before = self._clock(), self.failure
        self._failure = Failure(kind, why, before.since if before else now, now)

    def moved(self) -> None:
        """The store took something."""
        self._failure = None

    def _of(self, step: StepId) -> Passage:
        if step not in self._passages:
            self._passages[step] = Passage(step)
            while len(self._passages) > PASSAGES_MAX:
                self._passages.popitem(last=False)
        return self._passages[step]
