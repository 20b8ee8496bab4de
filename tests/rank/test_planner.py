"""Many ranks, one plan: the same steps on all of them, whatever pauses, and whoever is late."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from registers import MemberOf, MemoryRegisters

from ckptmgr.rank import courier, schedule
from ckptmgr.rank.courier import BLOCK_WINDOWS, Courier
from ckptmgr.rank.handle import Stats
from ckptmgr.rank.pace import Look
from ckptmgr.rank.planner import PLAN_SECONDS_MAX, Planner
from ckptmgr.rank.registers import Registers, StoreRegisters
from ckptmgr.rank.schedule import Every
from ckptmgr.types import Outcome, Snapshot

ATTEMPT = 3
JOIN_SECONDS = 120.0


class Commits:
    """The store of the job: a step is decided a while after every rank has sealed it."""

    def __init__(self, world: int, seconds: Callable[[], float]) -> None:
        self._world, self._seconds = world, seconds
        self._sealed: Counter[int] = Counter()
        self._due: dict[int, float] = {}
        self._lock = threading.Lock()
        self.most_undecided = 0

    def seal(self, step: int) -> None:
        with self._lock:
            self._sealed[step] += 1
            if self._sealed[step] == self._world:
                self._due[step] = time.monotonic() + self._seconds()
            undecided = [s for s in self._sealed if not self._is_decided(s)]
            self.most_undecided = max(self.most_undecided, len(undecided))

    def _is_decided(self, step: int) -> bool:
        return step in self._due and time.monotonic() >= self._due[step]

    def outcome(self, step: int) -> Outcome:
        with self._lock:
            return Outcome.COMMITTED if self._is_decided(step) else Outcome.UNDECIDED

    def complete(self) -> list[int]:
        return sorted(s for s, count in self._sealed.items() if count == self._world)


class Rank:
    """The save path of one rank without torch: a planner over slots that hold step numbers."""

    def __init__(
        self,
        rank: int,
        world: int,
        registers: Registers,
        commits: Commits,
        *,
        every: Every,
        slots: int = 2,
        clock: Callable[[], float] = time.monotonic,
        spools: bool = False,
    ) -> None:
        self.spools = spools
        self.told: list[str] = []
        self.slots: list[Snapshot | None] = [None] * slots
        self.taken: list[int] = []
        self.longest = 0.0
        self.stats = Stats()
        self._commits = commits
        self._generation = 0
        plans = Courier(MemberOf(rank, world, registers), lambda: 0, self.told.append, self.spooled)
        self.planner = Planner(rank, every, slots, ATTEMPT, plans, self.stats, clock)

    def look(self) -> Look:
        held = [one for one in self.slots if one is not None]
        return Look([(one, self.outcome(one.step)) for one in held], None, 0)

    def outcome(self, step: int) -> Outcome:
        found = self._commits.outcome(step)
        return Outcome.SPOOLED if self.spools and not found.decided else found

    def spooled(self) -> list[int]:
        held = [one.step for one in self.slots if one is not None]
        return [step for step in held if self.outcome(step) is Outcome.SPOOLED]

    def step(self, step: int) -> None:
        before = time.monotonic()
        if self.planner.due(step, self.look):
            slot = self.planner.slot(step, self.look)
            assert slot is not None, "the plan promised a slot"
            self._write(slot, step)
        self.longest = max(self.longest, time.monotonic() - before)

    def save(self, step: int) -> None:
        self._write(self.planner.slot_soon(step, self.look, lambda _: None), step)

    def _write(self, slot: int, step: int) -> None:
        newest = max((s.generation for s in self.slots if s is not None), default=-1)
        old = self.slots[slot]
        assert old is None or old.generation != newest, "the newest was overwritten"
        self._generation += 1
        self.slots[slot] = Snapshot(
            slot, self._generation, ATTEMPT, "", 0, 1, step, 0, 0, 0, 0.0, 0.0
        )
        self.taken.append(step)
        self._commits.seal(step)


def run(ranks: list[Rank], train: Callable[[int, Rank], None]) -> None:
    """Let every rank train in a thread of its own; the first failure of any is raised."""
    failures: list[BaseException] = []

    def loop(number: int, rank: Rank) -> None:
        try:
            train(number, rank)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [
        threading.Thread(target=loop, args=(number, rank), name=f"training {number}", daemon=True)
        for number, rank in enumerate(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
        assert not thread.is_alive(), "a rank hangs"
    for rank in ranks:
        rank.planner.close()
    if failures:
        raise failures[0]


def sleep_in(generator: random.Random, seconds: float) -> None:
    time.sleep(generator.expovariate(1 / seconds))


@pytest.fixture(params=["memory", "tcp", "file"])
def registers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registers]:
    if request.param == "memory":
        yield MemoryRegisters()
        return
    if request.param == "file":
        store: Any = dist.FileStore(str(tmp_path / "rendezvous"), -1)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=30))
    yield StoreRegisters.under("0" * 32, store)


def test_ranks_of_different_speed_snapshot_the_same_steps(
    registers: Registers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of different speed, pauses of every rank, a late one: 1,000 steps."""
    monkeypatch.setattr(schedule, "WINDOW_SECONDS", 0.02)
    world, steps, slots = 4, 1000, 2
    generator = random.Random(7)
    commits = Commits(world, lambda: generator.expovariate(1 / 0.02))
    ranks = [
        Rank(
            number,
            world,
            registers,
            commits,
            every=Every(seconds=0.05),
            slots=slots,
            clock=lambda speed=0.5 + number: speed * time.monotonic(),
        )
        for number in range(world)
    ]

    met = threading.Barrier(world)

    def train(number: int, rank: Rank) -> None:
        own = random.Random(number)
        if number == 2:
            time.sleep(0.7)
        for step in range(1, steps + 1):
            sleep_in(own, 0.002)
            if own.random() < 0.004:
                time.sleep(0.15)
            rank.step(step)
            if step % 20 == 0:  # as the collectives of a training make them meet
                met.wait(JOIN_SECONDS)

    run(ranks, train)
    assert all(rank.taken == ranks[0].taken for rank in ranks)
    assert len(ranks[0].taken) > 5
    assert commits.most_undecided <= slots - 1
    assert not any(rank.told for rank in ranks)


