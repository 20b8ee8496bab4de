"""How torchrun, Slurm, a kubelet and the HAI platform end a job, and what must be left of it.

Each takes a job at a random instant of its life, signals and kills as the real one does, and
leaves the judgement to the job: the last step that all ranks have sealed is committed, and the next
attempt resumes from it with every bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptmgr.config import open_private_dir
from ckptmgr.repository.catalog import Catalog
from ckptmgr.store.local import LocalStore
from driven import PYTHON_PATH, Daemon, events_of, until
from nursery import Forked
from processes import end_processes_of, holds
from ranks import start_warm

HERE = Path(__file__).parent
PROGRAM = HERE / "preempted_job.py"
LIFE_SECONDS = 0.8
"""Instants are within this time of a trainer's start: before it enters, while it restores, amid a
snapshot, between two."""

HANGS = ("", "", "loader", "c", "interpreter")

Id = tuple[int, int]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of JSON; the last may be on its way."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return []


@dataclass
class Job:
    """The attempts of one job, one after the other, and what is known of them."""

    place: Path
    runtimes: list[Path]
    facts: Counter[str] = field(default_factory=Counter)
    source: str = "signals"
    key: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    children: list[Forked] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    owed: Id = (0, 0)
    """The step that the attempts so far have sealed; the next one resumes from it, or a later."""
    exact: bool = False
    """Whether the next attempt resumes from it and from no other."""
    started: int = 0

    @property
    def store(self) -> Path:
        return self.place / "store"

    @property
    def world(self) -> int:
        return len(self.runtimes)

    # -- one attempt ----------------------------------------------------------------------------

    def start(self, hang: str = "", at: int = 0) -> None:
        """Start all ranks; if `hang` the last rank hangs so before its `at`-th step."""
        self.started += 1
        self.children, self.statuses = [], []
        for rank, runtime in enumerate(self.runtimes):
            asked = {
                "url": f"file://{self.store}",
                "said": str(self.said(rank)),
                "rank": rank,
                "world": self.world,
                "rendezvous": str(self.place / f"rendezvous{self.started}"),
                "source": self.source,
                "key": self.key,
                "site": str(HERE / "hfai_site"),
                "hang": hang if rank == self.world - 1 else "",
                "at": at,
            }
            environment = {
                "CKPTMGR_RUNTIME_DIR": str(runtime),
                "CKPTMGR_IDLE_SECONDS": "300",
                "RANK": str(rank),
                **self.environment,
            }
            log = self.place / f"trainer{rank}.log"
            self.children.append(start_warm(log, environment, PROGRAM, json.dumps(asked)))
        until(lambda: all(self.heard(rank) for rank in range(self.world)), "all ranks begin")

    def said(self, rank: int) -> Path:
        return self.place / f"{self.started}.{rank}.said"

    def heard(self, rank: int, event: str = "") -> list[dict[str, Any]]:
        """What a rank has said in this attempt."""
        found = lines_of(self.said(rank))
        return [line for line in found if not event or line["event"] == event]

    def await_resumed(self) -> None:
        """Wait until all ranks have restored, and look at what they got."""

        def all_have() -> bool:
            gone = [child for child in self.children if child.poll() is not None]
            assert not gone, (self.place / "trainer0.log").read_text()[-3000:]
            return all(self.heard(rank, "resumed") for rank in range(self.world))

        until(all_have, "all ranks resume")
        self._judge_resumed()

    def _judge_resumed(self) -> None:
        """Whatever ranks have said of what they resumed from must be what they are owed."""
        for rank in range(self.world):
            for line in self.heard(rank, "resumed"):
                found = tuple(line["id"])
                assert not line["torn"], (self.started, rank, found)
                assert found >= self.owed, f"resumed from {found}, sealed was {self.owed}"
                assert not self.exact or found == self.owed, (found, self.owed)

    def signal(self, number: int) -> None:
        """Every rank that lives."""
        for child in self.children:
            child.send_signal(number)

    def ended(self, seconds: float) -> bool:
        """Whether all ranks end within this time."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            for child in self.children:
                child.wait(max(deadline - time.monotonic(), 0))
            return True
        return False

    def kill(self) -> None:
        """SIGKILL whoever lives, and see what has become of all."""
        for child in self.children:
            child.kill()
        self.statuses = [child.wait() for child in self.children]

    # -- what is owed ---------------------------------------------------------------------------

    def settle(self) -> Id:
        """All ranks are gone: what they owe to the next attempt. Their own claims are judged."""
        self._judge_resumed()
        attempts = [
            line["attempt"] for rank in range(self.world) for line in self.heard(rank, "entered")
        ]
        sealed = [
            {line["step"] for line in self.heard(rank, "sealed")} for rank in range(self.world)
        ]
        whole = set.intersection(*sealed)
        left = [line["step"] for rank in range(self.world) for line in self.heard(rank, "leaving")]
        self.facts["attempts"] += 1
        for line in self.heard(0, "resumed"):
            self.facts[f"resumed from {line['source'] or 'nothing'}"] += 1
        if whole:
            self.owed = (attempts[0], max(whole))
        self.exact = False
        if left:
            assert len(set(left)) == 1, f"ranks left at different steps: {left}"
            self.facts["left"] += 1
            self.facts["left off the cadence"] += left[0] % 25 != 0
        for rank, status in enumerate(self.statuses):
            if status == 0:
                assert self.heard(rank, "left"), f"rank {rank} ended without a word"
                # It has waited for the commit, and every rank has sealed it.
                self.exact = self.world == 1
        for line in (one for rank in range(self.world) for one in self.heard(rank, "hangs")):
            self.facts[f"hung: {line['kind']}"] += 1
        return self.owed

    def latest(self) -> Id:
        """The newest commit that can be restored; (0, 0) if there is none."""

        async def look() -> Id:
            found = await Catalog(LocalStore(str(self.store))).latest()
            return (found.attempt, found.step) if found else (0, 0)

        return asyncio.run(look()) if self.store.exists() else (0, 0)

    def await_committed(self, step: Id) -> None:
        until(lambda: self.latest() >= step, f"{step} is committed, not only {self.latest()}")

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [line for runtime in self.runtimes for line in events_of(runtime / "daemon.log")]
        return [line for line in found if line["event"] == name]

    def daemon_pids(self) -> list[int]:
        """The daemons that live, by the logs of the runtime directories."""
        pids = {event["pid"] for event in self.events("started")}
        # The number of one that has ended may be another test's process by now.
        return [pid for pid in pids if any(holds(pid, one) for one in self.runtimes)]

    def signal_daemons(self, number: int) -> None:
        for pid in self.daemon_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def seeded() -> random.Random:
    """A generator whose seed is printed."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def begin(job: Job, chance: random.Random) -> bool:
    """Start an attempt and wait for its random instant; whether it may hang."""
    hang = chance.choice(HANGS)
    job.start(hang, chance.randrange(1, 60))
    if chance.random() < 0.7:
        job.await_resumed()
    time.sleep(chance.uniform(0, LIFE_SECONDS))
    return bool(hang)


# -- the platforms ---------------------------------------------------------------------------------


def by_torchrun(job: Job, chance: random.Random) -> None:
    """SIGTERM to the workers; SIGKILL when the window is over. The daemon is not the agent's."""
    may_hang = begin(job, chance)
    job.signal(signal.SIGTERM)
    job.ended(chance.uniform(0, 1) if may_hang else 30.0)
    job.kill()
    job.await_committed(job.settle())


