"""Copies tensors behind the back of the training thread, and knows when that was not safe.

    training thread                       copying thread
    read version counters, hand over  ->  copy
    forward, backward                     copied; note where the training thread is
    optimizer.step: pre-hook waits    <-  it moved on, or said so: read the counters again
                                          equal: seal     different: TornSnapshotError

PyTorch counts a write when it is over. A counter that is read while a write is under way says
nothing, so the second reading waits until the training thread was seen to leave the call that it
was in when the copy ended. Where another thread waits for the copy, the one that started it may be
idle for good: there it is enough that the kernel has it in one sleep from one look to the next, and
none of the threads that torch lets work for it awake.

Writes that PyTorch does not count (through `.data`, by CUDA graphs, by fused kernels of optimizers
that are called by hand, by kernels outside PyTorch or written in Python) are not found:
overlap=False is for code that makes them.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ckptmgr.bucket import Bucket
from ckptmgr.errors import CkptmgrError, TornSnapshotError
from ckptmgr.rank.latch import Latch
from ckptmgr.rank.pieces import Pair, paced, shares
from ckptmgr.rank.quiet import LOOK_SECONDS_MAX, wait_until_quiet
from ckptmgr.rank.tensors import carried

SHARE_BYTES_MIN = 8 << 20
"""What one more thread must have to copy: 1 ms, for one wait of 0.1 ms."""

SHARES_MAX = 8
"""Threads that copy; on more cores than that it is the memory that is waited for."""

LEAVES_NAMED_MAX = 5

JOIN_SECONDS_MAX = 1.0
"""The last instructions of a thread that has said that it ends."""

Finish = Callable[[BaseException | None], object]


def copy_tensors(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy logical values, bit by bit, and return when they are in place.

    One call for all: it halves the cost of tiny tensors, and on a GPU waits only once.
    """
    start_copy(targets, sources)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def start_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """As `copy_tensors`, but what comes from a GPU or goes there may still be on its way."""
    if not targets:
        return
    with torch.no_grad():
        moved = [carried(source) for source in sources]
        torch._foreach_copy_(targets, moved, non_blocking=True)


class Turn:
    """One hand-over of work to the copying thread.

    It is published before the work is in the queue, and `handed` after: an exception in between
    leaves a turn that is not handed, which `settle` cancels. The copying thread says `running`
    before it looks at `cancelled`, the training thread says `cancelled` before it looks at
    `running`: one of them sees the other.

    `judged` is set when the sources may be written again, `ended` when the slot may be, too.
    `awaited` is said by a thread that waits for the copy and is not the one that trains.
    """

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.handed = self.cancelled = self.running = self.awaited = False
        self.judged, self.ended = Latch(), Latch()
        self._settler: int | None = None
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()

    @property
    def at_work(self) -> bool:
        """Whether the copying thread is at it or will be; False also when that thread has ended."""
        return (self.handed or self.running) and not self.ended.is_set and self.lane.runs

    def hand_over(self, work: Job | Errand) -> None:
        """Put the work into the queue of its lane."""
        self.lane.jobs.put((self, work))
        self.handed = True

    def await_end(self) -> None:
        """Wait until nothing of it reads a leaf or writes a slot any more."""
        while self.at_work:
            self.ended.wait(LOOK_SECONDS_MAX)

    def rest(self) -> None:
        """Said by `settle`: this thread is not writing as long as it is in there."""
        self._settler = threading.get_ident()
        self._bell.put(None)

    def rests(self) -> bool:
        """Whether that thread is still there: an exception may have taken it out of the wait."""
        frame = sys._current_frames().get(self._settler) if self._settler is not None else None
        while frame is not None and frame.f_code is not CopyThread.settle.__code__:
            frame = frame.f_back
        return frame is not None

    def wait_for_rest(self, timeout_seconds: float) -> None:
        """Wait until somebody settles; may return early."""
        with contextlib.suppress(queue.Empty):
            self._bell.get(timeout=timeout_seconds)


