"""The oracle of a job of many ranks that is killed: it starts, kills, and judges what they say.

It lives outside every process that is killed. It has the lines of the same training that nobody
killed and that had no checkpoints at all; whatever any incarnation of any rank says of a step must
be the same line. What must come back is read from host memory and from the store.
"""

from __future__ import annotations

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash.peek import WRITING, slots_below
from crash.storm import INSIDE, BrokenPromiseError, Id, Storm
from nursery import Forked
from ranks import TESTS, start_warm

PROGRAM = TESTS / "rank" / "killed_job.py"
SECONDS_MAX = 150.0
"""Bound of every wait: far above what is ever needed, so that only a hang meets it."""

TAIL_STEPS = 6
"""What the last incarnation trains beyond what any before it has reached."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One parallelism: how many ranks it has, on how many hosts, and for how many steps."""

    layout: str
    world: int
    steps: int
    hosts: int = 2

    def __str__(self) -> str:
        return f"{self.layout} x{self.world}"

    def host_of(self, rank: int) -> int:
        return rank * self.hosts // self.world


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environments(plan: Plan, hosts: list[Storm]) -> list[dict[str, str]]:
    """What a launcher would set for each rank, and the runtime directory of its host."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    where |= {"WORLD_SIZE": str(plan.world), "CKPTMGR_IDLE_SECONDS": "120"}
    return [
        where | {"RANK": str(r), "CKPTMGR_RUNTIME_DIR": str(hosts[plan.host_of(r)].runtime)}
        for r in range(plan.world)
    ]


def start_rank(log: Path, environment: dict[str, str], *arguments: object) -> Forked:
    """One rank of killed_job.py."""
    return start_warm(log, environment, PROGRAM, *map(str, arguments))


def truth_of(plan: Plan, place: Path) -> list[list[dict[str, Any]]]:
    """What each rank says of each step if nobody kills it; at 0 the state before the first."""
    place.mkdir()
    host = Storm(place, place, random.Random(0))
    children = [
        start_rank(place / "log", environment, plan.layout, "", plan.steps, place)
        for environment in environments(plan, [host] * plan.hosts)
    ]
    assert [child.wait() for child in children] == [0] * plan.world, (place / "log").read_text()[
        -3000:
    ]
    told = []
    for rank in range(plan.world):
        lines = map(json.loads, (place / f"{rank}.said").read_text().splitlines())
        told.append([one for one in lines if one["event"] in ("resumed", "step")])
    return told


@dataclass(slots=True)
class Heard:
    """What one rank has said so far; `last` is its last event, `step` where it is; `leaving` when
    it is about to give its memory back.
    """

    read: int = 0
    last: str = ""
    step: int = 0
    pid: int = 0
    resumed: int = 0
    ended: bool = False
    leaving: bool = False
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Judge:
    """Reads what the ranks say, and compares it with the truth.

    `floor` is what the next resume must have at least, `before` the last step that any rank had
    made when it began, and `held` the steps that must come from memory.
    """

    truth: list[list[dict[str, Any]]]
    place: Path
    facts: Counter[str]
    floor: Id = (0, 0)
    heard: list[Heard] = field(default_factory=list)
    acked: set[Id] = field(default_factory=set)
    chosen: dict[int, Id] = field(default_factory=dict)
    furthest: int = 0
    before: int = 0
    held: set[Id] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.heard = [Heard() for _ in self.truth]

    def hold(self, whole: set[Id]) -> None:
        """What memory holds before the next incarnation: it must come from there, unless a rank has
        given its memory back, which is freed in time.
        """
        self.held = set() if any(one.leaving for one in self.heard) else whole

    def read(self) -> None:
        """Take in and judge everything that was said since."""
        for rank, one in enumerate(self.heard):
            path = self.place / f"{rank}.said"
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(one.read)
                lines = file.read().splitlines(keepends=True)
            for line in lines:
                if line.endswith(b"\n"):
                    one.read += len(line)
                    self._judge(rank, one, json.loads(line))

    def _judge(self, rank: int, one: Heard, said: dict[str, Any]) -> None:
        one.last = said["event"]
        one.counts[one.last] += 1
        if one.last == "begun":
            one.pid, one.ended, one.leaving = said["pid"], False, False
        elif one.last == "leaving":
            one.leaving = True
        elif one.last == "acked":
            self.acked.add((said["id"][0], said["id"][1]))
        elif one.last == "resumed":
            self._judge_resume(rank, one, said)
        elif one.last == "step":
            if said != self.truth[rank][one.step + 1]:
                expected = self.truth[rank][one.step + 1]
                raise BrokenPromiseError(f"rank {rank}: {said} and not {expected}")
            one.step += 1
            self.furthest = max(self.furthest, one.step)
        elif one.last == "ended":
            one.ended = True
            if said["digest"] != self.truth[rank][one.step]["digest"]:
                raise BrokenPromiseError(f"rank {rank} ended with other bits")

    def _judge_resume(self, rank: int, one: Heard, said: dict[str, Any]) -> None:
        found = (said["id"][0], said["id"][1])
        agreed = self.chosen.setdefault(said["attempt"], found)
        if found != agreed:
            raise BrokenPromiseError(f"rank {rank} resumed from {found}, another from {agreed}")
        if said["skipped"]:
            raise BrokenPromiseError(f"a step was skipped: {said}")
        least = max([self.floor, *(i for i in self.acked if i[0] < said["attempt"])])
        if found < least:
            raise BrokenPromiseError(f"rank {rank} resumed from {found}, though {least} was there")
        if found in self.held and said["source"] != "memory":
            raise BrokenPromiseError(f"rank {rank} read from the store what memory holds: {said}")
        one.step = one.resumed = found[1]
        if said["digest"] != self.truth[rank][one.step]["digest"]:
            raise BrokenPromiseError(f"rank {rank} resumed from {found} with other bits")
        self.facts[f"from {said['source'] or 'nothing'}"] += 1
        self.facts["lost"] = max(self.facts["lost"], self.before - found[1])


@dataclass(slots=True)
class KilledJob:
    """One job on one store, with a daemon on each of its hosts, and its incarnations."""

    plan: Plan
    random: random.Random
    hosts: list[Storm]
    judge: Judge
    children: list[Forked] = field(default_factory=list)
    until: int = 0

    @property
    def place(self) -> Path:
        return self.judge.place

    def start(self) -> None:
        """The next incarnation, as a scheduler starts it again; what it must find is known."""
        whole = self.whole_in_memory()
        committed = self.hosts[0].store_latest() or (0, 0)
        self.judge.floor = max([self.judge.floor, committed, *whole])
        # What a mesh or DDP shares out is also read from other hosts, which is by the store.
        self.judge.hold(whole if self.plan.layout != "ddp" or self.plan.hosts == 1 else set())
        self.judge.before = self.judge.furthest
        steps = self.until or self.plan.steps
        arguments = [self.plan.layout, self.hosts[0].url, steps, self.place]
        self.children = [
            start_rank(self.place / f"{rank}.log", environment, *arguments)
            for rank, environment in enumerate(environments(self.plan, self.hosts))
        ]

    def whole_in_memory(self) -> set[Id]:
        """The steps of which every rank's part is in host memory."""
        held: dict[Id, set[Path]] = {}
        for host in self.hosts:
            for slot in slots_below(host.runtime):
                if slot.usable:
                    held.setdefault(slot.id, set()).add(slot.path)
        return {one for one, paths in held.items() if len(paths) == self.plan.world}

    def await_(self, holds: Callable[[], bool], what: str) -> None:
        """Read on until something is so; no rank may end by itself meanwhile."""
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            dead = [rank for rank, child in enumerate(self.children) if child.poll() is not None]
            self.hear()
            if holds() or self.ended():
                return
            lost = [rank for rank in dead if not self.judge.heard[rank].ended]
            if lost or time.monotonic() > deadline:
                raise BrokenPromiseError(f"{what} never came; ended: {lost}\n{self.logs(lost)}")
            time.sleep(0.001)

    def await_event(self, event: str, count: int = 1) -> None:
        """Wait until rank 0 has said it so many times more."""
        one = self.judge.heard[0]
        goal = one.counts[event] + count
        self.await_(lambda: one.counts[event] >= goal, event)

    def is_fresh(self) -> bool:
        """Whether rank 0 of this incarnation has not begun to restore, as far as was heard."""
        one = self.judge.heard[0]
        return one.pid != self.children[0].pid or one.last == "begun"

    def ended(self) -> bool:
        """Whether all ranks have come to the end of the training."""
        return bool(self.children) and all(one.ended for one in self.judge.heard)

    def logs(self, ranks: list[int]) -> str:
        logs = [self.place / f"{rank}.log" for rank in ranks or range(self.plan.world)]
        told = [f"{log.name}: {log.read_text()[-2500:]}" for log in logs if log.exists()]
        return "\n".join([*told, *(line for host in self.hosts for line in host.tail())])

    def bury(self) -> None:
        """End those that are left, as a launcher does, and hear the last words of all."""
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()
        self.children = []
        self.hear()

    def hear(self) -> None:
        """Judge what was said since; a broken promise is told with the logs, which do not stay."""
        try:
            self.judge.read()
        except BrokenPromiseError as error:
            error.add_note(self.logs([]))
            raise

    def finish(self) -> None:
        """Start it once more, to a few steps on, and wait for a clean end of all ranks."""
        if not self.ended():
            if self.is_fresh():
                self.await_event("step")
            self.bury()
            self.until = min(self.judge.furthest + TAIL_STEPS, self.plan.steps)
            self.start()
        self.await_(self.ended, "the end")
        found = [child.wait() for child in self.children]
        self.children = []
        if any(found):
            raise BrokenPromiseError(f"ended with {found}\n{self.logs([])}")

    def kill_daemons(self, hosts: list[Storm]) -> int:
        return sum([host.kill_daemon() for host in hosts])

    def place_of_kill(self) -> str:
        """What the job was in the middle of, as far as can be told from outside."""
        self.hear()
        last = [one.last for one in self.judge.heard]
        if any(slot.state == WRITING for host in self.hosts for slot in slots_below(host.runtime)):
            return "mid-restore" if "restoring" in last else "mid-copy"
        if "restoring" in last:
            return "mid-restore"
        places = [host.daemon_place("") for host in self.hosts]
        inside = [one for one in places if one in INSIDE]
        return inside[0] if inside else "elsewhere"

    def close(self) -> None:
        """End everything."""
        if self.children:
            for child in self.children:
                child.kill()
                child.wait()
        self.kill_daemons(self.hosts)