def by_slurm(job: Job, chance: random.Random) -> None:
    """The signal of --signal, then SIGCONT and SIGTERM, then SIGKILL, to all processes of the step:
    the daemon that the trainer started is one of them.
    """
    may_hang = begin(job, chance)
    asked = lines_of_text(job.place / "scontrol")
    warned = chance.random() < 0.6
    if warned:
        job.signal(signal.SIGUSR1)
        job.signal_daemons(signal.SIGUSR1)
        job.ended(chance.uniform(0, 1) if may_hang else 30.0)
    if not job.ended(0):
        job.signal(signal.SIGCONT)
        job.signal_daemons(signal.SIGCONT)
        job.signal(signal.SIGTERM)
        job.signal_daemons(signal.SIGTERM)
        job.ended(chance.uniform(0, 1) if may_hang else 30.0)
    left_well = job.ended(0)
    job.kill()
    owed = job.settle()
    if left_well and job.statuses == [0] and warned and job.heard(0, "leaving"):
        until(lambda: lines_of_text(job.place / "scontrol") > asked, "the job is queued again")
        job.facts["queued again"] += 1
    for runtime in job.runtimes:
        end_processes_of(runtime)
    if job.statuses == [0] and chance.random() < 0.5:
        # Another node, or a /dev/shm of the job's own: only what was committed is there.
        assert job.latest() >= owed, "the trainer had left before this"
        forget_memory(job)


