"""Starting a daemon on demand, so that the first run needs no set-up."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from ckptmgr.config import START_SECONDS_MAX
from ckptmgr.errors import DaemonUnreachableError, HostMemoryError
from ckptmgr.staging.control import Client
from ckptmgr.staging.inbox import LOG, OLD_LOG, SOCKET, prepare

_LOOK_SECONDS = 0.02  # how often a starting daemon's socket is tried; it needs about 0.3 s

LOG_BYTES_MAX = 8 << 20
"""A log larger than this is put aside when a daemon is started, in place of the one before: some
40,000 events, and at most twice this in the memory that the runtime directory is on, unless one
daemon writes more in its life."""


def connect(runtime: Path) -> Client:
    """Connect to the daemon of a runtime directory.

    Raises:
        DaemonUnreachableError: none answers.
    """
    return Client(runtime / SOCKET)


def connect_or_start(runtime: Path, seconds_max: float = START_SECONDS_MAX) -> Client:
    """Connect to the daemon, starting one (detached, ending when idle) if none answers.

    Raises:
        DaemonUnreachableError: it did not come up; the message has the end of its log.
        HostMemoryError: the runtime directory is not ours.
    """
    prepare(runtime)
    try:
        return connect(runtime)
    except DaemonUnreachableError:
        started = _start(runtime)
    deadline = time.monotonic() + seconds_max
    never = threading.Event()
    while time.monotonic() < deadline:
        try:
            return connect(runtime)
        except DaemonUnreachableError:
            ended = started.poll()
            if ended is not None and ended > 0:
                break
            # Exit 0: another process started one a moment earlier. That one may be killed as
            # well as ours (a negative status): start again until the time is over.
            if ended is not None:
                started = _start(runtime)
            never.wait(_LOOK_SECONDS)
    raise DaemonUnreachableError(
        f"a daemon was started but does not answer: {_end_of_log(runtime)}", subject=str(runtime)
    )


def _start(runtime: Path) -> subprocess.Popen[bytes]:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "CKPTMGR_RUNTIME_DIR": str(runtime)}
    log = open_log(runtime)
    try:
        # A session of its own: Ctrl-C and a scheduler's signals to the job do not reach it.
        started = subprocess.Popen(
            [sys.executable, "-m", "ckptmgr.daemon"],
            cwd="/",
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    # Somebody must reap it if it ends before this process does.
    threading.Thread(target=started.wait, name="ckptmgr reaper", daemon=True).start()
    return started


def open_log(runtime: Path) -> int:
    """A descriptor to append to the daemon's log; one larger than LOG_BYTES_MAX is put aside.

    Raises:
        HostMemoryError: it can not be opened.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        try:
            log = os.open(runtime / LOG, flags, 0o600)
        except OSError as error:
            raise HostMemoryError(
                f"log can not be opened: {error.strerror}", subject=str(runtime / LOG)
            ) from error
        if not _put_aside(log, runtime):
            return log
        os.close(log)


def _put_aside(log: int, runtime: Path) -> bool:
    """Give the open log another name if it is too large; False if it is to be written on."""
    if os.fstat(log).st_size <= LOG_BYTES_MAX:
        return False
    fcntl.flock(log, fcntl.LOCK_EX)
    try:
        # Somebody else may have been faster: the name is of a new log then, which stays.
        if os.path.samestat(os.fstat(log), os.lstat(runtime / LOG)):
            os.rename(runtime / LOG, runtime / OLD_LOG)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # no log is worth a daemon that does not start
    finally:
        # The lock belongs to the open file, which a daemon may inherit.
        fcntl.flock(log, fcntl.LOCK_UN)
    return True


def _end_of_log(runtime: Path) -> str:
    try:
        lines = (runtime / LOG).read_text(errors="replace").splitlines()
    except OSError:
        return "it left no log"
    return " | ".join(lines[-3:])
