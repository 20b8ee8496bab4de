"""Ranks in a tenth of a second each: forked from one process that has imported torch already.

`python zygote.py MODULE` imports the module, runs its `warm`, and then forks a child for each line
on its input. It has one thread and no process group, so that forking it is sound; its children are
processes like any other, each with its own pid, log and environment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TESTS = Path(__file__).parents[1]
SECONDS_MAX = 180.0
"""For importing torch on a busy machine; everything after it takes milliseconds."""

# -- the side of the test -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Child:
    """A forked process; `handle` is its pidfd, so that no other process can be meant."""

    pid: int
    handle: int

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended, or does so in time."""
        return bool(select.select([self.handle], [], [], seconds)[0])


class Zygote:
    """Forks children that run `function(*arguments)` of one module."""

    def __init__(self, module: str) -> None:
        paths = os.pathsep.join(map(str, [TESTS.parent, TESTS, TESTS / "rank"]))
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, module],
            env={**os.environ, **threads, "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._rest = b""
        self._statuses: dict[int, int] = {}
        self._told("ready")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # it ends its children, then itself
        self._process.wait()

    def fork(self, environment: dict[str, str], log: Path, *arguments: Any) -> Child:
        """Start `run(*arguments)` of the module in a new process, with this added to its
        environment and its output in `log`.
        """
        asked = {"environment": environment, "log": str(log), "arguments": arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._told("forked")["pid"]
        return Child(pid, os.pidfd_open(pid))

    def status(self, child: Child) -> int:
        """Wait for its end; its status, negative for a signal."""
        while child.pid not in self._statuses:
            self._told("ended")
        os.close(child.handle)
        return self._statuses.pop(child.pid)

    def _told(self, word: str) -> dict[str, Any]:
        """Read until the zygote says `word`."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                said = json.loads(line)
                if said["said"] == "ended":
                    self._statuses[said["pid"]] = said["status"]
                if said["said"] == word:
                    return dict(said)
                continue
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self._process.stdout], [], [], left)[0], f"no {word}"
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            assert piece, "the zygote has ended"
            self._rest += piece


# -- the side of the children ---------------------------------------------------------------------


def _say(said: str, **what: Any) -> None:
    os.write(1, json.dumps({"said": said, **what}).encode() + b"\n")


def _become(module: Any, asked: dict[str, Any]) -> None:
    """The life of a child. `os._exit`: the threads of gloo do not always end by themselves."""
    status = 1
    try:
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(asked["environment"])
        module.run(*asked["arguments"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reap(children: set[int]) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.discard(pid)
            _say("ended", pid=pid, status=os.waitstatus_to_exitcode(status))


def _main(name: str) -> None:
    module = importlib.import_module(name)
    module.warm()
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in a fork"
    children: set[int] = set()
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    _say("ready")
    asked = b""
    while True:
        ready = select.select([0, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 1 << 12)
            _reap(children)
        if 0 not in ready:
            continue
        piece = os.read(0, 1 << 16)
        if not piece:
            break
        *lines, asked = (asked + piece).split(b"\n")
        for line in lines:
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _become(module, json.loads(line))
            children.add(pid)
            _say("forked", pid=pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _main(sys.argv[1])
