"""The life of `ckptmgr watch`: look, wait for what is quiet and whole, adopt, collect."""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from ckptmgr.config import RETRY_SECONDS_MAX, RETRY_SECONDS_MIN
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.log import event, warning
from ckptmgr.errors import StoreError, StoreUnreachableError, TornSnapshotError
from ckptmgr.keep import Keep
from ckptmgr.repository.budget import in_thread
from ckptmgr.watch.adopting import Adopter
from ckptmgr.watch.found import Candidate, opened_root, scan
from ckptmgr.watch.settling import Seen, next_look, quiet, seen_now
from ckptmgr.watch.whole import flaw_of

POLL_SECONDS = 10.0
"""How often the directory is looked at though nothing was heard: what other hosts write into a
network file system is not told."""

LOOKS_PER_QUIET = 4
"""Looks within one quiet period, at most, however much is written."""

TRIES_OF_ONCE = 3
"""How often `once` reads what fails by an error that may pass, before it is left."""

_PASSING = frozenset(
    {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN}
)
"""Of a mount that is away for a moment, or of a process that is short of something."""

_CHANGES: list[type[FileSystemEvent]] = [
    *(FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileDeletedEvent, FileClosedEvent),
    *(DirCreatedEvent, DirMovedEvent, DirDeletedEvent),
]
"""Not that something was opened or read: we do that ourselves."""


class _Bell(FileSystemEventHandler):
    def __init__(self, ring: Callable[[], object]) -> None:
        self._ring = ring

    def on_any_event(self, event: FileSystemEvent) -> None:  # noqa: ARG002 - a look tells what
        self._ring()


@dataclass(slots=True)
class Outcome:
    """What a watch did: the adopted candidates, and why others were left, by their names."""

    adopted: list[dict[str, Any]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class Watcher:
    """Watches one directory. `once` ends when everything in it was quiet and has been judged."""

    def __init__(
        self,
        root: Path,
        job: Job,
        adopter: Adopter,
        keep: Keep,
        *,
        patterns: Sequence[str] = (),
        quiet_seconds: float,
        once: bool = False,
    ) -> None:
        self._root, self._job, self._adopter, self._keep = root, job, adopter, keep
        self._patterns = tuple(patterns)
        self._quiet_seconds = quiet_seconds
        self._once = once
        self._seen: dict[str, Seen] = {}
        self._judged: dict[str, Candidate] = {}
        self._tries: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self.outcome = Outcome()

    async def run(self) -> None:
        """Adopt for ever, or until all is judged.

        Raises:
            SupersededError: another process watches for the same store.
            UsageError: the store holds the steps of something else.
            StoreError: the store failed; only with `once`, for else it is tried again.
        """
        loop = asyncio.get_running_loop()
        observer = self._observe(lambda: loop.call_soon_threadsafe(self._changed.set))
        event("watching", job=self._job.label, quiet_seconds=self._quiet_seconds)
        try:
            await self._patiently(self._adopter.learn)
            if self._adopter.known.newest is not None:
                self._job.retain_soon(self._keep.wire)  # what a killed one left behind
            while True:
                pause = await self._patiently(self._turn)
                if self._once and pause is None:
                    await self._job.collected()
                    return
                await self._wait(POLL_SECONDS if pause is None else pause)
        finally:
            if observer is not None:
                observer.stop()
                await in_thread(observer.join)

    def _observe(self, ring: Callable[[], object]) -> Any:
        """Hear of changes; without that, looking from time to time has to do."""
        observer = Observer()
        try:
            observer.schedule(_Bell(ring), str(self._root), recursive=True, event_filter=_CHANGES)
            observer.start()
        except OSError as error:
            warning("watch_polls", why=str(error))
            return None
        return observer

    async def _wait(self, seconds: float) -> None:
        pause = self._quiet_seconds / LOOKS_PER_QUIET
        await asyncio.sleep(min(pause, seconds))
        if seconds > pause:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds - pause)
        self._changed.clear()

    async def _patiently(self, work: Callable[[], Any]) -> Any:
        """`work`, again and again for as long as the store fails."""
        pause = RETRY_SECONDS_MIN
        while True:
            try:
                return await work()
            except StoreError as error:
                if self._once:
                    raise
                warning("watch_failed", job=self._job.label, why=str(error), retry_in=pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _turn(self) -> float | None:
        """One look, and whatever can be adopted after it; seconds until the next look is due, None
        where only a change can make a difference.
        """
        found = await in_thread(self._look)
        now = time.monotonic()
        self._seen = seen_now(self._seen, found, now)
        self._judged = {n: c for n, c in self._judged.items() if n in self._seen}
        for candidate in quiet(self._seen, self._quiet_seconds, now):
            if self._judged.get(candidate.name) == candidate:
                continue
            try:
                await self._judge(candidate)
                self._judged[candidate.name] = candidate
            except (TornSnapshotError, OSError) as error:
                why = str(error).partition("\n")[0]
                if isinstance(error, OSError) and not self._passes(candidate, error):
                    self._leave(candidate, f"can not be read: {why}")
                    self._judged[candidate.name] = candidate  # until it is changed, or its mode
                    continue
                warning("watch_torn", source=candidate.name, why=why)
                self._seen.pop(candidate.name, None)  # to be quiet anew
                return self._quiet_seconds
        return next_look(self._seen, self._quiet_seconds, time.monotonic())

    def _look(self) -> list[Candidate]:
        try:
            return scan(self._root, self._patterns)
        except OSError as error:  # of a mount that is away, or of a process that is short of things
            why = f"can not be listed: {error.strerror}"
            raise StoreUnreachableError(why, subject=str(self._root)) from error

    def _passes(self, candidate: Candidate, error: OSError) -> bool:
        """Whether a candidate that could not be read may be read later as it is."""
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return True
        if error.errno not in _PASSING:
            return False
        self._tries[candidate.name] += 1
        return not self._once or self._tries[candidate.name] < TRIES_OF_ONCE

    async def _judge(self, candidate: Candidate) -> None:
        flaw = await in_thread(self._flaw, candidate)
        if flaw:
            self._leave(candidate, flaw)
            return
        if await self._adopter.is_known(candidate):
            return
        step = await self._adopter.adopt(candidate)
        if step is None:
            self._leave(candidate, "is older than what was adopted already")
            return
        self.outcome.left.pop(candidate.name, None)
        self.outcome.adopted.append(
            {
                **step.document(),
                "source": candidate.name,
                "kind": candidate.kind.value,
                "bytes": candidate.nbytes,
            }
        )
        self._job.retain_soon(self._keep.wire)

    def _flaw(self, candidate: Candidate) -> str:
        with opened_root(self._root) as root:
            return flaw_of(root, candidate)

    def _leave(self, candidate: Candidate, why: str) -> None:
        self.outcome.left[candidate.name] = why
        warning("watch_left", source=candidate.name, why=why)
