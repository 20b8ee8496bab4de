"""An incarnation that was stopped and comes back behind a newer one: it ends, and hurts nothing."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from called import call
from ckptmgr.types import Outcome, StepId, StepState
from driven import Daemon, until
from nursery import Forked
from peers.job import Member, Watcher, commit, entries, go_on, resumed, started, stop
from rigged import Rig
from scale import scaled

pytestmark = [pytest.mark.kill, pytest.mark.reliability]

RUN = 6
"""Steps that the second incarnation commits while the first is stopped; `keep` is 3."""

HELD = {
    "written": ("put_new", "data/00000001/000000000003"),
    "stored by one rank": ("put_new", "man/00000001/000000000003/000001"),
    "stored": ("put_new", "commit/00000001/000000000003"),
}


class Incarnations:
    """Two ranks and two daemons that are stopped and continued, and a second incarnation."""

    def __init__(self, rig: Rig, hosts: list[Path], stack: ExitStack) -> None:
        self.rig, self.hosts, self._stack = rig, hosts, stack
        daemons = [stack.enter_context(Daemon(host)) for host in hosts]
        self.watcher = stack.enter_context(Watcher(rig))
        self.first = stack.enter_context(started(rig.url, *hosts[:2]))
        # Whoever is stopped must be continued, or it could not be ended.
        self.processes: list[Forked] = [
            *(member.process for member in self.first),
            *(daemon.process for daemon in daemons[:2]),
        ]
        stack.callback(go_on, self.processes)

    def overtake(self) -> list[Member]:
        """Stop the first incarnation; the second resumes and commits, and old steps go."""
        stop(self.processes)
        self.rig.obey()
        last = StepId(*map(int, str(self.watcher.seen[-1]).split(".")))
        second = self._stack.enter_context(started(self.rig.url, *self.hosts[2:]))
        name, sources, saved = resumed(second)
        assert StepId(*map(int, name.split("."))) >= last, "what was committed is resumed from"
        assert (sources, saved) == ({"store"}, [0, 1])
        self.reached = last.step + RUN
        for step in range(last.step + 1, self.reached + 1):
            commit(second, step)
        until(lambda: entries(self.rig)[f"2.{last.step + 1}"].state is StepState.RETIRED, "retired")
        return second

    def come_back(self, second: list[Member]) -> None:
        """The first incarnation goes on training; it must end, and the second must not notice."""
        go_on(self.processes)
        for member in second:
            member.ask("save", self.reached + 1)
        assert [superseded_by(member) for member in self.first] == [2, 2]
        for host in self.hosts[:2]:
            assert call("drain", runtime=host).status == 6
        assert [m.ask("wait", self.reached + 1)["outcome"] for m in second] == [
            Outcome.COMMITTED
        ] * 2
        commit(second, self.reached + 2)

    def check(self) -> None:
        """The newest steps are those of the second one, each whole; the latest never went back."""
        found = entries(self.rig)
        newest = max(one.id for one in found.values() if one.decision and one.decision.committed)
        assert newest == StepId(2, self.reached + 2)
        own = [found[f"2.{self.reached + 2 - back}"].state for back in range(3)]
        assert set(own) <= {StepState.COMMITTED, StepState.VERIFIED}
        assert not self.watcher.faults
        assert self.watcher.seen[-1].attempt == 2
        assert [one for one in self.watcher.seen if one.attempt == 1][-1].attempt == 1
        verified = call("verify", self.rig.file_url, "--all")
        assert verified.status == 0, verified


def superseded_by(member: Member) -> int:
    """The end of its training."""
    while "superseded" not in (told := member.hear()):
        assert "saved" in told
    return int(told["superseded"])


@pytest.mark.parametrize("place", ["half copied", "sealed", *HELD])
def test_a_continued_incarnation_ends_itself_wherever_it_was_stopped(
    rig: Rig, hosts: list[Path], place: str
) -> None:
    with ExitStack() as stack:
        one = Incarnations(rig, hosts, stack)
        for step in (1, 2):
            commit(one.first, step)
        until(lambda: one.watcher.seen[-1:] == [StepId(1, 2)], "seen")
        if place == "half copied":
            one.first[0].ask("save", 3)
            one.first[1].ask("copy", 3)
        elif place == "sealed":
            stop(one.processes[2:])
            for member in one.first:
                member.ask("save", 3)
        else:
            operation, prefix = HELD[place]
            rig.obey((operation, prefix, "hold"))
            for member in one.first:
                member.ask("save", 3)
            until(lambda: rig.asked(operation, prefix), place)
        second = one.overtake()
        for member in one.first:
            member.tell("train", 4)
        one.come_back(second)
        one.check()


@pytest.mark.timeout(scaled(600, 14400))
def test_a_continued_incarnation_ends_itself_whenever_it_was_stopped(
    rig: Rig, hosts: list[Path], tmp_path: Path
) -> None:
    """At random instants, each process at its own."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(scaled(1, 40)):
        (tmp_path / str(number)).mkdir()
        each = Rig(tmp_path / str(number))
        with ExitStack() as stack:
            one = Incarnations(each, hosts, stack)
            for member in one.first:
                member.tell("train", 1)
            until(lambda seen=one.watcher.seen: seen, "it commits")
            time.sleep(chance.uniform(0, 0.5))
            chance.shuffle(one.processes)
            for process in one.processes:
                stop([process])
                time.sleep(chance.choice([0, 0, chance.uniform(0, 0.05)]))
            one.come_back(one.overtake())
            one.check()
