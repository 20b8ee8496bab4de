"""One daemon for each runtime directory, by a lock that the kernel drops when it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ckptmgr.errors import DaemonError
from ckptmgr.staging.inbox import LOCK, prepare


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Hold the lock of a runtime directory; the kernel drops it when this process dies. Gives
    whether whoever had it before was killed, and so did not empty the file.

    Raises:
        DaemonError: another daemon has it.
    """
    with _locked(path) as fd:
        killed = bool(os.pread(fd, 1, 0))
        os.pwrite(fd, b"1", 0)
        try:
            yield killed
        finally:
            os.ftruncate(fd, 0)


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
