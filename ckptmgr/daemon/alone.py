"""One daemon for each runtime directory, by a lock that the kernel drops when it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptmgr.errors import DaemonError
from ckptmgr.staging.inbox import LOCK, prepare

_RUNS, _ENDED = "runs", "ended"
"""What the file says, before the number of daemons that have held it: whoever is killed leaves the
former. It is a line, so that a shorter one may stand before what is left of a longer one."""


@dataclass(frozen=True, slots=True)
class Before:
    """The daemons before this one: how many there were since the memory of this host was made, and
    whether the last of them was killed.
    """

    count: int
    killed: bool


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[Before]:
    """Hold the lock of a runtime directory; the kernel drops it when this process dies.

    Raises:
        DaemonError: another daemon has it.
    """
    with _locked(path) as fd:
        before = _before(os.pread(fd, 64, 0))
        _note(fd, _RUNS, before.count + 1)
        try:
            yield before
        finally:
            _note(fd, _ENDED, before.count + 1)


def _before(content: bytes) -> Before:
    found = re.match(rb"(\w+) (\d{1,18})\n", content)
    if found is None:  # nobody, or one that was killed amid its line
        return Before(0, killed=bool(content))
    return Before(int(found[2]), killed=found[1].decode() != _ENDED)


def _note(fd: int, word: str, count: int) -> None:
    os.pwrite(fd, f"{word} {count}\n".encode(), 0)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DaemonError(
                "another daemon serves this runtime directory",
                subject=str(path.parent),
                hint="Use that one (`ckptmgr status`), or set another CKPTMGR_RUNTIME_DIR.",
            ) from None
        yield fd
    finally:
        os.close(fd)


def prepare_alone(runtime: Path) -> None:
    """Make the runtime directory before somebody listens in it for us.

    Raises:
        DaemonError: a daemon is there already, and would not see who connects.
        HostMemoryError: the runtime directory is not ours.
    """
    prepare(runtime)
    with _locked(runtime / LOCK):
        return
