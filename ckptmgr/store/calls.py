"""Blocking calls of a store in threads: given up by their callers, they do no harm any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from ckptmgr.errors import StoreUnreachableError
from ckptmgr.store.posix import store_error

T = TypeVar("T")
R = TypeVar("R")
Work = Callable[["Call[Any]"], T]


class AbandonedError(Exception):
    """The caller of a call that is still running was cancelled; nobody sees this."""


class Call(Generic[T]):
    """One blocking call in a thread. `hung` holds it while it runs for nobody."""

    def __init__(self, subject: str, work: Work[T], hung: set[Call[Any]]) -> None:
        self.subject = subject
        self._work: Work[T] | None = work
        self._hung = hung
        self._lock = threading.Lock()
        self._abandoned = False
        self._running = False

    def run(self) -> T:
        """Do the work, in the thread. The work is dropped before the caller is woken, so that
        the caller may close the memory that its buffers are views of.
        """
        with self._lock:
            self.check()
            assert self._work is not None
            work, self._work = self._work, None
            self._running = True
        try:
            return work(self)
        except OSError as error:
            raise store_error(error, self.subject) from error
        finally:
            with self._lock:
                self._running = False
                self._hung.discard(self)

    def abandon(self) -> None:
        """After this returns, the call neither links an object nor writes into a buffer."""
        with self._lock:
            self._abandoned = True
            self._work = None
            if self._running:
                self._hung.add(self)

    def check(self) -> None:
        """Give up if the caller has."""
        if self._abandoned:
            raise AbandonedError

    def deliver(self, source: memoryview, target: memoryview) -> None:
        """Copy `source` into `target`, unless the caller has given up; keep it short, too."""
        with self._lock:
            self.check()
            target[:] = source

    def while_wanted(self, write: Callable[[], R]) -> R:
        """Do what writes into memory of the caller, unless the caller has given up.

        The lock is held meanwhile, so that `abandon` waits for it: it must be short, and must not
        wait for anything.
        """
        with self._lock:
            self.check()
            return write()


class Calls:
    """Runs calls in `threads` threads. One that hangs in the kernel is given up with its call;
    when all hang, calls fail at once with StoreUnreachableError.
    """

    def __init__(self, threads: int) -> None:
        self._count = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="ckptmgr-store")
        self._hung: set[Call[Any]] = set()

    async def run(self, subject: str, work: Work[T]) -> T:
        """Run `work` in a thread. The queue before the threads is as long as there are callers:
        a cancelled call leaves it.
        """
        if len(self._hung) >= self._count:
            raise StoreUnreachableError(
                f"{self._count} earlier calls hang in the kernel", subject=subject
            )
        call = Call(subject, work, self._hung)
        future = asyncio.get_running_loop().run_in_executor(self._threads, call.run)
        try:
            return await future
        except asyncio.CancelledError:
            call.abandon()
            raise

    def close(self) -> None:
        """Start no more; calls that hang in the kernel are left to it."""
        self._threads.shutdown(wait=False, cancel_futures=True)