@dataclass(slots=True)
class Job:
    """Leaves that are copied in the background; `torn` hears the paths that changed meanwhile.

    `counted[i]` has the version counter for writes into `sources[i]`. `limit` holds as long as the
    training thread does not wait for the copy.
    """

    targets: list[Tensor]
    sources: list[Tensor]
    counted: list[Tensor]
    paths: list[str]
    finish: Finish
    torn: Callable[[list[str]], None]
    limit: Bucket | None = None
    versions: list[int] = field(init=False)
    trainer: int = field(default_factory=threading.get_ident)
    task: int = field(default_factory=threading.get_native_id)
    streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = [tensor._version for tensor in self.counted]

    def run(self, turn: Turn) -> None:
        """Copy, wait until the training thread is not writing, judge, and tell."""
        error: BaseException | None = None
        try:
            self._copy(turn)
            wait_until_quiet(self.trainer, self.task, turn)
            error = self._judge()
        except Exception as failure:  # noqa: BLE001 - handed to the owner of the snapshot
            error = failure
        turn.judged.set()
        self.finish(error)

    def give_up(self) -> None:
        """Tell that it was not copied."""
        self.finish(CkptmgrError("was interrupted before it was copied", subject="snapshot"))

    def _copy(self, turn: Turn) -> None:
        pairs = list(zip(self.targets, self.sources, strict=True))
        for piece in [pairs] if self.limit is None else paced(pairs, self.limit, turn):
            self._start(piece)
        for stream in self.streams.values():
            # It sleeps until then: to spin would take a core from training.
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            copied.record(stream)
            copied.synchronize()

    def _start(self, pairs: list[Pair]) -> None:
        for device, stream in self.streams.items():
            there = [pair for pair in pairs if pair[1].device == device]
            # Leaving the stream goes back to this thread's device: it must not be the first one,
            # on which that would open a context.
            torch.cuda.set_device(device)
            with torch.cuda.stream(stream):
                start_copy([target for target, _ in there], [source for _, source in there])
        _copy_pairs([pair for pair in pairs if pair[1].device not in self.streams])

    def _judge(self) -> TornSnapshotError | None:
        now = [tensor._version for tensor in self.counted]
        if now == self.versions:
            return None
        pairs = zip(self.versions, now, strict=True)
        torn = [path for path, (a, b) in zip(self.paths, pairs, strict=True) if a != b]
        self.torn(torn)
        more = f" and {len(torn) - LEAVES_NAMED_MAX} more" if len(torn) > LEAVES_NAMED_MAX else ""
        return TornSnapshotError(
            "was changed while it was copied", subject=", ".join(torn[:LEAVES_NAMED_MAX]) + more
        )


