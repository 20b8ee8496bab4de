"""`with Checkpointer(...) as ckpt:` - snapshots, restore and drain, from the training loop."""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptmgr.config import (
    DEFAULT_KEEP,
    DEFAULT_SLOTS,
    DRAIN_SECONDS,
    PATIENCE_SECONDS_MIN,
    RESTORE_SECONDS_MAX,
)
from ckptmgr.config import runtime_dir as default_runtime_dir
from ckptmgr.errors import (
    CkptmgrError,
    DaemonUnreachableError,
    HostMemoryError,
    NothingToRestoreError,
    StepOrderError,
    SupersededError,
    UsageError,
)
from ckptmgr.rank.arguments import (
    absolute_url,
    checked,
    checked_state,
    parse_step,
    plain_tags,
    refuse_many_ranks,
)
from ckptmgr.rank.capture import Capture, Prepared
from ckptmgr.rank.handle import RestoredStep, SaveHandle, Stats
from ckptmgr.rank.link import Link, Wanted
from ckptmgr.rank.load import place_from
from ckptmgr.rank.schedule import Cadence, Patience, parse_every
from ckptmgr.staging.control import Done, Release, Restore, Restored, Wait, Waited
from ckptmgr.staging.hostbuffer import (
    TAGS_BYTES_MAX,
    HostBuffer,
    SlotWriter,
    round_up,
    table_bytes_needed,
)
from ckptmgr.staging.slots import Sealed, free_slot, superseded_slot
from ckptmgr.types import PAGE_BYTES, Outcome, Snapshot, Tags

SLOT_WAIT_SECONDS_MAX = 0.25
"""Longest pause of `step` for a store that has kept up so far: ten commits of a small state."""

HANDLES_MAX = 256
"""Save handles that are told their outcome when the block is left."""

_SLOT_LOOK_SECONDS = 0.002

_CODECS = ("auto", "none", "zstd", "planes")


