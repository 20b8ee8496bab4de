"""Every interleaving of the commit protocol holds its invariants, and every seeded bug is found."""

from __future__ import annotations

import multiprocessing

import pytest

from model.explore import Found, Process, System, ViolatedError, World, explore
from model.protocol_bugs import BUGS
from model.protocol_setups import FULL, NORMAL
from model.protocol_system import system_of
from scale import FULL as RELIABILITY

pytestmark = pytest.mark.reliability

STATES_MIN, STATES_MIN_FULL = 1_000_000, 10_000_000
STATES_MAX = 3_000_000
"""Bound of one setup of the full run: 500 MiB."""


def explored(name: str) -> tuple[str, Found]:
    setup, rules = (NORMAL | FULL)[name]
    return name, explore(system_of(setup, rules), STATES_MAX)


def test_every_small_setup_holds_and_is_explored_whole() -> None:
    states = 0
    for name in NORMAL:
        _, found = explored(name)
        print(f"{name}: {found}")
        assert not found.violation, f"{name}: {found}"
        assert found.complete, name
        states += found.states
    print(f"{len(NORMAL)} setups: {states:,} states")
    assert states >= STATES_MIN


@pytest.mark.skipif(not RELIABILITY, reason="minutes: with CKPTMGR_RELIABILITY=1")
def test_ten_million_states_hold() -> None:
    states = 0
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        for name, found in pool.imap_unordered(explored, [*NORMAL, *FULL], chunksize=1):
            print(f"{name}: {found}", flush=True)
            assert not found.violation, f"{name}: {found}"
            states += found.states
    print(f"{len(NORMAL) + len(FULL)} setups: {states:,} states")
    assert states >= STATES_MIN_FULL


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_found(name: str) -> None:
    bug = BUGS[name]
    found = explore(system_of(bug.setup, bug.decide), STATES_MAX)
    print(f"{name}: {found}")
    assert found.violation, f"survives {found}"


def test_there_are_enough_seeded_bugs() -> None:
    assert len(BUGS) >= 25


# -- the checker itself --------------------------------------------------------------------------


def counter(name: str, ends_at: int) -> Process:
    def step(local: int, world: World) -> list[tuple[str, int, dict[object, int]]]:
        if local == ends_at:
            return []
        return [("count", local + 1, {name: (world[name] or 0) + 1})]

    return Process(name, 0, step)  # type: ignore[arg-type]


def test_every_interleaving_is_seen() -> None:
    found = explore(System((counter("a", 3), counter("b", 4))))
    assert (found.states, found.transitions, found.complete) == (20, 31, True)


def test_twins_are_seen_once() -> None:
    def step(local: int, _world: World) -> list[tuple[str, int, dict[object, int]]]:
        return [("on", local + 1, {})] if local < 3 else []

    pair = (Process("one", 0, step), Process("two", 0, step))  # type: ignore[arg-type]
    assert explore(System(pair)).states == 16
    assert explore(System(pair, twins=((0, 1),))).states == 10


def test_the_shortest_way_to_a_violation_is_told() -> None:
    def small(world: World) -> None:
        if (world["a"] or 0) + (world["b"] or 0) >= 5 and world["b"] == 1:
            raise ViolatedError("too much")

    found = explore(System((counter("a", 5), counter("b", 4)), holds=(small,)))
    assert found.violation == "too much"
    assert len(found.trace) == 5
    assert sorted(found.trace) == ["a: count"] * 4 + ["b: count"]


def test_an_end_that_is_not_one_is_told() -> None:
    def end(world: World) -> None:
        if world["a"] != 2:
            raise ViolatedError("stuck")

    assert not explore(System((counter("a", 2),), ends=end)).violation
    assert explore(System((counter("a", 3),), ends=end)).violation == "stuck"