@dataclass(slots=True)
class Errand:
    """Leaves that are copied while the training thread waits, on the cores that it leaves alone."""

    pairs: list[Pair]
    cores: int = field(default_factory=torch.get_num_threads)
    failure: Exception | None = field(init=False)

    def __post_init__(self) -> None:
        self.failure = CkptmgrError("has ended before the copy", subject="copying thread")

    def run(self, turn: Turn) -> None:
        """Copy; a failure is for the thread that waits."""
        try:
            nbytes = sum(target.nbytes for target, _ in self.pairs)
            count = min(self.cores, SHARES_MAX, nbytes // SHARE_BYTES_MIN)
            turn.lane.copy(shares(self.pairs, count) if count > 1 else [self.pairs])
            self.failure = None
        except Exception as failure:  # noqa: BLE001 - raised in the thread that waits
            self.failure = failure
        turn.judged.set()

    def give_up(self) -> None:
        """Leave the failure as it is."""


class Lane:
    """A thread and its own queue. Nothing here waits for a thread that may not have started.

    Python's `Thread.is_alive` and `join` are not asked: interrupted, they may call a thread dead
    that runs (Python 3.11). The thread itself says when it ends; a forked child has none.
    """

    def __init__(self, torch_threads: int = 0) -> None:
        self.jobs: queue.SimpleQueue[tuple[Turn, Job | Errand] | None] = queue.SimpleQueue()
        self._torch_threads = torch_threads
        self._helpers: list[Lane] = []
        self._process = os.getpid()
        self._started = self._leaving = False
        self._ended = Latch()
        self._thread = threading.Thread(target=self._serve, name="ckptmgr-copy", daemon=True)

    @property
    def runs(self) -> bool:
        """Whether what is in the queue will be taken out."""
        return self._started and not self._ended.is_set and self._process == os.getpid()

    @property
    def takes(self) -> bool:
        """Whether more may be put into the queue."""
        return self.runs and not self._leaving

    def start(self) -> None:
        """Start the thread; an exception leaves a lane that never `runs`."""
        try:
            self._thread.start()
        except RuntimeError as error:
            # The Event in there, interrupted, may complain of its lock: tell what interrupted it.
            raise error.__context__ or error from None
        self._started = True

    def leave(self) -> None:
        """Let the thread end after what is queued, also one whose start was interrupted."""
        self._leaving = True
        if self._process == os.getpid():
            self.jobs.put(None)

    def join(self) -> None:
        """Wait for the end of a thread that was told to leave."""
        while self.runs:
            self._ended.wait(LOOK_SECONDS_MAX)
        if self._started and self._process == os.getpid():
            self._thread.join(JOIN_SECONDS_MAX)

    def copy(self, lists: list[list[Pair]]) -> None:
        """Copy all lists, each in a thread of its own where there can be one; called by work that
        this thread runs. Nothing is written to any more when it returns.
        """
        own, *others = lists
        self._helpers = [helper for helper in self._helpers if helper.takes]
        handed = []
        for at, pairs in enumerate(others):
            errand = Errand(pairs, cores=1)
            turn = self._hand_to_helper(at, errand)
            if turn is None:
                own = own + pairs
            else:
                handed.append((turn, errand))
        try:
            _copy_pairs(own)
        finally:
            for turn, _ in handed:
                turn.await_end()
        for _, errand in handed:
            if errand.failure is not None:
                raise errand.failure

    def _hand_to_helper(self, at: int, errand: Errand) -> Turn | None:
        """Hand it to the thread of this number; None if no thread can be started."""
        if at >= len(self._helpers):
            helper = Lane(self._torch_threads)
            try:
                helper.start()
            except RuntimeError:
                return None
            self._helpers.append(helper)
        turn = Turn(self._helpers[min(at, len(self._helpers) - 1)])
        turn.hand_over(errand)
        return turn

    def _serve(self) -> None:
        try:
            self._torch_threads = self._torch_threads or torch.get_num_threads()
            _use_one_core(self._torch_threads)
            while (given := self.jobs.get()) is not None:
                turn, work = given
                turn.running = True
                try:
                    if turn.cancelled:
                        work.give_up()
                    else:
                        work.run(turn)
                finally:
                    # Its sources may be the only references to tensors that training dropped.
                    del given, work
                    turn.judged.set()
                    turn.ended.set()
        finally:
            for helper in self._helpers:
                helper.leave()
                helper.join()
            self._ended.set()


class CopyThread:
    """One thread that runs one job at a time; started with the first.

    PyTorch splits a copy of more than 128 KiB over its threads and waits for the last of them. With
    more runnable threads than cores (data loaders) each wait costs a turn of the scheduler: 5,000
    copies of 200 KiB took 3.1 s instead of 0.3 s, with four times more threads than cores. So every
    thread that copies does it on one core. While training goes on that is this one; while training
    waits, the leaves are shared out to as many as it has cores, with one wait for all of them.

    A signal handler may raise between any two instructions of the training thread. Every method may
    be left like that; `settle`, `drain` and `close` work afterwards, and may be called again.
    """

    def __init__(self) -> None:
        self._lane: Lane | None = None
        self._turn: Turn | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Copy tensors and wait for it; what was handed over before must be drained.

        Those in host memory go to the thread; this one copies the others meanwhile.

        Raises:
            CkptmgrError: the copying thread could not run.
        """
        pairs = list(zip(targets, sources, strict=True))
        errand = Errand([pair for pair in pairs if pair[1].is_cpu])
        if errand.pairs:
            self._hand_over(errand)
        _copy_pairs([pair for pair in pairs if not pair[1].is_cpu])
        self.drain()
        if not errand.pairs:
            return
        if errand.failure is not None:
            raise errand.failure

    def start(self, job: Job) -> Turn:
        """Run `job` in the background; the one before must be drained.

        The copies on a GPU come after everything that is in its current stream now.
        """
        for device in {source.device for source in job.sources if source.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            job.streams[device] = stream
        return self._hand_over(job)

    def _hand_over(self, work: Job | Errand) -> Turn:
        turn = Turn(self._lane_that_takes())
        self._turn = turn
        turn.hand_over(work)
        return turn

    def _lane_that_takes(self) -> Lane:
        lane = self._lane
        if lane is not None and lane.takes:
            return lane
        if lane is not None:
            lane.leave()
        self._lane = lane = Lane()
        lane.start()
        return lane

    def settle(self, timeout_seconds: float | None = None) -> None:
        """Wait until the leaves in flight may be written again, or the time is over.

        Call it in the thread that trains: that it is here shows that it is not writing.
        """
        turn = self._turn
        if turn is None or turn.judged.is_set:
            return
        if not turn.handed:
            turn.cancelled = True
        turn.rest()
        end = time.monotonic() + (math.inf if timeout_seconds is None else timeout_seconds)
        while turn.at_work:
            left = end - time.monotonic()
            if left <= 0 or turn.judged.wait(min(left, LOOK_SECONDS_MAX)):
                return
        self._turn = None

    def drain(self) -> None:
        """Wait until nothing in flight reads a leaf or writes a slot any more."""
        self.settle()
        turn = self._turn
        if turn is not None:
            turn.await_end()
        self._turn = None

    def close(self) -> None:
        """Finish what is in flight and end the thread."""
        self.drain()
        lane = self._lane
        if lane is not None:
            lane.leave()
            lane.join()
        self._lane = None


def _copy_pairs(pairs: list[Pair]) -> None:
    copy_tensors([target for target, _ in pairs], [source for _, source in pairs])


def _use_one_core(others: int) -> None:
    """Let torch copy in the calling thread alone, and leave all other threads as they are.

    The number is kept per thread, but setting it also sets what new threads begin with; a thread
    that only lives for that puts it back to what it was for the `others`.
    """
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(others,))
    restorer.start()
    restorer.join()
