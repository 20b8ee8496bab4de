"""The runtime directory, its socket, and the daemon behind it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from ckptmgr.errors import ControlProtocolError, DaemonError, DaemonUnreachableError
from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.inbox import BUFFERS, INBOX, SOCKET
from ckptmgr.staging.launch import connect
from ckptmgr.store.finding import Finding, Health


def directory(runtime: Path) -> Finding:
    """Whether the runtime directory is this user's, and nobody else's."""
    faults = [
        fault
        for path in (runtime, runtime / BUFFERS, runtime / INBOX)
        if (fault := _fault(path, is_kind=stat.S_ISDIR))
    ]
    if faults:
        return Finding(
            "runtime directory",
            Health.FAILURE,
            "others may read or write snapshots, or the daemon refuses to start",
            faults[0],
            f"Run `chmod 700 {runtime}`, or remove it if it is not yours.",
        )
    if not runtime.exists():
        what = "is not there yet; it is made with the right mode"
        return Finding("runtime directory", Health.OK, what, str(runtime))
    return Finding(
        "runtime directory", Health.OK, "is private to this user", f"{runtime} has mode 0700"
    )


def socket(runtime: Path) -> Finding:
    """Whether only this user may talk to the daemon."""
    path = runtime / SOCKET
    if not os.path.lexists(path):
        return Finding("socket", Health.NOT_CHECKED, "no daemon has made one", str(path))
    fault = _fault(path, is_kind=stat.S_ISSOCK)
    if fault:
        return Finding(
            "socket",
            Health.FAILURE,
            "others may ask the daemon of this user",
            fault,
            "Restart the daemon: it makes the socket with mode 0600.",
        )
    return Finding("socket", Health.OK, "only this user may ask the daemon", f"{path} has 0600")


def _fault(path: Path, is_kind: Any) -> str:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not is_kind(found.st_mode):
        return f"{path} is a {stat.filemode(found.st_mode)[0]!r}, not what it should be"
    if found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}"
    mode = stat.S_IMODE(found.st_mode)
    return f"{path} has mode {mode:04o}" if mode & 0o077 else ""


def state_of_daemon(runtime: Path) -> tuple[dict[str, Any] | None, Finding]:
    """What the daemon tells of itself, and whether it answers and gets its snapshots committed."""
    try:
        with connect(runtime) as client:
            state = client.ask(Status(), Stated).state
    except DaemonUnreachableError:
        what = "none runs; the first trainer starts one"
        return None, Finding("daemon", Health.NOT_CHECKED, what, str(runtime))
    except (ControlProtocolError, DaemonError) as error:
        return None, Finding(
            "daemon",
            Health.FAILURE,
            "answers in a way that this version does not understand",
            error.message,
            "Run `ckptmgr drain --stop` with the version that started it, then start again.",
        )
    return state, _at_work(state)


def _at_work(state: dict[str, Any]) -> Finding:
    evidence = f"pid {state['pid']}, {state['trainers']} trainers, {state['undecided']} undecided"
    failures = [
        buffer["last_failure"].partition("\n")[0]
        for job in state["jobs"]
        for buffer in job["buffers"]
        if buffer["last_failure"]
    ]
    if failures:
        return Finding(
            "daemon",
            Health.WARNING,
            f"fails to bring a snapshot into its store: {failures[0]}",
            evidence,
            "Look at `ckptmgr status`, and run this command with the URL of that store.",
        )
    return Finding("daemon", Health.OK, "answers, and its snapshots get committed", evidence)
