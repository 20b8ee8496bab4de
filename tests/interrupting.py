"""A signal handler that runs while the main thread waits in a chosen function."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ckptmgr.staging.control import Client

LOOK_SECONDS = 0.02


class Interrupted(BaseException):
    """What a handler raises that ends a wait, as Ctrl-C does."""


def interrupt() -> None:
    """A handler that raises."""
    raise Interrupted


@contextlib.contextmanager
def signalled(
    handle: Callable[[], None],
    where: Callable[..., Any] = Client._receive,
    *,
    when: Callable[[], object] = lambda: True,
    times: int = 1,
) -> Iterator[None]:
    """Run `handle` in a signal handler, each time that this thread stands still in another call of
    `where`, so many times; the first time only `when` that is true.
    """
    main, done = threading.main_thread().ident, threading.Event()
    assert main == threading.get_ident(), "signals are handled by the main thread"
    assert main is not None
    before = signal.signal(signal.SIGUSR1, lambda *_: handle())

    def watch() -> None:
        left, seen, met = times, None, None
        while left and not done.wait(LOOK_SECONDS):
            place = _place(main, where)
            if place is not None and place == seen and place != met and (met or when()):
                os.kill(os.getpid(), signal.SIGUSR1)
                left, met = left - 1, place
            seen = place

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def _place(thread: int, where: Callable[..., Any]) -> tuple[FrameType, int] | None:
    """The frame of `where` in a thread, and the instruction that it is at."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not where.__code__:
        frame = frame.f_back
    return None if frame is None else (frame, frame.f_lasti)
