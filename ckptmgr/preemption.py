"""The seam of preemption: whoever knows that this job is about to be ended tells it here.

A `Source` is made by name (entry points of the group `ckptmgr.preemption`) or passed in. While the
block of a Checkpointer lasts it listens, and calls `told` once for each preemption. The rank then
snapshots at its next `step`, all ranks alike, and the source hears when that is sealed and when it
is committed. Where the loop does not come to a next step in time, it hears of the last one before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import FrameType
from typing import Any

from ckptmgr.errors import UsageError

ENTRY_POINT_GROUP = "ckptmgr.preemption"
"""A plugin names its source here; the value is a callable without arguments that makes one."""

VARIABLE = "CKPTMGR_PREEMPTION"
"""Sources of a Checkpointer that names none itself: a job template sets it, no code changes."""

TORCHRUN_SECONDS = 30.0
"""What torchrun leaves between its SIGTERM and its SIGKILL, unless it is told otherwise."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class Notice:
    """The job will be ended: in about `seconds`, 0 where that is not known; `why` is for people."""

    why: str
    seconds: float = 0.0


Told = Callable[[Notice], None]
"""Takes a notice and returns at once; any thread may call it, but no signal handler."""


class Source(ABC):
    """Somebody who knows that the job will be ended.

    `listen` and `close` are called by the thread that enters and leaves the block, once each;
    `sealed` and `committed` by one other thread, so they may take their time. Only a source of
    rank 0 can tell what is to be done once for the job: others may answer for their own process.
    """

    name: str

    @abstractmethod
    def listen(self, told: Told, rank: int) -> None:
        """Begin to listen, and call `told` for each preemption from now on.

        Raises:
            UsageError: it can not work here.
        """

    def sealed(self, step: int) -> None:  # noqa: B027 - most sources need not know
        """The last step is in host memory: it survives this process."""

    def committed(self, step: int) -> None:  # noqa: B027 - most sources need not know
        """The last step is a checkpoint: nothing is lost if the job ends now."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening. A source that could not begin to listen is closed, too."""


class Announced(Source):
    """A source for knowledge of one's own, such as the interruption notice of a cloud."""

    name = "announced"

    def __init__(self) -> None:
        self._told: Told | None = None

    def listen(self, told: Told, rank: int) -> None:  # noqa: ARG002
        """As promised by Source."""
        self._told = told

    def announce(self, why: str, seconds: float = 0.0) -> bool:
        """Tell of a preemption, from any thread; False outside the block."""
        told = self._told
        if told is not None:
            told(Notice(why, seconds))
        return told is not None

    def close(self) -> None:
        """As promised by Source."""
        self._told = None


