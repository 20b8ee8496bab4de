"""One snapshot after another: a slot, a copy, a seal, and what becomes of it."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptmgr.config import CONTROL_TIMEOUT_SECONDS
from ckptmgr.errors import (
    CkptmgrError,
    DaemonUnreachableError,
    HostMemoryError,
    SupersededError,
    UsageError,
)
from ckptmgr.rank.arguments import plain_tags
from ckptmgr.rank.capture import Capture, Prepared
from ckptmgr.rank.group import Ranks
from ckptmgr.rank.handle import SaveHandle, Stats
from ckptmgr.rank.link import Link
from ckptmgr.rank.pace import Look, Pace
from ckptmgr.staging.control import Done, Release, Wait, Waited
from ckptmgr.staging.hostbuffer import (
    TAGS_BYTES_MAX,
    SlotWriter,
    round_up,
    table_bytes_needed,
)
from ckptmgr.staging.reached import reach
from ckptmgr.telling import tell
from ckptmgr.types import PAGE_BYTES, Outcome, Snapshot, StepId, Tags

HANDLES_MAX = 256
"""Save handles that are told their outcome when the block is left."""

_WAIT_SECONDS = 0.2
"""How long one question to the daemon waits for a slot; then the slots are looked at again."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A step that is to be snapshotted: the tags that this rank writes, the seconds that these
    took, and how many restores there were before.
    """

    step: int
    tags: Tags
    spent_seconds: float
    restores: int


class Saving:
    """The snapshots of one block. `restores` counts what was put back into their state."""

    def __init__(
        self, capture: Capture, link: Link, pace: Pace, ranks: Ranks, stats: Stats, url: str
    ) -> None:
        self._capture, self._link, self._pace, self._ranks = capture, link, pace, ranks
        self._stats = stats
        self._url = url
        self._handle: SaveHandle | None = None
        self._handles: deque[SaveHandle] = deque(maxlen=HANDLES_MAX)
        self._fetching_under: int | None = None
        self.restores = 0
        if ranks.world == 1:  # only then the daemon begins by filling a slot
            self.fetching()
        self.busy = False

    def step(self, step: int, tags: Mapping[str, Any] | None) -> SaveHandle | None:
        """Snapshot if one is due and a slot is free."""
        self._check_superseded()
        if not self._pace.due(step, self._look):
            return None
        asked = self._asked(step, tags)
        try:
            handle = self._snapshot(
                asked,
                lambda: self._pace.slot(step, lambda: self._look_to_write(soon=True)),
                soon=True,
            )
        except (HostMemoryError, DaemonUnreachableError) as error:
            self.failed(str(error))
            return None
        if handle is None:
            self._stats.delayed += 1
        elif self._pace.preempted:
            self.finish_copy()  # the loop may go on to anything now, and no other will follow
        return handle if handle is not None and handle.step == step else None

    def save(self, step: int, tags: Mapping[str, Any] | None) -> SaveHandle:
        """Snapshot now; the handle of a later step if a signal handler has saved one meanwhile."""
        self._check_superseded()
        asked = self._asked(step, tags)

        def look() -> Look:
            return self._look_to_write(soon=False)

        handle = self._snapshot(
            asked, lambda: self._pace.slot_soon(step, look, self._wait_for), soon=False
        )
        assert handle is not None, "it waits for a slot"
        return handle

    def _asked(self, step: int, tags: Mapping[str, Any] | None) -> _Asked:
        """What is to be snapshotted. A loss on a GPU is waited for, and signal handlers run
        meanwhile: no slot may have been chosen yet.
        """
        restores, start = self.restores, time.perf_counter()
        plain = plain_tags(tags) if self._ranks.rank == 0 else {}
        return _Asked(step, plain, time.perf_counter() - start, restores)

    def request(self) -> None:
        """Snapshot soon."""
        self._pace.request()

    def preempt(self) -> None:
        """Snapshot soon, for the last time."""
        self._pace.preempt()

    @property
    def preempted(self) -> bool:
        """Whether that snapshot was taken."""
        return self._pace.preempted

    def resumed_from(self, step: StepId) -> None:
        """What this attempt goes on from."""
        self._pace.resumed_from(step)

    def reached(self, step: int) -> None:
        """Tell whoever looks at host memory how far training has come."""
        self._link.populate_all()
        reach(self._link.buffer.memory, self._link.attempt, step)

    def _check_superseded(self) -> None:
        newer = self._link.buffer.superseded_by
        if newer > self._link.attempt:
            raise SupersededError(
                f"attempt {newer} is active",
                subject=f"attempt {self._link.attempt} of {self._url}",
            )

    # -- one snapshot -------------------------------------------------------------------------

    def _snapshot(
        self, asked: _Asked, choose: Callable[[], int | None], *, soon: bool
    ) -> SaveHandle | None:
        """Fill the slot that `choose` finds; None where it finds none.

        Until `busy` is set a signal handler may save, perhaps into the slot that was chosen here:
        then that choice is no more. What it saved is a later step, which makes this one needless.
        """
        while True:
            newest = self._handle
            if newest is not None and newest.step > asked.step and newest.holds:
                return newest
            self.finish_copy()
            slot = choose()
            if slot is None:
                return None
            start = time.perf_counter() - asked.spent_seconds
            self.busy = True
            try:
                if self.restores != asked.restores:
                    raise UsageError(
                        "is not that of the state any more: a signal handler has restored",
                        subject=f"step {asked.step}",
                        hint="Go on behind the step that it restored.",
                    )
                if self._handle is newest:
                    handle = self._copy_and_seal(asked.step, asked.tags, slot, start, soon=soon)
                    self._pace.taken()
                    return handle
            finally:
                self.busy = False

    def _copy_and_seal(
        self, step: int, plain: Tags, slot: int, start: float, *, soon: bool
    ) -> SaveHandle:
        prepared = self._capture.prepare()
        self._end_prefetch(soon=soon)
        if self._make_room(prepared, soon=soon):
            slot = self._pace.slot_anew(step, self._look, self._wait_for)
        self._link.wait_populated(slot)
        handle = SaveHandle(self, step)
        writer = self._link.buffer.begin(slot)
        to_seal, trainer = [prepared], threading.get_ident()

        def done(error: BaseException | None) -> None:
            # The copy keeps this as long as somebody keeps the handle, and the tensors must not
            # stay when training drops them.
            copied = to_seal.pop()
            try:
                if error is not None:
                    raise error
                stall = self._stalled(start, handle)
                handle.snapshot = self._seal(writer, step, copied, plain, stall)
                self._link.sealed()
            except CkptmgrError as failure:
                self._not_sealed(handle, failure.with_traceback(None))
            except Exception as failure:
                if threading.get_ident() == trainer:
                    raise  # it may be a signal handler's, which came over the copy
                self._not_sealed(
                    handle, HostMemoryError(f"was not copied: {failure!r}", subject=f"step {step}")
                )

        self._handle = handle
        handle.copy = self._capture.copy(prepared, writer.data, done)
        self._stalled(start, handle)
        self._stats.snapshots += 1
        self._stats.stall_seconds += self._stats.last_stall_seconds
        if handle.failure is not None:
            raise handle.failure
        self._handles.append(handle)
        return handle

    def _not_sealed(self, handle: SaveHandle, failure: CkptmgrError) -> None:
        """Tell it, and whoever asks the handle; later snapshots have nothing to do with it."""
        handle.failure = failure
        self.failed(str(failure))

    def _stalled(self, start: float, handle: SaveHandle) -> float:
        """Measure the stall: up to the seal, or up to the return of an overlapped copy."""
        if handle.copy is None:
            self._stats.last_stall_seconds = time.perf_counter() - start
        return self._stats.last_stall_seconds

    def _seal(
        self, writer: SlotWriter, step: int, prepared: Prepared, tags: Tags, stall_seconds: float
    ) -> Snapshot:
        return writer.seal(
            attempt=self._link.attempt,
            nonce=self._link.nonce,
            rank=self._ranks.rank,
            world=self._ranks.world,
            step=step,
            layout=prepared.layout_bytes,
            layout_hash=prepared.layout_hash,
            values=prepared.values,
            tags=tags,
            data_bytes=prepared.data_bytes,
            stall_seconds=stall_seconds,
        )

    def finish_copy(self) -> None:
        """The copy before must be sealed before its sources or its slot are looked at again."""
        if self._handle is not None and self._handle.copy is not None:
            self._handle.copy.wait()

    def _make_room(self, prepared: Prepared, *, soon: bool) -> bool:
        """Change to another buffer if this snapshot does not fit, or if somebody removed ours;
        True if it was changed.
        """
        table_bytes = table_bytes_needed(
            len(prepared.layout_bytes), len(prepared.values) + TAGS_BYTES_MAX
        )
        fits = self._link.buffer.capacity.holds(table_bytes, prepared.data_bytes)
        if fits and not self._link.lost:
            return False
        self._capture.forget_slots()
        self._link.grow(table_bytes, round_up(prepared.data_bytes, PAGE_BYTES), soon=soon)
        return True

    def failed(self, why: str) -> None:
        """Count and tell a failure that does not stop training."""
        self._stats.failures += 1
        self._stats.last_failure = why
        tell(why, stacklevel=4)

    # -- slots --------------------------------------------------------------------------------

    def _look(self) -> Look:
        buffer, handle = self._link.buffer, self._handle
        sealed = [(snapshot, buffer.outcome(snapshot)) for snapshot in buffer.snapshots()]
        unfinished = handle is not None and handle.snapshot is None and handle.failure is None
        copying = handle.step if handle is not None and unfinished else None
        return Look(sealed, copying, buffer.progress_bytes)

    def _look_to_write(self, *, soon: bool) -> Look:
        """Look for a slot to write: none is the daemon's from now on; errors of `_end_prefetch`."""
        self._end_prefetch(soon=soon)
        return self._look()

    def _end_prefetch(self, *, soon: bool) -> None:
        """Before the first slot is written, stop the daemon from filling one. One that hangs is not
        dead: it would go on filling the slot that it was at.

        Raises:
            DaemonUnreachableError: it does not answer; no slot may be written yet.
        """
        if self._may_fetch:
            self._release(soon=soon)

    @property
    def _may_fetch(self) -> bool:
        """Whether the daemon may be filling a slot. Whoever has attached us again since is another
        one, and the one before is dead; or the same one, which ended what it did for us.
        """
        return self._fetching_under == self._link.rejoined

    def fetching(self) -> None:
        """Know that the daemon may fill a slot from now on, until `release` was answered."""
        self._fetching_under = self._link.rejoined

    def release(self) -> None:
        """Let the daemon have back what it lent, and end what it still fetches."""
        self.fetching()  # since this instant, whichever daemon has fetched
        try:
            self._release(soon=False)
        except DaemonUnreachableError as error:
            self.failed(str(error))  # who writes a slot asks again

    def _release(self, *, soon: bool) -> None:
        self._link.populate_all()
        try:
            if soon:
                self._link.ask_soon(Release(), Done)
            else:
                self._link.ask(Release(), Done, seconds_max=CONTROL_TIMEOUT_SECONDS)
        except DaemonUnreachableError:
            if self._may_fetch:
                raise
        self._fetching_under = None

    # -- what became of it --------------------------------------------------------------------

    def outcome_of(
        self, handle: SaveHandle, timeout_seconds: float, answer_seconds: float
    ) -> tuple[Outcome, str]:
        """What became of a snapshot, waiting at most `timeout_seconds` for a decision, and
        `answer_seconds` for the daemon.
        """
        if self._is_committed(handle):
            return Outcome.COMMITTED, ""
        return self._wait(handle.step, timeout_seconds, answer_seconds)

    def _is_committed(self, handle: SaveHandle) -> bool:
        """Whether host memory says so."""
        return (handle.snapshot, Outcome.COMMITTED) in self._link.sealed_here()

    def _wait(
        self, step: int, timeout_seconds: float, answer_seconds: float = math.inf
    ) -> tuple[Outcome, str]:
        try:
            return self._ask(step, timeout_seconds, answer_seconds)
        except DaemonUnreachableError as error:
            if self._link.leaving:
                raise
            return Outcome.UNDECIDED, str(error)

    def _ask(
        self, step: int, timeout_seconds: float, answer_seconds: float = math.inf
    ) -> tuple[Outcome, str]:
        waited = self._link.ask(Wait(step, timeout_seconds), Waited, seconds_max=answer_seconds)
        return Outcome(waited.outcome), waited.why

    def _wait_for(self, snapshot: Snapshot) -> None:
        # Perhaps by what this signal handler interrupts; and of another attempt nobody can ask.
        if self._link.is_asked or snapshot.attempt != self._link.attempt:
            threading.Event().wait(_WAIT_SECONDS)
        else:
            self._wait(snapshot.step, _WAIT_SECONDS)

    def leave_within(self, seconds: float) -> None:
        """Bound what is asked on the way out, all of it together."""
        self._link.leave_within(seconds)

    def drain(self, timeout_seconds: float) -> None:
        """Wait for the last commit. What is not committed in time is left to the daemon."""
        handle = self._handle
        if handle is None:
            return
        try:
            if handle.committed(timeout_seconds):
                return
            left = f"step {handle.step} is sealed but not committed after {timeout_seconds} s"
        except CkptmgrError as failure:
            left = str(failure)
        self.failed(f"{left}; the daemon keeps it in host memory and goes on trying")

    def tell_handles(self) -> None:
        """Let those who kept a handle ask it after the block, when nobody can be asked any more.

        After a question without an answer only host memory is asked.
        """
        answers = True
        for handle in self._handles:
            handle.last_word = Outcome.UNDECIDED, "the block was left before it was decided"
            if self._is_committed(handle):
                handle.last_word = Outcome.COMMITTED, ""
            elif answers:
                try:
                    handle.last_word = self._ask(handle.step, 0.0)
                except DaemonUnreachableError:
                    answers = False
                except CkptmgrError:
                    continue

    def end_pace(self) -> None:
        """Another attempt has a pace of its own."""
        self._pace.close()

    def close(self, *, clean: bool) -> None:
        """Leave the job."""
        with contextlib.ExitStack() as leaving:
            # A second Ctrl-C must not keep the daemon from hearing that we left.
            leaving.callback(self._link.close, clean=clean)
            leaving.callback(self._pace.close)
            leaving.callback(self._capture.close)
