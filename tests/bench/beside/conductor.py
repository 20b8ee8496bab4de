"""Visits every library in turn, round after round, each in processes of its own."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.beside.disk import evict
from bench.beside.gauge import TOKEN, members
from bench.beside.job import Job
from bench.beside.roster import Entry

Line = dict[str, Any]
TESTS = Path(__file__).parents[2]
REASON_LENGTH_MAX = 160


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures, and where."""

    entries: tuple[Entry, ...]
    directory: Path
    mib: int
    tensors: int
    dtype: str
    ranks: int
    repeat: int
    snapshots: int
    step_seconds: float
    timeout_seconds: float
    others: Path | None
    """Interpreter of the environment that the other libraries are in."""

    missing: dict[str, str]
    """Requirement -> why it could not be installed."""

    @property
    def shown(self) -> Line:
        """What the table says of it."""
        names = ("mib", "tensors", "dtype", "ranks", "repeat", "snapshots", "step_seconds")
        return {name: getattr(self, name) for name in names}


def conduct(plan: Plan, tell: Callable[[str], None]) -> Iterator[Line]:
    """Yield one line for the run, one per round for the limits, and one per visit. A library that
    has failed is not visited again.
    """
    quiet = Visit(plan, None)
    operations = quiet.alone("calibrate")["operations"]
    began = os.getloadavg()[0]
    yield {"kind": "run", **plan.shown, **machine(), "operations": operations, "load": began}
    failed: set[str] = set()
    for number in range(plan.repeat):
        yield {"kind": "limits", "round": number, **quiet.alone("limits")}
        for entry in plan.entries:
            if entry.name in failed:
                continue
            start = time.monotonic()
            found = Visit(plan, entry, operations).made()
            if "failure" in found:
                failed.add(entry.name)
            what = found.get("failure", "measured")
            tell(f"round {number + 1}: {entry.name}: {what} ({time.monotonic() - start:.0f} s)")
            yield {"kind": "visit", "round": number, "peer": entry.name, **found}
    yield {"kind": "end", "load": os.getloadavg()[0]}