class Signals(Source):
    """Signals that say that the process will be killed. Handlers that were there are called, too.

    A thread hears a signal through a pipe that the interpreter writes to as the signal arrives, so
    that one which comes while the main thread is in a collective or a compiler is heard. Where
    that pipe is somebody else's (asyncio's), the handler writes, when the main thread comes to it;
    it takes the pipe back when that owner has left it.

    Args:
        numbers: the signals.
        seconds: time from the signal to the kill, 0 where it is not known.
    """

    name = "signals"

    def __init__(self, numbers: Iterable[int] = SIGNALS, seconds: float = 0.0) -> None:
        self._numbers = tuple(numbers)
        self._seconds = seconds
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._owns_wakeup = False
        self._thread: threading.Thread | None = None

    def listen(self, told: Told, rank: int) -> None:  # noqa: ARG002
        """As promised by Source."""
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "can only be heard by a Checkpointer that the main thread enters",
                subject=f"preemption={self.name!r}",
                hint="Enter the block in the main thread, or pass preemption=().",
            )
        read, write = self._pipe = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(write, False)
        self._thread = threading.Thread(
            target=self._hear, args=(read, told), name="ckptmgr signals", daemon=True
        )
        self._thread.start()
        # A child that is forked (a loader's worker) must neither swallow SIGTERM nor tell us of it.
        forget = weakref.WeakMethod(self._forget_in_child)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._handle)
        self._take_wakeup(write)

    def _take_wakeup(self, write: int) -> bool:
        """Let the interpreter write to our pipe, unless it writes to somebody else's; whether it
        has done so until now.
        """
        others = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._owns_wakeup = others in (-1, write)
        if not self._owns_wakeup:
            try:
                signal.set_wakeup_fd(others)
            except (OSError, ValueError):  # whoever it belonged to has closed it
                self._owns_wakeup = True
        return others == write

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Only say so; a thread does the work. Then whatever else was to happen at this signal."""
        # asyncio takes the interpreter's pipe for its own handlers, and gives back none at all.
        if self._pipe is not None and not self._take_wakeup(self._pipe[1]):
            with contextlib.suppress(BlockingIOError):  # full of signals that are not heard yet
                os.write(self._pipe[1], bytes([number]))
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        elif self._pipe is None and before is not signal.SIG_IGN:
            self._do_default(number)

    def _do_default(self, number: int) -> None:
        """What the signal does where nobody listens. We were closed under a handler that somebody
        had put above ours, and has taken away since: that has put ours back.
        """
        if signal.getsignal(number) == self._handle:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _hear(self, read: int, told: Told) -> None:
        while numbers := os.read(read, 256):
            if numbers[-1] == 0:  # no signal has this number: it is `close`
                return
            heard = [number for number in numbers if number in self._numbers]
            if heard:
                told(Notice(signal.Signals(heard[0]).name, self.seconds_left(heard[0])))

    def seconds_left(self, number: int) -> float:  # noqa: ARG002 - it may depend on it
        """Time from a signal that has just come to the kill; 0 where it is not known."""
        return self._seconds

    def close(self) -> None:
        """As promised by Source; a handler that somebody has put above ours meanwhile stays."""
        pipe = self._pipe
        if pipe is None:
            return
        self._put_back()
        self._pipe = None
        if self._thread is not None:
            os.write(pipe[1], b"\0")
            self._thread.join()
        for fd in pipe:
            os.close(fd)

    def _put_back(self) -> None:
        if self._owns_wakeup and self._pipe is not None:
            now = signal.set_wakeup_fd(-1)
            if now not in (-1, self._pipe[1]):
                signal.set_wakeup_fd(now)
            self._owns_wakeup = False
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                # None is a handler of before Python, which it can not put back.
                signal.signal(number, signal.SIG_DFL if before is None else before)

    def _forget_in_child(self) -> None:
        """In a forked child: be as if we had never listened. Its threads are gone."""
        pipe, self._thread = self._pipe, None
        if pipe is not None:
            self._put_back()
            self._pipe = None
            for fd in pipe:
                os.close(fd)


def default_signals() -> Signals:
    """What `preemption="signals"` means: SIGTERM and SIGUSR1, with torchrun's window below it."""
    seconds = 0.0
    if "TORCHELASTIC_RUN_ID" in os.environ:
        given = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
        seconds = float(given) if given.isdecimal() else TORCHRUN_SECONDS
    return Signals(seconds=seconds)


Wanted = str | Source | Iterable[str | Source] | None


def open_sources(wanted: Wanted) -> list[Source]:
    """The sources that a user wants: names, sources, or a list of both; None asks the environment.

    Raises:
        UsageError: a name that no plugin has, or something else.
    """
    if wanted is None:
        wanted = os.environ.get(VARIABLE, "")
    if isinstance(wanted, str):
        wanted = [name.strip() for name in wanted.split(",") if name.strip()]
    if isinstance(wanted, Source):
        wanted = [wanted]
    if not isinstance(wanted, Iterable):
        raise UsageError(f"{wanted!r} is no source", subject="preemption")
    return [one if isinstance(one, Source) else _named(one) for one in wanted]


def _named(name: str) -> Source:
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is no source", subject="preemption")
    if name == Signals.name:
        return default_signals()
    found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        known = ", ".join(sorted({Signals.name, *found}))
        raise UsageError(
            f"no source has this name; there are: {known}",
            subject=f"preemption={name!r}",
            hint=f"Run `pip install ckptmgr-{name}`, or use one of these.",
        )
    try:
        source = found[name].load()()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"its plugin can not be imported: {error}", subject=f"preemption={name!r}"
        ) from error
    if not isinstance(source, Source):
        raise UsageError(f"its plugin made {source!r}", subject=f"preemption={name!r}")
    return source
