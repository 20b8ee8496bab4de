"""A day of a daemon, compressed: thousands of snapshots amid faults, and nothing grows.

10,000 snapshots, one every 8.6 s, are a day; here they follow each other at once. The store dies
for a moment, trainers are started again and resume, daemons are killed and replaced by
the rank; the last one lives through three quarters of it, and is the one that is looked at.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from called import call
from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.launch import connect
from ckptmgr.store.local import THREADS as STORE_THREADS
from ckptmgr.types import Outcome
from crash.full_disk import train
from driven import Rank, events_of, until
from rigged import Rig
from scale import soak_seconds

FULL = soak_seconds() > 0
SNAPSHOTS = 10_000 if FULL else 200
KILLS = 8 if FULL else 2
SAMPLES = 200 if FULL else 40
RESTART_EVERY, OUTAGE_EVERY = (200, 200) if FULL else (60, 45)
OUTAGE_SECONDS = 0.3
KEPT = ("buffers", "inbox", "fetched")
"""Where the daemon and its trainers leave files in host memory."""

GROWTH_MAX = {
    "descriptors": 2.0,
    "sockets": 1.0,
    "threads": 2.0,
    "files": 1.0,
    "resident KiB": 4096.0,
    "own descriptors": 2.0,
    "own threads": 2.0,
}
"""Most that a thousand snapshots may add, by the slope; what one leaked would add 1,000."""

LEAK_KIB_MAX = 32 << 10
LATE_MAX = {
    "descriptors": 2,
    "sockets": 2,
    "threads": (os.cpu_count() or 1) + 4 + STORE_THREADS,
    "files": 2,
    "own descriptors": 2,
    "own threads": 2,
}
"""What may still come late: pools start threads when they need them, that of asyncio up to four
more than there are cores, that of a local store its own number."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a daemon, and its trainer here, hold after so many snapshots."""

    snapshots: int
    values: dict[str, int]


def usage_of(pid: int, runtime: Path, snapshots: int) -> Usage:
    links = descriptors_of(pid)
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    files = [p for name in KEPT for p in (runtime / name).rglob("*")]
    own = Path("/proc/self")
    return Usage(
        snapshots,
        {
            "descriptors": len(links),
            "sockets": sum(link.startswith("socket:") for link in links),
            "threads": int(status["Threads"]),
            "files": len(files),
            "resident KiB": int(status["RssAnon"].split()[0]),
            "own descriptors": len(descriptors_of(os.getpid())),
            "own threads": len(list(own.joinpath("task").iterdir())),
        },
    )


def descriptors_of(pid: int) -> list[str]:
    """What its descriptors lead to; one may close while we look, as that of the listing does."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def slope(samples: list[Usage], what: str) -> float:
    """Growth in a thousand snapshots, by least squares."""
    x = np.array([one.snapshots for one in samples]) / 1000
    return float(np.polyfit(x, [one.values[what] for one in samples], 1)[0])


class Job:
    """A trainer in this process, whose daemon is whichever the rank has started."""

    def __init__(self, runtime: Path, rig: Rig) -> None:
        self._runtime, self._rig = runtime, rig
        self.rank = Rank(runtime, rig.url, keep=2)
        self.step = self.saved = self.restarts = self.outages = 0

    @property
    def daemon(self) -> int:
        """The pid of the daemon that answers now."""
        with connect(self._runtime) as client:
            return int(client.ask(Status(), Stated).state["pid"])

    def save(self) -> None:
        self.step += 1
        self.saved += 1
        self.rank.save(self.step)

    def settle(self) -> None:
        """Wait until the newest snapshot is committed."""
        assert self.rank.wait(self.step).outcome == Outcome.COMMITTED

    def restart(self) -> None:
        """The trainer ends without a word and the next one resumes, bit for bit."""
        self.rank.close()
        self.rank = Rank(self._runtime, self._rig.url, keep=2)
        assert self.rank.restore().step == self.step
        self.restarts += 1
        self.save()
        self.settle()

    def outage(self) -> None:
        """The store is dead for a moment while the trainer goes on."""
        operation = ("put_new", "get", "*")[self.outages % 3]
        self._rig.obey((operation, "", "dead"))
        for _ in range(3):  # more than there are slots: the oldest is given up
            self.step += 1
            self.saved += 1
            train(self.rank, self.step)
        time.sleep(OUTAGE_SECONDS)
        self._rig.obey()
        self.outages += 1

    def kill_daemon(self) -> None:
        pid = self.daemon
        os.kill(pid, signal.SIGKILL)
        until(lambda: answers(lambda: self.daemon != pid), "the rank starts another daemon")


def answers(ask: Callable[[], bool]) -> bool:
    from ckptmgr.errors import DaemonError

    try:
        return ask()
    except DaemonError:
        return False


@pytest.fixture
def rig(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rigged store in memory: disks have tests of their own."""
    (runtime / "disk").mkdir()
    found = Rig(runtime / "disk")
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    return found