def machine() -> Line:
    """What figures mean nothing without."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30)),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


class Visit:
    """A directory, a token and a runtime directory of its own, and nothing left of them."""

    def __init__(self, plan: Plan, entry: Entry | None, operations: int = 1) -> None:
        self.plan, self.entry, self.operations = plan, entry, operations
        self.token = f"bench-{secrets.token_hex(6)}"
        self.directory = plan.directory / self.token
        self.runtime = Path("/dev/shm") / self.token

    def alone(self, phase: str) -> Line:
        """A phase that is no library's."""
        try:
            return self._phase(phase, 1)
        finally:
            self._clear()

    def made(self) -> Line:
        """All phases of a library; a failure is the reason why there is nothing."""
        assert self.entry is not None
        if self.plan.ranks > self.entry.ranks_max:
            return {"failure": f"not with {self.plan.ranks} ranks"}
        reason = self.plan.missing.get(self.entry.requires, "")
        if reason or (self.entry.requires and self.plan.others is None):
            return {"failure": reason or "its environment was not made: `make bench` makes it"}
        try:
            found = {"save": self._phase("save", self.plan.ranks)}
            if self.entry.memory:
                found["memory"] = self._restored()
            self._end()
            evict(self.directory)
            found["cold"] = self._restored()
            self._end()
            found["warm"] = self._restored()
        except VisitError as error:
            return {"failure": str(error)}
        finally:
            self._clear()
        return found

    def _restored(self) -> Line:
        found = self._phase("restore", self.plan.ranks)
        if found["wrong"]:
            raise VisitError(f"restored {found['wrong']} wrong tensors")
        return found

    def _phase(self, phase: str, ranks: int) -> Line:
        """Run a phase, one process per rank, and merge what they found."""
        self.directory.mkdir(exist_ok=True)
        self.runtime.mkdir(mode=0o700, exist_ok=True)
        log = (self.directory.parent / f"{self.token}.log").open("ab")
        port = free_port()
        jobs = [self._job(phase, rank) for rank in range(ranks)]
        started = [self._start(job, port, log) for job in jobs]
        if phase == "restore" and self.entry is not None and self.entry.before_restore:
            given = [one.format(directory=self.directory) for one in self.entry.before_restore]
            environment = self._environment(jobs[0], port)
            started.append(self._run([sys.executable, *given], log, environment))
        deadline = time.monotonic() + self.plan.timeout_seconds
        try:
            for process in started:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            limit = f"{self.plan.timeout_seconds:.0f} s"
            raise VisitError(f"{phase}: no end after {limit}") from None
        finally:
            log.close()
            for process in started:
                process.kill()
                process.wait()
        return merged([self._answer(job) for job in jobs])

    def _job(self, phase: str, rank: int) -> Job:
        plan, entry = self.plan, self.entry
        return Job(
            phase=phase,
            adapter=entry.adapter if entry else "",
            distribution=entry.distribution if entry else "",
            directory=str(self.directory),
            answer=str(self.directory.parent / f"{self.token}.{phase}.{rank}"),
            mib=plan.mib,
            tensors=plan.tensors,
            dtype=plan.dtype,
            snapshots=plan.snapshots,
            step_seconds=plan.step_seconds,
            operations=self.operations,
            rank=rank,
            world=plan.ranks,
        )

    def _start(self, job: Job, port: int, log: Any) -> subprocess.Popen[bytes]:
        outside = self.entry is not None and self.entry.requires
        python = str(self.plan.others) if outside else sys.executable
        command = [python, "-m", "bench.beside.trainer", job.line]
        return self._run(command, log, self._environment(job, port))

    def _environment(self, job: Job, port: int) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        places = {"RANK": str(job.rank), "WORLD_SIZE": str(job.world)}
        places |= {"LOCAL_RANK": str(job.rank), "LOCAL_WORLD_SIZE": str(job.world)}
        return {
            **os.environ,
            **places,
            TOKEN: self.token,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "CKPTMGR_RUNTIME_DIR": str(self.runtime),
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "ignore",
        }

    @staticmethod
    def _run(command: list[str], log: Any, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def _answer(self, job: Job) -> Line:
        path = Path(job.answer)
        found: Line = json.loads(path.read_text()) if path.exists() else {}
        path.unlink(missing_ok=True)
        if not found:
            raise VisitError(f"{job.phase}: its process died without a word")
        if "failure" in found:
            reason = " ".join(found["failure"].split()).replace(str(self.directory), "DIRECTORY")
            raise VisitError(f"{job.phase}: {reason[:REASON_LENGTH_MAX]}")
        return found

    def _end(self) -> None:
        """End every process of this visit, and wipe the memory that they had in common."""
        while pids := members(self.token):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for place in (Path("/dev/shm"), Path("/tmp/ckpt_sock")):
            for path in place.glob(f"*{self.token}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _clear(self) -> None:
        self._end()
        shutil.rmtree(self.directory, ignore_errors=True)
        for path in self.directory.parent.glob(f"{self.token}.*"):
            path.unlink()


class VisitError(Exception):
    """A library could not be measured; the message is the reason."""


def merged(answers: list[Line]) -> Line:
    """What ranks found, as one: whatever is slower or larger counts, for all wait for it; the
    processor time of steps adds up.
    """
    first, rest = answers[0], answers[1:]
    found: Line = {}
    for key, value in first.items():
        others = [answer[key] for answer in rest]
        if key == "snapshots":
            found[key] = [merged([value[at], *(o[at] for o in others)]) for at in range(len(value))]
        elif key == "steps_cpu_s":
            found[key] = sum([value, *others])
        elif isinstance(value, (int, float)):
            found[key] = max([value, *others])
        else:
            found[key] = value
    return found


def free_port() -> int:
    """A port where ranks may meet."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
