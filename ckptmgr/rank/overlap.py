"""Copies tensors behind the back of the training thread, and knows when that was not safe.

    training thread                       copying thread
    read version counters, hand over  ->  copy
    forward, backward                     copied; note where the training thread is
    optimizer.step: pre-hook waits    <-  it moved on, or said so: read the counters again
                                          equal: seal     different: TornSnapshotError

PyTorch counts a write when it is over. A counter that is read while a write is under way says
nothing, so the second reading waits until the training thread was seen to leave the call that it
was in when the copy ended.

Writes that PyTorch does not count (through `.data`, by CUDA graphs, by kernels outside PyTorch) are
not found: overlap=False is for code that makes them. The parts for GPUs were not run on one yet.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from types import FrameType

import torch
from torch import Tensor

from ckptmgr.errors import TornSnapshotError
from ckptmgr.rank.tensors import carried

LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 0.001, 0.05
"""Pause between two looks at the training thread: from a small operation to a long backward."""

PARALLEL_BYTES_MIN = 64 << 20
"""Leaves from this size on are worth torch's threads: 8 ms of copying against one wait for them."""

LEAVES_NAMED_MAX = 5

Finish = Callable[[BaseException | None], None]


def copy_tensors(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy logical values, bit by bit, and return when they are in place.

    One call for all: it halves the cost of tiny tensors, and on a GPU waits only once.
    """
    start_copy(targets, sources)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def start_copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """As `copy_tensors`, but what is on a GPU may still be on its way when it returns."""
    if not targets:
        return
    with torch.no_grad():
        moved = [carried(source) for source in sources]
        torch._foreach_copy_(targets, moved, non_blocking=True)


@dataclass(slots=True)
class Job:
    """Leaves that are copied in the background.

    `torn` hears the paths that changed meanwhile. `quiet` is set when the training thread says
    that it is not writing, `judged` when the counters were read again.
    """

    targets: list[Tensor]
    sources: list[Tensor]
    paths: list[str]
    finish: Finish
    torn: Callable[[list[str]], None]
    versions: list[int] = field(init=False)
    trainer: int = field(default_factory=threading.get_ident)
    quiet: threading.Event = field(default_factory=threading.Event)
    judged: threading.Event = field(default_factory=threading.Event)
    streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = [source._version for source in self.sources]

    def run(self) -> None:
        """Copy, wait until the training thread is not writing, judge, and tell."""
        error: BaseException | None = None
        try:
            self._copy()
            self._wait_until_quiet()
            error = self._judge()
        except Exception as failure:  # noqa: BLE001 - handed to the owner of the snapshot
            error = failure
        self.judged.set()
        self.finish(error)

    def _copy(self) -> None:
        pairs = list(zip(self.targets, self.sources, strict=True))
        for device, stream in self.streams.items():
            there = [pair for pair in pairs if pair[1].device == device]
            with torch.cuda.stream(stream):
                start_copy([target for target, _ in there], [source for _, source in there])
        here = [pair for pair in pairs if pair[1].device not in self.streams]
        copy_tensors([target for target, _ in here], [source for _, source in here])
        for stream in self.streams.values():
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(stream)
            copied.synchronize()

    def _wait_until_quiet(self) -> None:
        seen = _place(self.trainer)
        pause = LOOK_SECONDS_MIN
        while not self.quiet.wait(pause) and _place(self.trainer) == seen:
            pause = min(2 * pause, LOOK_SECONDS_MAX)

    def _judge(self) -> TornSnapshotError | None:
        now = [source._version for source in self.sources]
        if now == self.versions:
            return None
        pairs = zip(self.versions, now, strict=True)
        torn = [path for path, (a, b) in zip(self.paths, pairs, strict=True) if a != b]
        self.torn(torn)
        more = f" and {len(torn) - LEAVES_NAMED_MAX} more" if len(torn) > LEAVES_NAMED_MAX else ""
        return TornSnapshotError(
            "was changed while it was copied", subject=", ".join(torn[:LEAVES_NAMED_MAX]) + more
        )


def _place(thread: int) -> tuple[FrameType | None, int]:
    """Where a thread is: its innermost Python frame and the instruction in it.

    Equal places may be two visits; different ones prove that the call in between has ended.
    """
    frame = sys._current_frames().get(thread)
    return frame, (-1 if frame is None else frame.f_lasti)


@dataclass(slots=True)
class Errand:
    """Leaves that are copied while the training thread waits."""

    targets: list[Tensor]
    sources: list[Tensor]
    finished: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def run(self) -> None:
        """Copy; a failure is for the thread that waits."""
        try:
            start_copy(self.targets, self.sources)
        except Exception as failure:  # noqa: BLE001 - raised in the thread that waits
            self.failure = failure
        self.finished.set()


class CopyThread:
    """One thread that runs one job at a time, on one core; started with the first.

    PyTorch splits a copy of more than 128 KiB over its threads and waits for the last of them. With
    more runnable threads than cores (data loaders) each wait costs a turn of the scheduler: 5,000
    copies of 200 KiB took 3.1 s instead of 0.3 s, with four times more threads than cores. On one
    core they take about 1.3 times as long as one memcpy of the same bytes.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Job | Errand | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._job: Job | None = None

    def copy(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """Copy tensors and wait for it.

        Small ones in host memory go to the thread; this one copies the others meanwhile.
        """
        errand, targets, sources = _divide(targets, sources)
        if errand.targets:
            self._put(errand)
        copy_tensors(targets, sources)
        if errand.targets:
            errand.finished.wait()
        if errand.failure is not None:
            raise errand.failure

    def start(self, job: Job) -> None:
        """Run `job` in the background; the one before must be settled.

        The copies on a GPU come after everything that is in its current stream now.
        """
        for device in {source.device for source in job.sources if source.is_cuda}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            job.streams[device] = stream
        self._job = job
        self._put(job)

    def _put(self, job: Job | Errand) -> None:
        if not self._runs():
            self._jobs = queue.Queue(maxsize=1)
            self._thread = threading.Thread(target=self._run, name="ckptmgr-copy", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _runs(self) -> bool:
        """Whether there is a thread: a forked child has none, whatever its parent was doing."""
        return self._thread is not None and self._thread.is_alive()

    def settle(self) -> None:
        """Wait until the leaves in flight may be written again.

        Call it in the thread that trains: that it is here shows that it is not writing.
        """
        job, self._job = self._job, None
        if job is not None and self._runs():
            job.quiet.set()
            job.judged.wait()

    def close(self) -> None:
        """Finish what is in flight and end the thread."""
        self.settle()
        if self._thread is not None and self._runs():
            self._jobs.put(None)
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        _use_one_core()
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            job.run()
            del job  # its sources may be the only references to tensors that training dropped


def _divide(
    targets: list[Tensor], sources: list[Tensor]
) -> tuple[Errand, list[Tensor], list[Tensor]]:
    """What the copying thread does, and targets and sources of what is left."""
    small = [
        source.is_cpu and target.nbytes < PARALLEL_BYTES_MIN
        for target, source in zip(targets, sources, strict=True)
    ]
    if all(small):
        return Errand(targets, sources), [], []
    large = [not is_small for is_small in small]
    errand = Errand(list(compress(targets, small)), list(compress(sources, small)))
    return errand, list(compress(targets, large)), list(compress(sources, large))


def _use_one_core() -> None:
    """Let torch copy in the calling thread alone, and leave all other threads as they are.

    The number is kept per thread, but setting it also sets what new threads begin with; a thread
    that only lives for that puts it back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    restorer = threading.Thread(target=torch.set_num_threads, args=(before,))
    restorer.start()
    restorer.join()