@pytest.mark.soak
@pytest.mark.reliability
def test_a_day_of_faults_leaves_nothing_behind(runtime: Path, rig: Rig) -> None:
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    kills = sorted(chance.sample(range(1, SNAPSHOTS // 4), KILLS))
    job, samples, begun = Job(runtime, rig), list[Usage](), time.monotonic()
    while job.saved < SNAPSHOTS:
        job.save()
        if kills and job.saved >= kills[0]:
            kills.pop(0)
            job.save()
            job.kill_daemon()
        if job.saved // OUTAGE_EVERY > job.outages:
            job.outage()
        if job.saved // RESTART_EVERY > job.restarts:
            job.restart()
        due = len(samples) * SNAPSHOTS // SAMPLES
        if not kills and job.saved >= max(due, SNAPSHOTS // 3):
            job.settle()
            samples.append(usage_of(job.daemon, runtime, job.saved))
    job.settle()
    fresh = fresh_usage(job, runtime)
    log = events_of(runtime / "daemon.log.1") + events_of(runtime / "daemon.log")
    faults = [event for event in log if event["event"] == "fault"]
    job.rank.close(clean=True)
    assert call("verify", rig.file_url).status == 0
    assert call("drain", "--stop", runtime=runtime).status == 0
    report(job, seed, time.monotonic() - begun, samples, fresh)
    assert not faults
    left = list((runtime / "buffers").iterdir())
    assert not left, "a buffer that nobody needs was left"
    if FULL:
        found = {what: slope(samples, what) for what in GROWTH_MAX}
        assert {what: grown for what, grown in found.items() if grown > GROWTH_MAX[what]} == {}
    # Listings of a store with more steps are longer: what is no leak, a new daemon takes, too.
    grown = samples[-1].values["resident KiB"] - fresh.values["resident KiB"]
    assert grown <= LEAK_KIB_MAX, f"{grown} KiB more than a new daemon on the same store"
    for what, more in LATE_MAX.items():
        early, late = samples[: len(samples) // 4], samples[-len(samples) // 4 :]
        most = max(one.values[what] for one in early)
        assert min(one.values[what] for one in late) <= most + more, f"{what} grew"


def fresh_usage(job: Job, runtime: Path) -> Usage:
    """What a new daemon holds after a few snapshots into the same store."""
    job.kill_daemon()
    for _ in range(30):
        job.save()
    job.settle()
    return usage_of(job.daemon, runtime, job.saved)


def report(job: Job, seed: int, seconds: float, samples: list[Usage], fresh: Usage) -> None:
    print(f"\nseed {seed}: {job.saved} snapshots in {seconds:.0f} s, {KILLS} daemons killed,")
    print(f"{job.restarts} trainers restarted, {job.outages} outages of the store")
    first, last = samples[0], samples[-1]
    print(f"the last daemon, {last.snapshots - first.snapshots} snapshots, {len(samples)} samples:")
    for what in GROWTH_MAX:
        values = [one.values[what] for one in samples]
        print(
            f"  {what}: {values[0]} at first, {values[-1]} at last, at most {max(values)}, "
            f"slope {slope(samples, what):+.3f} in 1,000; {fresh.values[what]} of a new one"
        )
