"""Where the time of a job went: definitions, bounds, and the metrics of a real daemon."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.goodput import account, observed_failures
from ckptmgr.repository.history import Attempt, furthest
from ckptmgr.types import Reach, StepId
from driven import Daemon, Rank
from knowing.jobs import await_sample, counted, forget_host_memory, sample, train

SCRATCH = StepId(0, 0)


def attempt(
    number: int, claimed_at: float, resumed: StepId | None, reach: Reach | None = None
) -> Attempt:
    return Attempt(number, claimed_at, 1, resumed, reach)


def test_a_job_that_was_never_killed() -> None:
    found = account([attempt(1, 100.0, SCRATCH, Reach(1, 1, 110.0, 91, 200.0))], {}, 9.0, 210.0)
    assert (found.wall_seconds, found.productive_seconds, found.stall_seconds) == (110, 81, 9)
    assert (found.lost_seconds, found.down_seconds, found.restarts) == (0, 20, ())
    assert found.ettr == pytest.approx(81 / 110)


def test_lost_steps_are_those_behind_the_step_that_is_resumed_from() -> None:
    attempts = [
        attempt(1, 0.0, SCRATCH, Reach(1, 1, 10.0, 101, 110.0)),
        attempt(2, 150.0, StepId(1, 81), Reach(2, 82, 170.0, 92, 180.0)),
    ]
    found = account(attempts, {}, 0.0, 180.0)
    (restart,) = found.restarts
    assert (restart.reached, restart.lost_steps, restart.exact) == (StepId(1, 101), 20, True)
    assert restart.lost_seconds == restart.lost_seconds_max == pytest.approx(20.0)
    assert found.productive_seconds == pytest.approx(80 + 10)
    assert found.down_seconds == pytest.approx(10 + 60)


def test_without_a_witness_what_was_lost_is_bounded_from_both_sides() -> None:
    """The last commit at 60 s, the next claim at 100 s: anything between may be lost."""
    attempts = [attempt(1, 0.0, SCRATCH), attempt(2, 100.0, StepId(1, 40))]
    found = account(attempts, {1: Reach(1, 20, 30.0, 50, 60.0)}, 0.0, 120.0)
    (restart,) = found.restarts
    assert (restart.exact, restart.lost_steps) == (False, 10)
    assert restart.lost_seconds == pytest.approx(10.0)
    assert restart.lost_seconds_max == pytest.approx(10.0 + 40.0)
    assert not found.exact
    assert observed_failures(found) == 1


def test_an_older_attempt_s_step_throws_all_later_attempts_away() -> None:
    attempts = [
        attempt(1, 0.0, SCRATCH, Reach(1, 1, 0.0, 11, 10.0)),
        attempt(2, 10.0, StepId(1, 11), Reach(2, 12, 10.0, 21, 19.0)),
        attempt(3, 20.0, StepId(1, 6), Reach(3, 7, 20.0, 8, 21.0)),
    ]
    found = account(attempts, {}, 0.0, 21.0)
    assert [one.lost_steps for one in found.restarts] == [0, 10 + 5]
    assert observed_failures(found) == 1, "the first one lost nothing"


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Attempt], dict[int, Reach], float]:
    """Any job: attempts that train, tell or do not, and resume from any step that there is."""
    at, found, sealed = 0.0, list[Attempt](), dict[int, Reach]()
    reached: list[Reach] = []
    for number in range(1, draw(st.integers(1, 6)) + 1):
        at += draw(st.floats(0, 1e3))
        claimed, source = at, SCRATCH
        if reached:
            old = draw(st.sampled_from(reached))
            source = StepId(old.attempt, draw(st.integers(old.first_step, old.last_step)))
        first = source.step + 1
        at += draw(st.floats(0, 1e3))
        steps, seconds = draw(st.integers(1, 1000)), draw(st.floats(0, 1e4))
        reach = Reach(number, first, at, first + steps - 1, at + seconds)
        at += seconds
        told = draw(st.sampled_from(["told", "sealed", "silent"]))
        if told != "silent":
            reached.append(reach)
        if told == "sealed":
            sealed[number] = reach
        found.append(attempt(number, claimed, source, reach if told == "told" else None))
    return found, sealed, at + draw(st.floats(0, 1e3))


@given(histories(), st.floats(0, 1e5))
def test_the_parts_are_the_whole_and_none_is_negative(
    history: tuple[list[Attempt], dict[int, Reach], float], stall: float
) -> None:
    attempts, sealed, now = history
    found = account(attempts, sealed, stall, now)
    parts = (found.productive_seconds, found.stall_seconds, found.lost_seconds, found.down_seconds)
    assert all(part >= -1e-6 for part in parts)
    assert math.isclose(sum(parts), found.wall_seconds, abs_tol=1e-6)
    assert 0 <= found.ettr <= 1
    trained = sum(r.last_step - r.first_step + 1 for r in [*furthest(sealed.values()).values()])
    trained += sum(a.reached.last_step - a.reached.first_step + 1 for a in attempts if a.reached)
    assert 0 <= found.lost_steps <= trained
    assert found.lost_seconds <= found.lost_seconds_max + 1e-6
    for restart in found.restarts:
        assert not restart.exact or restart.lost_seconds == restart.lost_seconds_max


def test_a_daemon_counts_what_a_killed_trainer_had_reached(runtime: Path, store_url: str) -> None:
    """The last committed step is 4, the last step that training told of is 9: five are lost."""
    with Daemon(runtime) as daemon:
        with Rank(runtime, store_url) as rank:
            rank.restore()
            train(rank, range(1, 10), saved=(2, 4))
            await_sample(daemon, "ckptmgr_current_step", 9.0)
        with Rank(runtime, store_url) as rank:
            assert rank.restore().step == 4
            train(rank, (5, 6), saved=())
            told = counted(daemon)
            assert (told["resumed_from"], told["lost_steps"], told["exact"]) == ("1.4", 5, True)
            assert sample(daemon, "ckptmgr_restarts_total") == {(): 1.0}
            assert sample(daemon, "ckptmgr_lost_steps_total") == {("exact",): 5.0}
            (ettr,) = sample(daemon, "ckptmgr_ettr_ratio").values()
            assert 0 < ettr < 1
        daemon.end(9)
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        # The next daemon has seen none of it, and knows it all the same.
        assert rank.restore().step == 4
        train(rank, (5,), saved=())
        assert counted(daemon, 2)["attempt"] == 3
        assert sample(daemon, "ckptmgr_lost_steps_total") == {("exact",): 7.0}


def test_a_host_that_is_gone_leaves_a_lower_bound(runtime: Path, store_url: str) -> None:
    with Daemon(runtime) as daemon:
        with Rank(runtime, store_url) as rank:
            rank.restore()
            train(rank, range(1, 8), saved=(2, 4))
        daemon.end(9)
    forget_host_memory(runtime)
    with Daemon(runtime) as daemon, Rank(runtime, store_url) as rank:
        assert rank.restore().step == 4
        train(rank, (5,), saved=())
        told = counted(daemon)
        assert (told["lost_steps"], told["exact"]) == (0, False)
        assert sample(daemon, "ckptmgr_lost_steps_total") == {("at_least",): 0.0}
        assert sample(daemon, "ckptmgr_lost_seconds_total")[("at_most",)] > 0
