"""Python programs in a twentieth of a second each: forked from a process that has imported them.

To start an interpreter and to import the product is most of what many tests cost. A forked program
is a process like any other, with a pid, an environment, descriptors and a working directory of its
own; only its command line in /proc is that of this file. Tests of starting itself use subprocess.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Self

from processes import SPARED

MESSAGE_BYTES_MAX = 1 << 17
DESCRIPTORS_MAX = 16
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""What forks must have one thread."""

# -- the side of the test -------------------------------------------------------------------------


class Forked:
    """A forked process, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        nursery: Nursery,
        pid: int,
        stdin: IO[str] | None,
        stdout: IO[str] | None,
        stderr: IO[str] | None,
    ) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.returncode: int | None = None
        self._nursery = nursery
        self._handle = os.pidfd_open(pid)
        self._turn = threading.Lock()
        weakref.finalize(self, os.close, self._handle)

    def poll(self) -> int | None:
        """Its exit status, or minus the signal that killed it; None while it runs."""
        with self._turn:
            if self.returncode is None and self._is_over(0.0):
                self.returncode = self._nursery.ask([], status=self.pid)["status"]
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        if not self._is_over(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def _is_over(self, timeout: float | None) -> bool:
        looked = select.poll()  # for tests with more than 1024 descriptors
        looked.register(self._handle, select.POLLIN)
        return bool(looked.poll(None if timeout is None else timeout * 1000))

    def send_signal(self, number: int) -> None:
        """Nothing, if it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.wait()


class Nursery:
    """The process that forks; one for each process that runs tests, and each set of modules, whose
    `warm`, if they have one, is called first.
    """

    def __init__(self, *modules: str) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno()), *modules],
            env={**os.environ, **THREADS, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        SPARED.add(self._process.pid)
        self._turn = threading.Lock()
        atexit.register(self.close)

    def popen(self, command: Sequence[str], **options: Any) -> Forked:
        """For `subprocess.Popen([sys.executable, "-m", MODULE, ...])` in the product."""
        assert list(command[:2]) == [sys.executable, "-m"], command
        return self.start(command[2:], **options)

    def start(
        self,
        program: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | IO[Any] = subprocess.DEVNULL,
        stdout: int | IO[Any] = subprocess.DEVNULL,
        stderr: int | IO[Any] = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        cwd: str = "",
        start_new_session: bool = False,
    ) -> Forked:
        """A module by its name, or a file that ends in .py, with its arguments; the rest is that of
        `subprocess.Popen(..., text=True)`.
        """
        with contextlib.ExitStack() as theirs:
            ours: list[IO[str] | None] = []
            standard = []
            for number, wanted in enumerate((stdin, stdout, stderr)):
                own, given = _ends(wanted, number, theirs)
                ours.append(own)
                standard.append(given)
            told = self.ask(
                [*standard, *pass_fds],
                program=list(program),
                environment=dict(env),
                numbers=[0, 1, 2, *pass_fds],
                cwd=cwd or os.getcwd(),
                session=start_new_session,
            )
        return Forked(self, told["pid"], *ours)

    def ask(self, descriptors: Sequence[int], **request: Any) -> dict[str, Any]:
        """One request, and its answer."""
        with self._turn:
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(descriptors))
            answer = self._socket.recv(MESSAGE_BYTES_MAX)
        assert answer, "the nursery has ended"
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._process.kill()
        self._process.wait()


def _ends(
    wanted: int | IO[Any], number: int, theirs: contextlib.ExitStack
) -> tuple[IO[str] | None, int]:
    """Our end of a pipe, if one is wanted, and the descriptor for the program."""
    if not isinstance(wanted, int):
        return None, wanted.fileno()
    if wanted == subprocess.DEVNULL:
        given = os.open(os.devnull, os.O_RDWR)
    elif wanted == subprocess.PIPE:
        read, write = os.pipe()
        given, own = (write, read) if number else (read, write)
        theirs.callback(os.close, given)
        return os.fdopen(own, "r" if number else "w"), given
    else:
        return None, wanted
    theirs.callback(os.close, given)
    return None, given


@cache
def nursery() -> Nursery:
    """The nursery of this process for daemons, commands, and ranks without torch."""
    return Nursery("ckptmgr.daemon.service", "called", "driven", "asking")


@cache
def torch_nursery() -> Nursery:
    """The nursery of this process for programs that need torch."""
    return Nursery("rank.killed_job")


# -- the side that forks --------------------------------------------------------------------------


def serve(number: int, modules: Sequence[str]) -> None:
    """Fork for each request, until the other side is gone."""
    for module in map(importlib.import_module, modules):
        getattr(module, "warm", bool)()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in a fork"
    requests = socket.socket(fileno=number)
    statuses: dict[int, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_BYTES_MAX, DESCRIPTORS_MAX)
        if not message:
            return
        request = json.loads(message)
        if "status" not in request:
            pid = os.fork()
            if not pid:
                requests.close()
                _ended_by(partial(become, descriptors, **request))
                return
            for descriptor in descriptors:
                os.close(descriptor)
            statuses.pop(pid, None)  # of one before it, which had the same number
            answer = {"pid": pid}
        else:
            pid = request["status"]
            if pid not in statuses:
                statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = {"status": statuses[pid]}
        requests.send(json.dumps(answer).encode())


def _ended_by(run: Callable[[], None]) -> None:
    """Run a program and end as it does, without the last step of an interpreter: to take apart all
    that was imported copies every page that is shared with the nursery, which takes a second.
    """
    status: object = 0
    try:
        run()
    except SystemExit as error:
        status = error.code or 0
    if isinstance(status, int):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):  # which the interpreter tells at its end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status & 0xFF)
    sys.exit(status)  # type: ignore[arg-type]


def become(
    descriptors: Sequence[int],
    program: list[str],
    environment: dict[str, str],
    numbers: Sequence[int],
    cwd: str,
    session: bool,
) -> None:
    """Be a program, as if started by its command line."""
    above = max(numbers) + 1  # a number that is wanted must not be one that is still to be moved
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, above) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for source, number in zip(moved, numbers, strict=True):
        os.dup2(source, number)
        os.close(source)
    if session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    found = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in found if path and path not in sys.path]
    random.seed()  # else all of them would wait alike
    name = program[0]
    sys.argv = list(program)
    if name.endswith(".py"):
        sys.path.insert(0, str(Path(name).parent))
        runpy.run_path(name, run_name="__main__")
    elif name == "ckptmgr.cli":
        sys.argv[0] = "ckptmgr"
        importlib.import_module(name).main()
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2:])