@pytest.mark.parametrize("slots", [2, 3])
def test_a_cadence_in_steps_keeps_its_multiples(slots: int) -> None:
    world = 3
    commits = Commits(world, lambda: 0.005)
    registers = MemoryRegisters()
    ranks = [
        Rank(number, world, registers, commits, every=Every(steps=10), slots=slots)
        for number in range(world)
    ]

    def train(number: int, rank: Rank) -> None:
        own = random.Random(number)
        for step in range(1, 201):
            sleep_in(own, 0.002)
            rank.step(step)

    run(ranks, train)
    assert all(rank.taken == ranks[0].taken for rank in ranks)
    assert ranks[0].taken == list(range(10, 201, 10))
    assert commits.most_undecided <= slots - 1
    assert all(name == "ckptmgr plan" for name in registers.callers), "never the training thread"


def test_a_loop_that_leaves_steps_out_is_not_snapshotted_in_between() -> None:
    registers, commits = MemoryRegisters(), Commits(2, lambda: 0.0)
    ranks = [Rank(n, 2, registers, commits, every=Every(steps=10)) for n in range(2)]

    def train(number: int, rank: Rank) -> None:
        for step in range(5, 400, 15):
            rank.step(step)

    run(ranks, train)
    assert ranks[0].taken == ranks[1].taken == [s for s in range(5, 400, 15) if s % 10 == 0]


def test_a_slow_store_delays_and_a_dead_one_is_given_up() -> None:
    """Rank 0's clock is fast, so that its patience of 10 s ends while the test runs."""
    world = 2
    commits = Commits(world, lambda: 1e9)
    registers = MemoryRegisters()
    ranks = [
        Rank(
            number,
            world,
            registers,
            commits,
            every=Every(steps=5),
            clock=lambda: 50 * time.monotonic(),
        )
        for number in range(world)
    ]

    def train(number: int, rank: Rank) -> None:
        for step in range(1, 301):
            time.sleep(0.005)
            rank.step(step)

    run(ranks, train)
    assert ranks[0].taken == ranks[1].taken
    assert len(ranks[0].taken) >= 3, "memory stays fresh"
    assert ranks[0].stats.superseded >= len(ranks[0].taken) - 1
    assert ranks[0].stats.delayed > 0


def test_a_request_of_any_rank_is_heard_by_all() -> None:
    world = 3
    registers, commits = MemoryRegisters(), Commits(world, lambda: 0.0)
    ranks = [Rank(n, world, registers, commits, every=Every()) for n in range(world)]

    def train(number: int, rank: Rank) -> None:
        for step in range(1, 401):
            time.sleep(0.005)
            if (number, step) == (2, 50):
                rank.planner.request()
            rank.step(step)

    run(ranks, train)
    assert ranks[0].taken == ranks[1].taken == ranks[2].taken
    assert len(ranks[0].taken) == 1


def test_save_is_agreed_too() -> None:
    world = 3
    registers, commits = MemoryRegisters(), Commits(world, lambda: 0.03)
    ranks = [Rank(n, world, registers, commits, every=Every(steps=20)) for n in range(world)]

    def train(number: int, rank: Rank) -> None:
        own = random.Random(number)
        for step in range(1, 101):
            sleep_in(own, 0.002)
            if step % 7 == 0:
                rank.save(step)
            else:
                rank.step(step)

    run(ranks, train)
    assert ranks[0].taken == ranks[1].taken == ranks[2].taken
    assert set(range(7, 101, 7)) <= set(ranks[0].taken)