class Checkpointer:
    """Keeps a training job restartable.

    Args:
        url: where the job's steps are kept: `file:///data/run7`, a path, or a plugin's scheme.
            One URL belongs to one job.
        state: names to modules, optimizers, schedulers, scalers, stateful loaders, anything with
            state_dict/load_state_dict, tensors, NumPy arrays and plain Python. Plain Python is
            replaced in this mapping by `restore`.
        every: cadence of `step`: a number of steps (100), a time ("5m"), or None for `save` only.
        keep: committed steps that are kept, at least 2.
        codec: "auto", "none", "zstd" or "planes".
        slots: snapshots that host memory holds, 2 or 3.
        overlap: copy parameters and optimizer state during the next forward and backward. None
            means yes on CUDA and no on CPU (docs/decisions/0003-overlap.md).
        rng: include the random states of torch, CUDA, Python and NumPy.
        drain_timeout: longest wait for the last commit when the block is left, in seconds.
        run_id: a launcher's name for this run, recorded in the claim.

    Entering claims a new attempt of the job.

    Raises (on entering):
        UsageError: a wrong argument.
        UnsupportedLeafError: a leaf of `state` that can not be stored exactly, with its path.
        StoreUnreachableError: the store does not answer, so that no attempt can be claimed.
        HostMemoryError: not enough shared memory.
        DaemonUnreachableError: no daemon runs and none can be started.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        state: MutableMapping[str, Any],
        *,
        every: int | str | None = "5m",
        keep: int = DEFAULT_KEEP,
        codec: str = "auto",
        slots: int = DEFAULT_SLOTS,
        overlap: bool | None = None,
        rng: bool = True,
        drain_timeout: float = DRAIN_SECONDS,
        run_id: str = "",
    ) -> None:
        self.state = checked_state(state)
        self.stats = Stats()
        self.restored: RestoredStep | None = None
        self._url = absolute_url(url)
        self._every = parse_every(every)
        self._keep = checked(keep, "keep", type(keep) is int and keep >= 1)
        self._slots = checked(slots, "slots", slots in (2, 3))
        self._codec = checked(codec, "codec", codec in _CODECS)
        self._drain_timeout = drain_timeout
        self._rng = rng
        self._run_id = run_id or os.environ.get("TORCHELASTIC_RUN_ID", "")
        refuse_many_ranks()
        self._capture = Capture(state, rng=rng, overlap=overlap)
        self._link: Link | None = None
        self._handle: SaveHandle | None = None
        self._handles: deque[SaveHandle] = deque(maxlen=HANDLES_MAX)
        self._last_step = -1
        self._fetching = False
        self._used = self._busy = False
        self._keeps_up = True

    # -- the block ----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._used:
            raise UsageError("is entered again; make a new one", subject="Checkpointer")
        self._used = True
        self._capture.prepare()  # refuses now what could not be saved later
        table_bytes, data_bytes = self._capture.predict()
        wanted = Wanted(
            url=self._url,
            rank=0,
            world=1,
            slots=self._slots,
            codec=self._codec,
            keep=self._keep,
            table_bytes=round_up(table_bytes + TAGS_BYTES_MAX, PAGE_BYTES),
            data_bytes=round_up(data_bytes, PAGE_BYTES),
            run_id=self._run_id,
        )
        self._link = Link(default_runtime_dir(), wanted)
        self._fetching = True  # the daemon may be filling a slot until we release it
        self._cadence = Cadence(self._every, time.monotonic())
        self._patience = Patience(max(PATIENCE_SECONDS_MIN, self._every.seconds))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        link = self._entered()
        try:
            if self._handle is not None and kind is None:
                self._drain(self._handle)
            self._tell_handles()
        finally:
            self._link = None
            try:
                self._capture.close()
            finally:  # a second Ctrl-C must not keep the daemon from hearing that we left
                link.close(clean=kind is None)

    def _drain(self, handle: SaveHandle) -> None:
        """Wait for the last commit. What is not committed in time is left to the daemon."""
        try:
            if handle.committed(self._drain_timeout):
                return
            left = f"step {handle.step} is sealed but not committed after {self._drain_timeout} s"
        except CkptmgrError as failure:
            left = str(failure)
        self._failed(f"{left}; the daemon keeps it in host memory and goes on trying")

    def _tell_handles(self) -> None:
        """Let those who kept a handle ask it after the block, when nobody can be asked any more."""
        for handle in self._handles:
            handle.last_word = Outcome.UNDECIDED, "the block was left before it was decided"
            with contextlib.suppress(CkptmgrError):
                handle.last_word = self.outcome_of(handle, 0.0)

    def _entered(self) -> Link:
        if self._link is None:
            hint = "Write `with ckptmgr.Checkpointer(...) as ckpt:`."
            raise UsageError("is used outside its block", subject="Checkpointer", hint=hint)
        return self._link

    @property
    def attempt(self) -> int:
        """The attempt this block has claimed."""
        return self._entered().attempt

    # -- save ---------------------------------------------------------------------------------

    def step(self, step: int, tags: Mapping[str, Any] | None = None) -> SaveHandle | None:
        """Say that training step `step` is complete; snapshots if one is due.

        Never waits for a slow store: if no slot is free, the snapshot is made up for later (see
        Cadence). Only a store that has kept up so far is given SLOT_WAIT_SECONDS_MAX to free one.
        Failures to snapshot are warned about and counted in `stats`; training goes on.

        Args:
            step: strictly increasing within the block.
            tags: scalars to remember with the step; converted only when a snapshot is due.

        Raises:
            StepOrderError: `step` is not greater than the last one.
            SupersededError: a newer attempt of this job is active; stop.
            UnsupportedLeafError: the state has got a leaf that can not be stored.
        """
        link = self._entered()
        step = self._next_step(step)
        self._check_superseded(link)
        now = time.monotonic()
        if not self._cadence.due(step, now):
            return None
        self._finish_copy()
        slot = self._slot_in_a_moment(link, now)
        if slot is None:
            self.stats.delayed += 1
            return None
        try:
            handle = self._snapshot(link, step, tags, slot)
        except (HostMemoryError, DaemonUnreachableError) as error:
            self._failed(str(error))
            return None
        self._cadence.taken(now)
        return handle

    def save(self, step: int, tags: Mapping[str, Any] | None = None) -> SaveHandle:
        """Snapshot now, whatever the cadence.

        If no slot is free it waits for the store as long as bytes arrive there; then the oldest
        snapshot that is not committed is given up. Raises what `step` raises, and
        `HostMemoryError` or `DaemonUnreachableError` where no snapshot can be taken.
        """
        link = self._entered()
        step = self._next_step(step)
        self._check_superseded(link)
        self._finish_copy()
        handle = self._snapshot(link, step, tags, self._slot_soon(link))
        self._cadence.taken(time.monotonic())
        return handle

    def _next_step(self, step: int) -> int:
        """`step` as a plain int, remembered as the last one."""
        if self._busy:
            raise UsageError("is called by a signal handler amid a snapshot", subject="save")
        try:
            number = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            number = -1
        if number < 0:
            raise UsageError(f"{step!r} is not a step", subject="step")
        if number <= self._last_step:
            raise StepOrderError(f"comes after step {self._last_step}", subject=f"step {number}")
        self._last_step = number
        return number

    def _check_superseded(self, link: Link) -> None:
        if link.buffer.superseded_by > link.attempt:
            raise SupersededError(
                f"attempt {link.buffer.superseded_by} is active",
                subject=f"attempt {link.attempt} of {self._url}",
            )

    def _snapshot(
        self, link: Link, step: int, tags: Mapping[str, Any] | None, slot: int
    ) -> SaveHandle:
        start = time.perf_counter()
        plain = plain_tags(tags)
        self._busy = True
        try:
            return self._copy_and_seal(link, step, plain, slot, start)
        finally:
            self._busy = False

    def _copy_and_seal(
        self, link: Link, step: int, plain: Tags, slot: int, start: float
    ) -> SaveHandle:
        prepared = self._capture.prepare()
        self._end_prefetch(link)
        if self._make_room(link, prepared):
            slot = self._slot_soon(link)
        link.wait_populated(slot)
        handle = SaveHandle(self, step)
        writer = link.buffer.begin(slot)

        def done(error: BaseException | None) -> None:
            try:
                if error is not None:
                    raise error
                stall = self._stalled(start, handle)
                handle.snapshot = self._seal(writer, link, step, prepared, plain, stall)
                link.sealed()
            except CkptmgrError as failure:
                handle.failure = failure
                self._failed(str(failure))

        self._handle = handle
        self._handles.append(handle)
        handle.copy = self._capture.copy(prepared, writer.data, done)
        self._stalled(start, handle)
        self.stats.snapshots += 1
        self.stats.stall_seconds += self.stats.last_stall_seconds
        if handle.failure is not None:
            raise handle.failure
        return handle

    def _stalled(self, start: float, handle: SaveHandle) -> float:
        """Measure the stall: up to the seal, or up to the return of an overlapped copy."""
        if handle.copy is None:
            self.stats.last_stall_seconds = time.perf_counter() - start
        return self.stats.last_stall_seconds

    def _seal(
        self,
        writer: SlotWriter,
        link: Link,
        step: int,
        prepared: Prepared,
        tags: Tags,
        stall_seconds: float,
    ) -> Snapshot:
        return writer.seal(
            attempt=link.attempt,
            nonce=link.nonce,
            rank=0,
            world=1,
            step=step,
            layout=prepared.layout_bytes,
            layout_hash=prepared.layout_hash,
            values=prepared.values,
            tags=tags,
            data_bytes=prepared.data_bytes,
            stall_seconds=stall_seconds,
        )

    def _finish_copy(self) -> None:
        """The copy before must be sealed before its sources or its slot are looked at again."""
        if self._handle is not None and self._handle.copy is not None:
            self._handle.copy.wait()

    def _make_room(self, link: Link, prepared: Prepared) -> bool:
        """Change to another buffer if this snapshot does not fit, or if somebody removed ours;
        True if it was changed.
        """
        table_bytes = table_bytes_needed(
            len(prepared.layout_bytes), len(prepared.values) + TAGS_BYTES_MAX
        )
        fits = link.buffer.capacity.holds(table_bytes, prepared.data_bytes)
        if fits and not link.lost:
            return False
        self._capture.forget_slots()
        link.grow(table_bytes, round_up(prepared.data_bytes, PAGE_BYTES))
        return True

    def _failed(self, why: str) -> None:
        self.stats.failures += 1
        self.stats.last_failure = why
        warnings.warn(f"ckptmgr: {why}", RuntimeWarning, stacklevel=4)

    # -- slots --------------------------------------------------------------------------------

    def _sealed(self, buffer: HostBuffer) -> Sealed:
        return [(snapshot, buffer.outcome(snapshot)) for snapshot in buffer.snapshots()]

    def _slot_now(self, link: Link, now: float) -> int | None:
        """A slot to write, or None while the store is slow but moving."""
        self._end_prefetch(link)
        sealed = self._sealed(link.buffer)
        slot = free_slot(self._slots, sealed)
        if slot is not None:
            return slot
        if not self._patience.exhausted(link.buffer.progress_bytes, now):
            return None
        return self._supersede(sealed)

    def _slot_in_a_moment(self, link: Link, now: float) -> int | None:
        """A slot to write; a store that has kept up so far gets a moment to free one.

        A small state in a fast loop is due again before its last commit has returned from fsync.
        A store that misses the moment once is not waited for until it has caught up by itself.
        """
        slot = self._slot_now(link, now)
        if slot is not None:
            self._keeps_up = True
            return slot
        pause, deadline = threading.Event(), now + SLOT_WAIT_SECONDS_MAX
        while self._keeps_up and slot is None:
            pause.wait(_SLOT_LOOK_SECONDS)  # the outcome is a word in shared memory: no wake-up
            slot = self._slot_now(link, time.monotonic())
            self._keeps_up = slot is not None or time.monotonic() < deadline
        return slot

    def _supersede(self, sealed: Sealed) -> int | None:
        victim = superseded_slot(sealed)
        if victim is None:
            return None
        self.stats.superseded += 1
        return victim.slot

    def _slot_soon(self, link: Link) -> int:
        """A slot to write, waiting for the oldest undecided snapshot if there is none."""
        while True:
            slot = self._slot_now(link, time.monotonic())
            if slot is not None:
                return slot
            oldest = superseded_slot(self._sealed(link.buffer))
            if oldest is not None and oldest.attempt == link.attempt:
                self._wait(link, oldest.step, 0.2)

    def _end_prefetch(self, link: Link) -> None:
        """Before the first slot is written, stop the daemon from filling one."""
        if self._fetching:
            self._release(link)

    def _release(self, link: Link) -> None:
        self._fetching = False
        try:
            link.ask(Release(), Done)
        except DaemonUnreachableError as error:
            self._failed(str(error))  # a dead daemon fetches nothing and lends nothing

    # -- wait ---------------------------------------------------------------------------------

    def outcome_of(self, handle: SaveHandle, timeout_seconds: float) -> tuple[Outcome, str]:
        """What became of a snapshot, waiting at most `timeout_seconds` for a decision."""
        link, snapshot = self._entered(), handle.snapshot
        if snapshot is not None and link.buffer.unchanged(snapshot):
            outcome = link.buffer.outcome(snapshot)
            if outcome is Outcome.COMMITTED:
                return outcome, ""
        return self._wait(link, handle.step, timeout_seconds)

    def _wait(self, link: Link, step: int, timeout_seconds: float) -> tuple[Outcome, str]:
        try:
            waited = link.ask(Wait(step, timeout_seconds), Waited)
        except DaemonUnreachableError as error:
            return Outcome.UNDECIDED, str(error)
        return Outcome(waited.outcome), waited.why

    # -- restore ------------------------------------------------------------------------------

    def restore(self, step: int | str | None = None, *, required: bool = False) -> int:
        """Put the last consistent step (or `step`: 1200, or "3.1200" for attempt 3) back.

        Returns its number, 0 if the job has none yet. Tensors are copied into the ones that
        exist; either everything is put back or nothing. Where a newer step was damaged, the one
        before is taken, a warning says so, and `restored.skipped` has the reasons.

        Raises:
            NothingToRestoreError: `step` is not there, or `required` and there is none.
            StateMismatchError: the saved and the live state differ; names every leaf.
            DamageError: there are steps, but none that can be read.
            StoreUnreachableError: the store does not answer.
        """
        link = self._entered()
        attempt, number = parse_step(step)
        reply = link.ask(Restore(number, attempt), Restored, RESTORE_SECONDS_MAX)
        if reply.attempt == 0:
            self._release(link)
            _tell_skipped("nothing to restore", reply)
            if required:
                raise NothingToRestoreError("the job has no committed step", subject=self._url)
            return 0
        try:
            self._place(link, reply)
        finally:
            self._release(link)
        self.restored = RestoredStep(reply.step, reply.attempt, reply.source, reply.skipped)
        self._last_step = reply.step
        _tell_skipped(f"fell back to step {reply.step}", reply)
        return reply.step

    def _place(self, link: Link, reply: Restored) -> None:
        if Path(reply.path) == link.buffer.path:
            link.wait_populated(reply.slot)
            place_from(link.buffer, reply, self.state, rng=self._rng)
            return
        with HostBuffer.open(Path(reply.path)) as buffer:
            place_from(buffer, reply, self.state, rng=self._rng)


def _tell_skipped(result: str, reply: Restored) -> None:
    if reply.skipped:
        reasons = "; ".join(f"{one}: {why}" for one, why in reply.skipped)
        warnings.warn(f"ckptmgr: {result}; skipped {reasons}", RuntimeWarning, stacklevel=3)
