"""How often to snapshot: the formulas, what is assumed, and the command."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from called import call
from ckptmgr.advise import (
    RANK_MTBF_HOURS,
    Given,
    Measured,
    advice,
    availability_optimal,
    every_of,
    facts_of,
    losses,
    overhead,
    young_daly,
)
from ckptmgr.commands.knowing import _measured
from ckptmgr.config import GIB
from ckptmgr.goodput import Goodput, Restart
from ckptmgr.rank.schedule import parse_every
from ckptmgr.repository.history import History
from ckptmgr.types import StepId
from driven import Daemon
from knowing.jobs import trained

stalls = st.floats(1e-3, 600)
times = st.floats(600, 1e9)
restarts = st.floats(0, 3600)


@given(stalls, times, st.floats(0.01, 100))
def test_no_other_interval_loses_less_than_young_daly(c: float, m: float, factor: float) -> None:
    best = young_daly(c, m)
    assert c / best + best / (2 * m) <= c / (factor * best) + factor * best / (2 * m) + 1e-12


@given(stalls, times, restarts, st.floats(0.01, 100))
def test_no_other_interval_has_a_higher_availability(
    c: float, m: float, r: float, factor: float
) -> None:
    """Useful work of T - C in each interval; a failure every M costs R and half an interval."""

    def availability(interval: float) -> float:
        return (interval - c) / interval * m / (m + r + interval / 2)

    best = availability_optimal(c, m, r)
    other = c + (best - c) * factor
    assert availability(best) >= availability(other) - 1e-9


@given(stalls, times, restarts)
def test_the_optimum_grows_with_the_stall_and_with_the_time_between_failures(
    c: float, m: float, r: float
) -> None:
    best = availability_optimal(c, m, r)
    assert best > young_daly(c, m) > 0
    assert availability_optimal(2 * c, m, r) > best
    assert availability_optimal(c, 2 * m, r) > best
    assert 0 < overhead(best, c, m, r) <= 1


def test_the_numbers_of_a_large_job() -> None:
    """A failure every 3 h; the figures are those of the papers' formulas by hand."""
    hours3 = 3 * 3600.0
    assert young_daly(30, hours3) == pytest.approx(805, abs=1)
    assert young_daly(1, hours3) == pytest.approx(147, abs=1)
    assert young_daly(0.1, hours3) == pytest.approx(46.5, abs=0.1)
    assert overhead(805, 30, hours3, 0) == pytest.approx(0.0745, abs=0.0001)


@given(st.floats(1, 1e7), st.floats(0, 1e5))
def test_the_larger_the_failure_the_larger_the_loss(interval: float, commit: float) -> None:
    process, memory, mirrored, store = losses(interval, commit)
    assert process["seconds"] <= memory["seconds"] <= mirrored["seconds"]
    assert store["seconds"] is None


@given(st.floats(1, 1e6))
def test_what_is_advised_can_be_given_to_a_checkpointer(seconds: float) -> None:
    every = parse_every(every_of(seconds)).seconds
    assert seconds <= every <= 1.11 * seconds + 1


def test_what_nobody_knows_is_assumed_and_said() -> None:
    facts = facts_of(History(()), None, Given(state_bytes=4 * GIB, world=1000))
    assert facts is not None
    assert facts.mtbf_seconds == RANK_MTBF_HOURS * 3.6
    assert facts.stall_seconds == 1.0
    assert not facts.measured
    assert len(facts.assumed) == 4
    assert "no failure was seen" in " ".join(facts.assumed)
    assert facts_of(History(()), None, Given()) is None


def test_what_the_operator_and_the_daemon_say_comes_before_assumptions() -> None:
    facts = facts_of(
        History(()),
        None,
        Given(state_bytes=GIB, mtbf_seconds=7200.0, restart_seconds=60.0),
        Measured(0.5, 12.0),
    )
    assert facts is not None
    assert (facts.stall_seconds, facts.commit_seconds) == (0.5, 12.0)
    assert (facts.mtbf_seconds, facts.restart_seconds) == (7200.0, 60.0)
    assert not facts.assumed


def test_observed_failures_count_from_three_on() -> None:
    lost = Restart(2, 0.0, StepId(1, 1), StepId(1, 2), 1, 1.0, 1.0, exact=True)
    given = Given(state_bytes=GIB)
    few = facts_of(History(()), Goodput(7200.0, 0, 0, 0, (lost, lost)), given)
    many = facts_of(History(()), Goodput(7200.0, 0, 0, 0, (lost, lost, lost)), given)
    assert few is not None
    assert many is not None
    assert "only 2 failures" in " ".join(few.assumed)
    assert many.mtbf_seconds == 2400.0


def test_a_slow_store_limits_the_interval() -> None:
    facts = facts_of(
        History(()), None, Given(state_bytes=GIB, mtbf_seconds=3600.0), Measured(0.1, 400.0)
    )
    assert facts is not None
    document = advice(facts)
    assert (document["limited_by"], document["interval_seconds"]) == ("store", 400.0)


def test_the_command_reads_the_history(runtime: Path, store_url: str) -> None:
    trained(runtime, store_url, 4, saved=(1, 2))
    trained(runtime, store_url, 2, saved=())
    document = call("advise", store_url, "--json").document
    told = " ".join(document["measured"])
    assert "stall C: 0.001 s, mean of 2 commits" in told
    assert "time to the store U" in told
    assert "time between failures M" in " ".join(document["assumed"])
    lines = call("advise", store_url, "--mtbf-hours=3").out.splitlines()
    assert lines[0].startswith('every="')
    assert "as you say" in "\n".join(lines)


def test_the_daemon_of_this_host_is_asked_past_any_proxy(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # as in a process that is new
    with Daemon(runtime):
        assert _measured(store_url) == Measured(None, None), "the daemon knows no job yet"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mtbf-hours=0"], "0 is not allowed"),
        (["--state-gib=-1"], "-1 is not allowed"),
        (["--slots=7"], "--slots"),
        ([], "--state-gib"),
    ],
)
def test_2_wrong_arguments(tmp_path: Path, arguments: list[str], words: str) -> None:
    found = call("advise", tmp_path / "nothing", *arguments)
    assert found.status == 2
    assert words in found.err
