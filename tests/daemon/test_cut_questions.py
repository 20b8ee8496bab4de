"""A question that an exception cuts short: its answer is never taken for that of the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asking import Came
from ckptmgr.daemon.session import Session
from ckptmgr.staging.control import Done, Fetch, Fetched, Release, Restore, Restored
from ckptmgr.staging.launch import connect
from ckptmgr.types import Outcome
from driven import PATIENCE_SECONDS, Daemon, Rank, check_slot
from interrupting import Interrupted, interrupt, signalled
from rigged import Rig


@pytest.fixture
def daemon(runtime: Path, rig: Rig) -> Iterator[Daemon]:
    with Daemon(runtime) as found:
        yield found


def test_the_next_question_does_not_get_the_answer(runtime: Path, rig: Rig, daemon: Daemon) -> None:
    rig.obey(("put_new", "data/00000001/000000000002/", "hold"))
    with Rank(runtime, rig.url) as rank:
        rank.link.ask(Release(), Done)
        with daemon.stopped():
            rank.save(1)
            with signalled(interrupt), pytest.raises(Interrupted):
                rank.wait(1)
        daemon.await_event("committed")
        rank.save(2)
        with daemon.stopped(), signalled(interrupt), pytest.raises(Interrupted):
            rank.wait(1)
        assert rank.wait(2, 0.0).outcome == Outcome.UNDECIDED
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert not rank.link.lost, "it is the same buffer"


def test_a_fetch_that_was_cut_short_writes_into_no_slot_any_more(
    runtime: Path, rig: Rig, daemon: Daemon
) -> None:
    with Rank(runtime, rig.url) as rank:
        for step in (1, 2, 3):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
    rig.obey(("get", "data/", "hold"))
    with Rank(runtime, rig.url) as rank:
        rank.link.ask(Release(), Done)
        reply = rank.link.ask(Restore(step=1), Restored, PATIENCE_SECONDS)
        assert (reply.attempt, reply.step) == (1, 1)
        wanted = Fetch(((0, ((0, rank.nbytes),)),))
        with signalled(interrupt), pytest.raises(Interrupted):
            rank.link.ask(wanted, Fetched, PATIENCE_SECONDS)
        assert rig.asked("get", "data/00000001/000000000001")
        rank.link.ask(Release(), Done)
        sealed = [rank.save(10, slot=0), rank.save(11, slot=1)]
        rig.obey()
        for at in sealed:
            assert rank.wait(at.step).outcome == Outcome.COMMITTED
            came = Came(2, at.step, slot=at.slot, generation=at.generation)
            check_slot(rank.buffer, came)
        assert not daemon.events("restored")


def test_a_trainer_that_leaves_cleanly_after_a_cut_frees_its_memory(
    runtime: Path, rig: Rig, daemon: Daemon
) -> None:
    rank = Rank(runtime, rig.url)
    rank.save(1)
    assert rank.wait(1).outcome == Outcome.COMMITTED
    with daemon.stopped(), signalled(interrupt), pytest.raises(Interrupted):
        rank.wait(1)
    rank.close(clean=True)
    daemon.await_event("freed")


def test_whoever_releases_a_session_second_waits_for_its_end_as_well() -> None:
    """A trainer attaches again while its cut connection is being ended: neither may be told that
    nothing is written any more before it is so.
    """
    job: Any = None

    async def work(begun: asyncio.Event, end: asyncio.Event) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await end.wait()  # as `in_thread` waits for its thread

    async def released() -> None:
        begun, end = asyncio.Event(), asyncio.Event()
        session = Session(job, 0)
        session.work = asyncio.ensure_future(work(begun, end))
        await begun.wait()
        releases = [asyncio.ensure_future(session.release()) for _ in range(2)]
        _, waiting = await asyncio.wait(releases, timeout=0.05)
        assert len(waiting) == 2
        end.set()
        await asyncio.gather(*releases)

    asyncio.run(released())


def test_a_larger_buffer_that_nobody_waited_for_costs_no_smaller_one(
    runtime: Path, rig: Rig, daemon: Daemon
) -> None:
    """The trainer has attached its own again before the daemon comes to the older question."""
    with Rank(runtime, rig.url) as rank, connect(runtime) as again:
        rank.link._attach(again)
        rank.link._attach(rank.link._client, same_buffer=False)
        (job,) = daemon.status()["jobs"]
        alive = {one["id"]: one["trainer_alive"] for one in job["buffers"]}
        assert alive[rank.buffer.id]
