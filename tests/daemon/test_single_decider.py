"""A store that lets two writers win: the daemon of rank 0 decides alone, and nothing is lost."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from called import call
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.rules import LOTS, TURN_SECONDS
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId, StepState
from driven import Daemon, Rank, half_stored, ranks, until
from rigged import Rig


def states(rig: Rig) -> dict[StepId, StepState]:
    async def read() -> dict[StepId, StepState]:
        store = open_store(rig.file_url)
        entries = await Catalog(store).entries()
        await store.aclose()
        return {entry.id: entry.state for entry in entries}

    return asyncio.run(read())


def standing(rig: Rig) -> list[StepId]:
    return sorted(step for step, state in states(rig).items() if state is not StepState.RETIRED)


def test_the_race_is_run_once_told_and_kept(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon:
        with Rank(runtime, rig.sloppy_url) as rank:
            daemon.await_event("single_decider")
            assert daemon.status()["jobs"][0]["single_decider"]
            assert rank.attempt > LOTS
        raced = rig.asked("put_new", "proof/")
        with Rank(runtime, rig.sloppy_url) as rank:
            assert rank.attempt > 2 * LOTS
        assert rig.asked("put_new", "proof/") == raced > 0


def test_a_store_that_decides_is_not_suspected(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        assert rank.attempt == 1
        assert not daemon.status()["jobs"][0]["single_decider"]
    assert rig.asked("put_new", "proof/") == 0


def test_the_user_may_distrust_a_store(runtime: Path, rig: Rig) -> None:
    environment = rig.environment(CKPTMGR_SINGLE_DECIDER="1")
    with Daemon(runtime, environment=environment) as daemon, Rank(runtime, rig.url) as rank:
        assert rank.attempt > LOTS
        assert daemon.status()["jobs"][0]["single_decider"]
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED


def test_only_the_daemon_of_rank_0_commits(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    """It is stopped with its part stored; the other leaves the register alone, however late."""
    # By turns, step 1 would be rank 1's.
    with half_stored(rig, rig.sloppy_url, hosts, 1) as (first, job):
        with first.stopped():
            rig.obey()
            job[1].save(1)
            time.sleep(2 * TURN_SECONDS)
            assert rig.asked("put_new", "commit/") == 0
        assert [rank.wait(1).outcome for rank in job] == [Outcome.COMMITTED] * 2
    assert rig.asked("put_new", "commit/") == 1


def test_a_silent_decider_costs_the_others_their_step_but_not_their_slots(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    environment = rig.environment(CKPTMGR_STUCK_SECONDS="1")
    with (
        Daemon(hosts[0], environment=environment),
        Daemon(hosts[1], environment=environment),
        ranks(rig.sloppy_url, *hosts) as job,
    ):
        job[1].save(1)
        waited = job[1].wait(1)
        assert waited.outcome == Outcome.ABORTED
        assert "rank 0" in waited.why
        assert rig.asked("put_new", "commit/") == 0, "it is not for rank 1 to say"
        for rank in job:
            rank.save(2)
        assert [rank.wait(2).outcome for rank in job] == [Outcome.COMMITTED] * 2
        job[0].save(3)  # and where rank 1 is silent, rank 0 gives the step up for all
        assert "rank 1 of 2" in job[0].wait(3).why
    attempt = job[0].attempt
    assert states(rig)[StepId(attempt, 2)] is StepState.COMMITTED
    assert states(rig)[StepId(attempt, 3)] is not StepState.COMMITTED


def test_attempts_follow_each_other_and_retention_leaves_what_is_kept(
    runtime: Path, rig: Rig
) -> None:
    with Daemon(runtime):
        attempts: list[int] = []
        for first in (1, 11):
            with Rank(runtime, rig.sloppy_url, keep=2) as rank:
                assert rank.restore().step == (5 if attempts else 0)
                for step in range(first, first + 5):
                    rank.save(step)
                    assert rank.wait(step).outcome == Outcome.COMMITTED
                attempts.append(rank.attempt)
        # What the second attempt resumed from may stay as long as it runs.
        until(lambda: len(standing(rig)) <= 3, "old steps are given up")
    assert standing(rig)[-2:] == [StepId(attempts[1], 14), StepId(attempts[1], 15)]
    verified = call("verify", rig.sloppy_url, PYTHONPATH=rig.python_path)
    assert verified.status == 0, verified.err


def test_an_older_attempt_hears_of_a_newer_one_though_numbers_have_gaps(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    with Daemon(hosts[0]), Daemon(hosts[1]), Rank(hosts[0], rig.sloppy_url) as old:
        old.save(1)
        assert old.wait(1).outcome == Outcome.COMMITTED
        with Rank(hosts[1], rig.sloppy_url) as new:
            new.save(2)
            assert new.wait(2).outcome == Outcome.COMMITTED
            old.save(2)
            until(lambda: old.buffer.superseded_by == new.attempt, "the old one is told to end")


def test_what_an_older_attempt_left_undecided_is_retired_before_it_is_deleted(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    """Its COMMIT may still come: it must find the mark, and hurt nobody."""
    with Daemon(hosts[0]) as daemon, Rank(hosts[0], rig.sloppy_url, world=2) as old:
        old.save(7)  # rank 1 never comes
        until(lambda: rig.asked("put_new", "man/"), "its part is there")
        daemon.process.kill()
        daemon.process.wait()
    left = StepId(old.attempt, 7)
    with Daemon(hosts[1]), Rank(hosts[1], rig.sloppy_url) as new:
        for step in (1, 2, 3, 4):
            new.save(step)
            assert new.wait(step).outcome == Outcome.COMMITTED
        until(lambda: states(rig).get(left) is StepState.RETIRED, "the collection meets it")
    puts = [key for operation, key in rig.operations() if operation == "put_new"]
    of_left = [key for key in puts if f"{left.attempt:08d}/{left.step:012d}" in key]
    assert [key.partition("/")[0] for key in of_left[-2:]] == ["retired", "commit"]