def test_training_goes_on_past_a_rank_0_that_stops() -> None:
    """Rank 1 waits for it once, then proposes empty windows itself; later they agree again."""
    world = 2
    registers, commits = MemoryRegisters(), Commits(world, lambda: 0.0)
    ranks = [Rank(n, world, registers, commits, every=Every(seconds=0.02)) for n in range(world)]
    others_done, met, last = threading.Event(), threading.Barrier(world), 1500

    def train(number: int, rank: Rank) -> None:
        for step in range(1, last + 1):
            time.sleep(0.002)
            if (number, step) == (0, 300):
                others_done.wait(JOIN_SECONDS)
            rank.step(step)
            if (number, step) == (1, 800):
                others_done.set()
            if step == 900:  # as a collective makes them meet
                met.wait(JOIN_SECONDS)

    run(ranks, train)
    assert ranks[0].taken == ranks[1].taken
    assert any(step < 300 for step in ranks[0].taken)
    assert any(step > 900 for step in ranks[0].taken), "snapshots are taken again"
    assert not any(400 < step < 800 for step in ranks[0].taken)
    assert ranks[1].longest < 10 * PLAN_SECONDS_MAX


def test_training_goes_on_without_the_key_value_store_and_snapshots_resume() -> None:
    world = 3
    registers, commits = MemoryRegisters(), Commits(world, lambda: 0.0)
    ranks = [Rank(n, world, registers, commits, every=Every(seconds=0.02)) for n in range(world)]
    blind = threading.Barrier(world)

    def train(number: int, rank: Rank) -> None:
        for step in range(1, 1501):
            time.sleep(0.002)
            rank.step(step)
            if step in (300, 900):
                blind.wait(JOIN_SECONDS)
                if number == 0:
                    registers.answering.clear() if step == 300 else registers.answering.set()
                blind.wait(JOIN_SECONDS)

    run(ranks, train)
    for rank in ranks:
        assert any(step < 300 for step in rank.taken)
        assert not any(500 < step < 900 for step in rank.taken), "no plan, no snapshot"
        assert any(step > 1000 for step in rank.taken), "snapshots are taken again"
        assert rank.longest < 10 * PLAN_SECONDS_MAX
    after = [[step for step in rank.taken if step > 1000] for rank in ranks]
    assert after[0] == after[1] == after[2]


def test_records_that_all_have_read_are_removed() -> None:
    registers, commits = MemoryRegisters(), Commits(2, lambda: 0.0)
    ranks = [Rank(n, 2, registers, commits, every=Every(steps=1)) for n in range(2)]

    def train(number: int, rank: Rank) -> None:
        for step in range(1, 3 * BLOCK_WINDOWS):
            time.sleep(0.001)
            rank.step(step)

    run(ranks, train)
    assert "window/1" not in registers.records
    assert f"window/{3 * BLOCK_WINDOWS - 1}" in registers.records


def test_a_store_that_decides_nothing_holds_nobody_up_once_all_parts_are_spooled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And while one rank has a part in its slot only, that slot is left alone."""
    monkeypatch.setattr(courier, "COUNT_SECONDS", 0.01)
    world = 3
    registers, commits = MemoryRegisters(), Commits(world, lambda: 3600.0)
    ranks = [
        Rank(number, world, registers, commits, every=Every(steps=5), spools=number != 2)
        for number in range(world)
    ]
    met = threading.Barrier(world)

    def train(number: int, rank: Rank) -> None:
        for step in range(1, 3001):
            time.sleep(0.002)
            if number == 2 and step == 150:
                assert rank.taken == [5], "its only copy was in the way of nothing"
                rank.spools = True
            rank.step(step)
            if step % 10 == 0:
                met.wait(JOIN_SECONDS)
                enough = step >= 300 and all(one.taken[-1] > 150 for one in ranks)
                met.wait(JOIN_SECONDS)  # all have looked before anybody goes on
                if enough:
                    return

    run(ranks, train)
    assert all(rank.taken == ranks[0].taken for rank in ranks)
    assert ranks[0].taken[-1] > 150
    assert ranks[0].stats.superseded == 0


def test_all_ranks_leave_after_the_same_snapshot_whichever_was_preempted(
    registers: Registers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "WINDOW_SECONDS", 0.02)
    monkeypatch.setattr(courier, "COUNT_SECONDS", 0.01)
    world, generator = 3, random.Random(11)
    commits = Commits(world, lambda: 0.01)
    ranks = [
        Rank(number, world, registers, commits, every=Every(seconds=3600))
        for number in range(world)
    ]
    left: dict[int, int] = {}
    met = threading.Barrier(world)

    def train(number: int, rank: Rank) -> None:
        for step in range(1, 100_000):
            sleep_in(generator, 0.001)
            if number == 2 and step == 30:
                rank.planner.preempt()
            rank.step(step)
            if rank.planner.preempted:
                left[number] = step
                return
            if step % 5 == 0:  # a rank that left alone would be missed here
                met.wait(JOIN_SECONDS)

    run(ranks, train)
    assert set(left.values()) == {ranks[0].taken[-1]}, left
    assert len(left) == world
    assert all(rank.taken == ranks[0].taken for rank in ranks)
    assert left[0] >= 30
