"""The decisions of the protocol, one by one; together they are checked in tests/model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.repository.rules import (
    TURNS_MAX,
    complete_steps,
    goes_first,
    missing_ranks,
    next_attempt,
    resume_order,
    turn,
)
from ckptmgr.types import StepId

steps = st.builds(StepId, st.integers(1, 4), st.integers(0, 6))
sets = st.frozensets(steps, max_size=8)


def test_an_attempt_comes_after_every_other() -> None:
    assert next_attempt([]) == 1
    assert next_attempt([3, 1]) == 4


def test_a_manifest_of_another_incarnation_is_none() -> None:
    assert missing_ranks(3, "n", {0: "n", 2: "n"}) == (1,)
    assert missing_ranks(2, "n", {0: "n", 1: "m"}) == (1,)
    assert missing_ranks(2, "n", {0: "n", 1: "n", 7: "n"}) == ()


@given(st.integers(0, 1000), st.integers(1, 16), st.data())
def test_exactly_one_of_any_hosts_goes_first(step: int, world: int, data: st.DataObject) -> None:
    hosts = data.draw(st.lists(st.integers(0, 3), min_size=world, max_size=world))
    places = [{rank for rank in range(world) if hosts[rank] == host} for host in range(4)]
    assert sum(goes_first(step, world, ranks) for ranks in places) == 1


@given(st.integers(0, 1000), st.integers(1, 400), st.data())
def test_turns_come_one_after_the_other(step: int, world: int, data: st.DataObject) -> None:
    turns = sorted(turn(step, world, {rank}) for rank in range(world))
    assert turns == [min(at, TURNS_MAX) for at in range(world)]
    here = data.draw(st.sets(st.integers(0, world - 1), min_size=1))
    assert turn(step, world, here) == min(turn(step, world, {rank}) for rank in here)
    assert (turn(step, world, here) == 0) == goes_first(step, world, here)


def test_a_step_is_complete_with_every_rank_of_a_known_attempt() -> None:
    held = {
        StepId(1, 5): (0, 1),
        StepId(1, 6): (0,),
        StepId(2, 1): (0, 1, 2),
        StepId(3, 1): (0,),
    }
    assert complete_steps(held, {1: 2, 2: 4}) == {StepId(1, 5)}


@given(sets, sets, sets, sets)
def test_the_newest_that_can_be_had_and_nothing_given_up(
    committed: frozenset[StepId],
    complete: frozenset[StepId],
    given_up: frozenset[StepId],
    rejected: frozenset[StepId],
) -> None:
    found = resume_order(committed, complete, given_up, rejected)
    assert found == sorted(found, reverse=True)
    assert set(found) == (committed | complete) - given_up - rejected