def lines_of_text(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def forget_memory(job: Job) -> None:
    """The host is gone."""
    for runtime in job.runtimes:
        shutil.rmtree(runtime)
        open_private_dir(runtime)
    job.facts["memory lost"] += 1


def by_kubelet(job: Job, chance: random.Random) -> None:
    """The sidecar first; at the end SIGTERM to the trainer, and preStop of the sidecar beside it;
    after the trainer the sidecar. The pod's memory is gone then.
    """
    with Daemon(job.runtimes[0]) as sidecar:
        may_hang = begin(job, chance)
        drain = [sys.executable, "-m", "ckptmgr.cli", "drain", "--timeout", "30"]
        environment = {"PYTHONPATH": PYTHON_PATH, "CKPTMGR_RUNTIME_DIR": str(job.runtimes[0])}
        with subprocess.Popen(
            drain, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
        ) as stopping:
            job.signal(signal.SIGTERM)
            job.ended(chance.uniform(0, 1) if may_hang else 30.0)
            job.kill()
            owed = job.settle()
            assert stopping.wait(60) == 0
        assert sidecar.end() == 0
    told = len(job.events("preempted"))
    assert len(job.events("preemption_saved")) == told, "a daemon that ends has judged them all"
    job.facts["told and saved"] += told
    assert job.latest() >= owed, "the sidecar has drained before it ended"
    forget_memory(job)


class Flag:
    """The platform's side of the suspend flag: a byte of System V shared memory."""

    def __init__(self, key: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.shmat.restype = ctypes.c_void_p
        self._id = self._libc.shmget(ctypes.c_int32(key), 1, 0o1777)  # IPC_CREAT, mode 0777
        assert self._id >= 0, os.strerror(ctypes.get_errno())
        self._address = self._libc.shmat(self._id, None, 0)
        self.write(b"0")

    def write(self, byte: bytes) -> None:
        ctypes.memmove(self._address, byte, 1)

    def remove(self) -> None:
        self._libc.shmdt(ctypes.c_void_p(self._address))
        self._libc.shmctl(self._id, 0, None)  # IPC_RMID


def by_hai(job: Job, chance: random.Random, flag: Flag) -> None:
    """The flag stands for five seconds, or until it is acknowledged and five more. Then, or when
    the job says that it can be suspended, SIGKILL to all pods. The daemons are outside.
    """
    begin(job, chance)
    said = job.place / f"hfai{job.started}"
    flag.write(b"1")
    at, seconds = time.monotonic(), 5.0
    while time.monotonic() - at < seconds:
        found = {line["event"] for line in lines_of(said)}
        if "suspended" in found or job.ended(0):
            break
        if "acknowledged" in found:
            seconds = 10.0
        if time.monotonic() - at > 5.0:
            flag.write(b"0")
        time.sleep(0.02)
    committed = job.latest()
    job.kill()
    flag.write(b"0")
    found = lines_of(said)
    for line in found:
        if line["event"] == "carried":
            attempt = job.heard(0, "entered")[0]["attempt"]
            assert committed >= (attempt, line["step"]), "it was said to be committed"
            job.facts["carried over"] += 1
    events = [line["event"] for line in found]
    job.facts["suspended in time"] += "suspended" in events
    assert all(status == -signal.SIGKILL for status in job.statuses), "a task that ends is done"
    job.await_committed(job.settle())
