"""Run a command's work in the foreground, so that Ctrl-C ends it: cleaned up, and soon.

Signals are taken by a thread that does nothing else: a handler in Python would wait for the main
thread, which may hang in the kernel as any other thread may. The first one cancels the work; when
that has not ended in time, or at a second signal, the process ends without it.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

CLEAN_UP_SECONDS = 5.0
"""Longest wait for work that was interrupted: to release a hold and to delete what was written
takes milliseconds, unless the store or the disk hangs."""

LAST_SECONDS = 1.0
"""Longest wait for `leave_nothing` when the process ends without its work."""

_OVER = 0
"""Stands for a signal where there is nothing to wait for any more."""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], leave_nothing: Callable[[], None]) -> T:
    """Run `main` to its end in the main thread; does not return if it is interrupted.

    `leave_nothing` deletes what `main` must not leave behind. It is called, in another thread,
    where `main` could not do so itself.
    """
    with _watching(leave_nothing) as watch:
        try:
            return asyncio.run(watch.watched(main))
        except asyncio.CancelledError:
            end(128 + watch.number)


def end(status: int) -> NoReturn:
    """End the process. Python would wait for threads first, and those may hang in the kernel."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before we started
        try:
            stream.flush()
        except OSError:  # nobody reads it any more
            continue
    os._exit(status)


@contextmanager
def _watching(leave_nothing: Callable[[], None]) -> Iterator[_Watch]:
    """Let signals wake a watching thread through a pipe, from whichever thread they hit.

    They are blocked in this thread, and in those that it starts, lest they wait there.
    """
    # Whoever started us with a signal ignored (nohup, a shell's background job) wants it ignored.
    signals = {
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakes = signal.set_wakeup_fd(writing)
    found = {number: signal.signal(number, lambda *_: None) for number in signals}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    watch = _Watch(signals, reading, leave_nothing)
    try:
        yield watch
    finally:
        os.write(writing, bytes([_OVER]))
        watch.join()
        for number, action in found.items():
            signal.signal(number, action)
        signal.set_wakeup_fd(wakes)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reading)
        os.close(writing)


class _Watch(threading.Thread):
    """Waits for the signals that end the work."""

    def __init__(
        self, signals: set[signal.Signals], reading: int, leave_nothing: Callable[[], None]
    ) -> None:
        super().__init__(name="ckptmgr-signals", daemon=True)
        self.number = _OVER
        self._signals = signals
        self._reading = reading
        self._leave_nothing = leave_nothing
        self._cancel: Callable[[], None] = lambda: None

    async def watched(self, main: Coroutine[Any, Any, T]) -> T:
        """`main`, as a task that a signal cancels."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._cancel = lambda: _soon(loop, task.cancel)
        self.start()
        return await main

    def run(self) -> None:
        """Cancel at the first signal, end the process at the second or after a while."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        self.number = self._next(None)
        if self.number == _OVER:
            return
        self._cancel()
        try:
            if self._next(CLEAN_UP_SECONDS) == _OVER:
                return
        except TimeoutError:
            pass
        last = threading.Thread(target=self._leave_nothing, daemon=True)
        last.start()
        last.join(LAST_SECONDS)
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\x1b[?25h\n")  # the bar that was being drawn has hidden the cursor
        os._exit(128 + self.number)

    def _next(self, timeout_seconds: float | None) -> int:
        """The next signal, or _OVER.

        Raises:
            TimeoutError: there was none.
        """
        looked = select.poll()  # select() takes no descriptor from 1024 on
        looked.register(self._reading, select.POLLIN)
        if not looked.poll(None if timeout_seconds is None else timeout_seconds * 1000):
            raise TimeoutError
        return os.read(self._reading, 1)[0]


def _soon(loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(work)
    except RuntimeError:  # the loop is closed: the work has ended
        return
