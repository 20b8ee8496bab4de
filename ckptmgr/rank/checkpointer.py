"""`with Checkpointer(...) as ckpt:` - snapshots, restore and drain, from the training loop."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ckptmgr.config import (
    CONTROL_TIMEOUT_SECONDS,
    DEFAULT_KEEP,
    DEFAULT_SLOTS,
    DRAIN_SECONDS,
    checked_limit,
    env_limit,
)
from ckptmgr.config import runtime_dir as default_runtime_dir
from ckptmgr.errors import CkptmgrError, RanksError, StateError, StepOrderError, UsageError
from ckptmgr.keep import Keep
from ckptmgr.preemption import Source, open_sources
from ckptmgr.rank.arguments import absolute_url, checked, checked_patterns, checked_state
from ckptmgr.rank.capture import Capture
from ckptmgr.rank.courier import Courier
from ckptmgr.rank.group import AGREE_SECONDS_MAX, Claimed, ranks_of, together
from ckptmgr.rank.handle import RestoredStep, SaveHandle, Stats
from ckptmgr.rank.link import Link, Wanted
from ckptmgr.rank.pace import OwnPace, Pace
from ckptmgr.rank.planner import Planner
from ckptmgr.rank.preempting import Preempting
from ckptmgr.rank.resuming import Live, Resuming
from ckptmgr.rank.saving import Saving
from ckptmgr.rank.schedule import parse_every
from ckptmgr.staging.hostbuffer import TAGS_BYTES_MAX, round_up
from ckptmgr.telling import tell
from ckptmgr.types import PAGE_BYTES, STEP_MAX, StepId

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
        keep: committed steps that are kept: the newest so many, at least 2, or a `ckptmgr.Keep`, as
            in Keep(last=3, every=1000, best=("loss", "min", 3)), or its text (docs/keeping.md).
        codec: "auto", "none", "zstd" or "planes".
        slots: snapshots that host memory holds, 2 or 3.
        overlap: copy parameters and optimizer state during the next forward and backward. None
            means no on CPU, and yes on CUDA for optimizers that were seen to step since the
            snapshot before; those in a CUDA graph are not (docs/decisions/0003-overlap.md).
        rng: include the random states of torch, CUDA, Python and NumPy.
        drain_timeout: longest wait for the last commit when the block is left, in seconds. A daemon
            that does not answer is waited for CONTROL_TIMEOUT_SECONDS longer, 30, and only these
            if an exception leaves the block.
        run_id: a launcher's name for this run, recorded in the claim.
        group: the process group whose ranks share the state; the default group if there is one.
        replicated: globs of paths in `state` that are equal on all ranks, beyond those that are
            known to be.
        max_d2h_gbps: limit on copies out of the tensors that overlap with training, in gigabits
            (10^9 bits) per second: 80 are 10 GB/s. 0 is none; None is CKPTMGR_MAX_D2H_GBPS or none.
            A copy that training waits for is not slowed down.
        preemption: who tells that this process will be ended: "signals" (SIGTERM and SIGUSR1), a
            plugin's name, a `ckptmgr.preemption.Source`, or several; None is CKPTMGR_PREEMPTION or
            none (docs/preemption.md).

    Entering claims a new attempt of the job, and so does a restore amid training. With many ranks,
    all of them enter, and all call `step`, `save` and `restore` with the same steps; every rank is
    told the same error.

    Raises (on entering):
        UsageError: a wrong argument, or one that differs from rank 0's.
        UnsupportedLeafError: a leaf of `state` that can not be stored exactly, with its path.
        StoreUnreachableError: the store does not answer, so that no attempt can be claimed.
        HostMemoryError: not enough shared memory.
        DaemonUnreachableError: no daemon runs and none can be started.
        RanksError: another rank failed or is missing, or the key-value store does not answer.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        state: MutableMapping[str, Any],
        *,
        every: int | str | None = "5m",
        keep: int | str | Keep = DEFAULT_KEEP,
        codec: str = "auto",
        slots: int = DEFAULT_SLOTS,
        overlap: bool | None = None,
        rng: bool = True,
        drain_timeout: float = DRAIN_SECONDS,
        run_id: str = "",
        group: ProcessGroup | None = None,
        replicated: Sequence[str] = (),
        max_d2h_gbps: float | None = None,
        preemption: str | Source | Iterable[str | Source] | None = None,
    ) -> None:
        self.state = checked_state(state)
        self.stats = Stats()
        self.restored: RestoredStep | None = None
        self._url = absolute_url(url)
        self._every = parse_every(every)
        self._keep = Keep.of(keep).wire
        self._slots = checked(slots, "slots", slots in (2, 3))
        self._codec = checked(codec, "codec", codec in _CODECS)
        self._drain_timeout = drain_timeout
        self._rng = rng
        self._run_id = run_id or os.environ.get("TORCHELASTIC_RUN_ID", "")
        self._ranks = ranks_of(group)
        alike = checked_patterns(replicated)
        self._sources = open_sources(preemption)
        self._max_d2h_gbps = (
            env_limit("CKPTMGR_MAX_D2H_GBPS")
            if max_d2h_gbps is None
            else checked_limit(max_d2h_gbps, "max_d2h_gbps")
        )
        self._capture = Capture(
            state,
            rng=rng,
            overlap=overlap,
            replicated=alike,
            group=group,
            max_d2h_gbps=self._max_d2h_gbps,
        )
        self._link: Link | None = None
        self._saving: Saving | None = None
        self._live = Live()
        self._last_step = -1
        self._stepped = self._restoring = False
        self._used = False

    # -- the block ----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._used:
            raise UsageError("is entered again; make a new one", subject="Checkpointer")
        self._used = True
        link = self._attach()
        pace = self._pace(link)
        saving = self._follow(link, pace)
        try:
            self._preempting = Preempting(self._sources, self._ranks.rank, link, pace)
        except BaseException:
            saving.close(clean=False)
            raise
        self._link, self._process = link, os.getpid()
        return self

    def _follow(self, link: Link, pace: Pace) -> Saving:
        """Save and restore under the attempt that `link` has."""
        saving = Saving(self._capture, link, pace, self._ranks, self.stats, self._url)
        self._resuming = Resuming(
            *(link, self._ranks, self.state, self._live, saving.release),
            rng=self._rng,
            url=self._url,
        )
        self._saving, self._stepped = saving, False
        return saving

    def _begin_anew(self, link: Link) -> None:
        """Claim another attempt: of this one, steps with the numbers that come next may have been
        saved already. What it has sealed is decided as that of any attempt that has ended.
        """
        before = self._entered()
        before.finish_copy()
        before.tell_handles()  # of this attempt the daemon is not asked again

        def claim() -> Claimed:
            link.begin_attempt()
            return Claimed(link.attempt, link.nonce, self._terms())

        def join() -> None:
            if claimed.attempt != link.attempt:
                link.begin_attempt((claimed.attempt, claimed.nonce))

        claimed = self._ranks.share(claim)
        together(self._ranks, "attach again", AGREE_SECONDS_MAX, join)
        pace = self._pace(link)
        self._follow(link, pace)
        before.end_pace()
        self._preempting.follow(pace)

    def _attach(self) -> Link:
        """Claim on rank 0, then join on the others; it returns when every host takes part, so
        that the memory of none is left out of what can be resumed from.
        """
        links: list[Link] = []

        def claim() -> Claimed:
            links.append(self._joined(Claimed(0, "")))
            return Claimed(links[0].attempt, links[0].nonce, self._terms())

        def join() -> None:
            if claimed.terms != self._terms():
                raise UsageError(
                    f"differ from those of rank 0: {self._terms()} and {claimed.terms}",
                    subject="arguments",
                )
            if not links:
                links.append(self._joined(claimed))
            self._capture.tell_parties(self._ranks.count)

        try:
            claimed = self._ranks.share(claim)
            together(self._ranks, "attach", AGREE_SECONDS_MAX, join)
            self._capture.heed_parties(self._ranks.count)
        except BaseException:
            self._capture.close()
            for link in links:
                link.close(clean=False)
            raise
        return links[0]

    def _terms(self) -> str:
        """What all ranks must say alike; shown where they do not."""
        return f"{self._url} every={self._every} slots={self._slots} keep={self._keep}"

    def _joined(self, claimed: Claimed) -> Link:
        table_bytes, data_bytes = self._capture.predict()
        wanted = Wanted(
            url=self._url,
            rank=self._ranks.rank,
            world=self._ranks.world,
            slots=self._slots,
            codec=self._codec,
            keep=self._keep,
            table_bytes=round_up(table_bytes + TAGS_BYTES_MAX, PAGE_BYTES),
            data_bytes=round_up(data_bytes, PAGE_BYTES),
            run_id=self._run_id,
            max_d2h_gbps=self._max_d2h_gbps,
        )
        return Link(default_runtime_dir(), wanted, (claimed.attempt, claimed.nonce))

    def _pace(self, link: Link) -> Pace:
        if self._ranks.world == 1:
            return OwnPace(self._every, self._slots, self.stats)
        courier = Courier(self._ranks, lambda: link.progress_bytes, self._tell, link.spooled_steps)
        return Planner(
            self._ranks.rank, self._every, self._slots, link.attempt, courier, self.stats
        )

    def _tell(self, why: str) -> None:
        self.stats.last_failure = why
        tell(why)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process:
            self._link = None  # a forked child falls out of its parent's block: all of it is his
            return
        saving = self._entered()
        drain_seconds = self._drain_timeout if kind is None else 0.0
        try:
            saving.leave_within(drain_seconds + CONTROL_TIMEOUT_SECONDS)
            if kind is None:
                saving.drain(self._drain_timeout)
            saving.tell_handles()
        finally:
            self._link = None
            try:
                self._preempting.close()
            finally:
                # What is to be resumed soon, perhaps on this host, stays in its memory.
                saving.close(clean=kind is None and not saving.preempted)

    def _entered(self) -> Saving:
        if self._link is None or self._saving is None:
            hint = "Write `with ckptmgr.Checkpointer(...) as ckpt:`."
            raise UsageError("is used outside its block", subject="Checkpointer", hint=hint)
        if os.getpid() != self._process:
            hint = "Save and restore in the process that entered the block."
            raise UsageError("is used in a forked child", subject="Checkpointer", hint=hint)
        return self._saving

    def _entered_alone(self, what: str) -> Saving:
        saving = self._entered()
        if saving.busy or self._restoring:
            amid = "restore" if self._restoring else "snapshot"
            raise UsageError(f"is called by a signal handler amid a {amid}", subject=what)
        return saving

    @property
    def attempt(self) -> int:
        """The attempt this block has claimed."""
        self._entered()
        return self._link.attempt if self._link is not None else 0

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
            UsageError: it has got the name `rng`, and `rng` is not False.
            StateError: a restore was cut short amid putting a step back, and none has succeeded
                since.
        """
        return self._entered().step(self._next_step(step), tags)

    def request(self) -> None:
        """Ask for a snapshot soon, as before a preemption: at the next `step` of one rank, or on
        all ranks at the start of the next window that is not planned yet, about a second later.

        Any rank may ask, from any thread or a signal handler.
        """
        self._entered().request()

    @property
    def preempted(self) -> bool:
        """Whether the last snapshot before a preemption was taken: leave the loop now.

        It turns true in a `step`, in the same one on all ranks, and stays so. The snapshot is
        sealed by then, and the daemon finishes it though this process be killed.
        """
        return self._saving is not None and self._saving.preempted

    def save(self, step: int, tags: Mapping[str, Any] | None = None) -> SaveHandle:
        """Snapshot now, whatever the cadence. All ranks call it with the same step.

        If no slot is free it waits for the store as long as bytes arrive there; then the oldest
        snapshot that is not committed is given up. Raises what `step` raises, and
        `HostMemoryError` or `DaemonUnreachableError` where no snapshot can be taken. A signal
        handler may call it, but for amid a snapshot or a restore (UsageError). Where one does while
        this call converts tags or waits for a slot, its later step is the one that is snapshotted:
        this returns the handle of that, and `step` returns None.
        """
        return self._entered().save(self._next_step(step), tags)

    def _next_step(self, step: int) -> int:
        """`step` as a plain int, remembered as the last one."""
        saving = self._entered_alone("save")
        if not self._live.whole:
            raise StateError(
                "is half of one step and half of another: a restore was cut short",
                subject="state",
                hint="Restore again, or leave the block.",
            )
        try:
            number = -1 if isinstance(step, bool) else operator.index(step)
        except TypeError:
            number = -1
        if number < 0:
            raise UsageError(f"{step!r} is not a step", subject="step")
        if number > STEP_MAX:
            raise UsageError(
                f"is greater than {STEP_MAX}, the greatest step that can be named",
                subject=f"step {number}",
                hint="Count steps of the optimizer, not tokens or milliseconds: tags= takes those.",
            )
        if number <= self._last_step:
            raise StepOrderError(f"comes after step {self._last_step}", subject=f"step {number}")
        self._last_step = number
        self._stepped = True
        saving.reached(number)
        return number

    # -- restore ------------------------------------------------------------------------------

    def restore(
        self, step: int | str | None = None, *, required: bool = False, before: str = ""
    ) -> int:
        """Put the last consistent step (or `step`: 1200, or "3.1200" for attempt 3) back.

        With `before`, an expression over tags as "loss > 4", the newest commit that the job came
        through before the first one for which it holds: to where silent corruption of data or of a
        device had not shown yet. Where it holds for none that is the newest, so it may stay in a
        script (docs/keeping.md).

        Returns its number, 0 if the job has none yet: then nothing is put back, and a warning says
        so where steps were taken before; they may be counted anew. After a `step` or `save` it
        claims another attempt first, so that steps of the same numbers may be saved again. Tensors
        are copied into the ones that exist; either everything is put back or nothing. Where a newer
        step was damaged, the one before is taken, a warning says so, and `restored.skipped` has the
        reasons.

        Raises:
            UsageError: a signal handler calls it amid a snapshot or another restore; or the name
                `rng` has come into `state`, and `rng` is not False.
            NothingToRestoreError: `step` is not there, or `required` and there is none.
            StateMismatchError: the saved and the live state differ; names every leaf.
            DamageError: there are steps, but none that can be read.
            StoreUnreachableError: the store does not answer.
        """
        self._entered_alone("restore").restores += 1
        self._restoring = True
        try:
            self._entered().fetching()
            if self._stepped and self._link is not None:
                self._begin_anew(self._link)
                self._entered().fetching()
            found = self._resuming.restore(step, required=required, before=before)
        except BaseException as error:
            self._entered().fetching()  # until somebody has asked for the end of it
            # Cut short here or on another rank: what it had decided must not be the next one's.
            self._stepped |= isinstance(error, RanksError) or not isinstance(error, CkptmgrError)
            raise
        finally:
            self._restoring = False
        if found is None:
            if self._last_step >= 0:
                self._begin_at_zero()
            return 0
        self.restored = found
        self._last_step = found.step
        self._entered().resumed_from(StepId(found.attempt, found.step))
        return found.step

    def _begin_at_zero(self) -> None:
        """Let the loop begin anew, though there was nothing to put back."""
        tell(
            f"there is no committed step to restore: nothing was put back, and the state is still "
            f"that of step {self._last_step}, while 0 is returned; required=True makes it an error",
            stacklevel=3,
        )
        self._last_step = -1
