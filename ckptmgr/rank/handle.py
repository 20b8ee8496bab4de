"""What `save`, `step` and `restore` hand out: the fate of one snapshot, and counts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Protocol

from ckptmgr.errors import CkptmgrError
from ckptmgr.rank.capture import Copy
from ckptmgr.types import Outcome, Snapshot

_WAIT_SLICE_SECONDS = 2.0
"""A wait for a commit asks the daemon in slices, so that another thread can ask in between."""

ANSWER_SECONDS_MAX = 5.0
"""How much longer than asked for a wait for a commit lasts, at most, while the daemon hangs. One
that only is busy answers in less; a question that is cut short costs a connection.
"""


class Owner(Protocol):
    """Who can tell what became of a snapshot."""

    def outcome_of(
        self, handle: SaveHandle, timeout_seconds: float, answer_seconds: float
    ) -> tuple[Outcome, str]:
        """The outcome and its reason, waiting at most `timeout_seconds` for a decision, and
        `answer_seconds` for who decides to say so.
        """


@dataclass(frozen=True, slots=True)
class RestoredStep:
    """What `restore` put back. `source` is "memory" or "store"; `skipped` names newer steps that
    could not be used, each with the reason.
    """

    step: int
    attempt: int
    source: str
    skipped: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Stats:
    """Counts of this attempt. `stall_seconds` is what snapshots cost the training thread."""

    snapshots: int = 0
    delayed: int = 0
    superseded: int = 0
    failures: int = 0
    stall_seconds: float = 0.0
    last_stall_seconds: float = 0.0
    last_failure: str = ""


class SaveHandle:
    """One snapshot on its way: `sealed` in host memory first, then `committed` in the store."""

    def __init__(self, owner: Owner, step: int) -> None:
        self._owner = owner
        self.step = step
        self.copy: Copy | None = None
        self.failure: CkptmgrError | None = None
        self.snapshot: Snapshot | None = None
        self.last_word: tuple[Outcome, str] | None = None

    @property
    def holds(self) -> bool:
        """Whether it is sealed, or is being copied and has not failed so far."""
        begun = self.snapshot is not None or self.copy is not None
        return begun and self.failure is None

    def sealed(self) -> bool:
        """Wait until the snapshot is sealed: it survives the death of this process from then on.

        Raises:
            TornSnapshotError: the state was changed while it was copied; nothing was sealed.
        """
        if self.copy is not None:
            self.copy.wait()
        if self.failure is not None:
            raise self.failure
        return True

    def committed(self, timeout: float | None = None) -> bool:
        """Wait until the step is a checkpoint; False when `timeout` (seconds) is over first, or
        ANSWER_SECONDS_MAX later if the daemon does not answer.

        After the block was left it tells what was known then, without waiting.

        Raises:
            CkptmgrError: the step was given up; the message says why.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        if self.copy is not None and not self.copy.wait(timeout):
            return False
        self.sealed()
        while True:
            left = deadline - time.monotonic()
            slice_seconds = max(0.0, min(left, _WAIT_SLICE_SECONDS))
            outcome, why = self.last_word or self._owner.outcome_of(
                self, slice_seconds, left + ANSWER_SECONDS_MAX
            )
            if outcome is Outcome.COMMITTED:
                return True
            if outcome is Outcome.ABORTED:
                raise CkptmgrError(f"was given up: {why}", subject=f"step {self.step}")
            if left <= 0 or self.last_word is not None:
                return False
