"""Daemons in a twentieth of a second each: forked from one process that has imported them already.

To start an interpreter and to import the daemon is most of what many tests cost. A forked daemon is
a process like any other, with a pid, an environment and a log of its own; only its command line in
/proc is that of this file.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

# -- the side of the test -------------------------------------------------------------------------


class Forked:
    """A forked process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that killed it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask(status=self.pid)["status"]
            if self.returncode is not None:
                os.close(self._handle)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        if self.poll() is None and not select.select([self._handle], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"daemon {self.pid}", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks; one for each process that runs tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._turn = threading.Lock()
        atexit.register(self.close)

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> Forked:
        """`ckptmgr daemon ARGUMENTS`, whose output is appended to `log`."""
        told = self.ask(arguments=arguments, environment=environment, log=str(log))
        return Forked(self, told["pid"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._turn:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._process.kill()
        self._process.wait()


@cache
def nursery() -> Nursery:
    """The nursery of this process."""
    return Nursery()


# -- the side that forks --------------------------------------------------------------------------


def serve() -> None:
    """Fork for each request on standard input, until it ends."""
    for name in ("ckptmgr.cli", "ckptmgr.daemon.service", "numpy"):
        importlib.import_module(name)
    statuses: dict[int, int] = {}
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "status" not in request:
            pid = os.fork()
            if not pid:
                become(**request)
                return
            answer = {"pid": pid}
        else:
            pid = request["status"]
            if pid not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = {"status": statuses.get(pid)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def become(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Be a daemon, as if started by its command line."""
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, source in enumerate((null, out, out)):
        os.dup2(source, number)
    os.close(null)
    os.close(out)
    os.environ.clear()
    os.environ.update(environment)
    found = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in found if path and path not in sys.path]
    random.seed()  # else all of them would wait alike
    sys.argv = ["ckptmgr", "daemon", *arguments]
    importlib.import_module("ckptmgr.cli").main()


if __name__ == "__main__":
    serve()
