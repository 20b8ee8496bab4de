"""After the trainer's SIGKILL the daemon commits alone, and host memory is enough to resume."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ckptmgr.daemon.resume import claim_attempt, put_active
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome
from crash.peek import slots_below
from driven import Daemon, Rank, Trainer, until
from rigged import Rig

pytestmark = pytest.mark.reliability

READS = [("get", "data/"), ("get", "man/"), ("get", "commit/")]


def committed(rig: Rig, step: int, attempt: int = 1) -> bool:
    return (rig.path / f"commit/{attempt:08d}/{step:012d}").exists()


def test_daemon_commits_the_last_snapshot_of_a_killed_trainer(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", "data/00000001/000000000002/", "hold"))
    environment = rig.environment()
    with Daemon(runtime, environment=environment) as daemon:
        with Trainer(runtime, rig.url, steps=2, environment=environment) as trainer:
            trainer.await_event("finished")
            until(lambda: rig.asked("put_new", "data/00000001/000000000002/"), "the write began")
            trainer.kill()
        daemon.await_event("trainer_died")
        until(lambda: committed(rig, 1), "beside the write that is held up")
        assert not committed(rig, 2)
        rig.obey()
        until(lambda: committed(rig, 2), "the daemon commits without a trainer")
        until(lambda: not any(s.undecided for s in slots_below(runtime)), "it is settled")


def test_a_dead_trainers_snapshot_is_finished_though_another_has_its_buffer(
    runtime: Path, rig: Rig
) -> None:
    """Attempt 2 became active on another host and died, perhaps after it had resumed from there:
    attempt 3 would lose that step. Only a trainer that still runs is stopped by a newer one.
    """
    active = "attempts/00000001/active"
    rig.obey(("put_new", active, "hold"))

    async def second_is_active() -> None:
        store = open_store(rig.file_url)
        attempt, nonce = await claim_attempt(store, 1, "")
        assert await put_active(store, attempt, nonce) == attempt == 2
        await store.aclose()

    with Daemon(runtime, environment=rig.environment()) as daemon:
        with Rank(runtime, rig.url) as first:
            first.save(1)
            until(lambda: rig.asked("put_new", active), "the write began")
        asyncio.run(second_is_active())
        with Rank(runtime, rig.url) as third:
            assert third.attempt == 3
            rig.obey()
            until(lambda: not any(s.undecided for s in slots_below(runtime)), "it is settled")
            assert committed(rig, 1)
            assert third.restore().step == 1
        assert not daemon.events("given_up")


def test_restart_resumes_from_host_memory_though_the_store_refuses_reads(
    runtime: Path, rig: Rig
) -> None:
    environment = rig.environment()
    with Daemon(runtime, environment=environment) as daemon:
        with Trainer(runtime, rig.url, steps=2, environment=environment) as trainer:
            trainer.await_event("finished")
        daemon.await_event("committed", 2)
        rig.obey(*((op, prefix, "refuse") for op, prefix in READS))
        with Trainer(runtime, rig.url, steps=0, environment=environment) as trainer:
            restored = trainer.await_event("restored")
    assert (restored["id"], restored["source"]) == ([1, 2], "memory")
    assert restored["fault"] == ""


def test_restart_of_everything_reads_no_step_from_the_store(runtime: Path, rig: Rig) -> None:
    """A daemon that has nothing else to do, so that every read would be the restore's."""
    environment = rig.environment()
    with Daemon(runtime, environment=environment) as daemon:
        with Trainer(runtime, rig.url, steps=2, environment=environment) as trainer:
            trainer.await_event("finished")
        daemon.await_event("committed", 2)
    rig.obey(*((op, prefix, "refuse") for op, prefix in READS))
    before = {read: rig.asked(*read) for read in READS}
    with (
        Daemon(runtime, environment=environment),
        Trainer(runtime, rig.url, steps=0, environment=environment) as trainer,
    ):
        restored = trainer.await_event("restored")
    assert (restored["id"], restored["source"]) == ([1, 2], "memory")
    assert restored["fault"] == ""
    assert {read: rig.asked(*read) for read in READS} == before


def test_the_refusing_store_would_have_shown_a_read(runtime: Path, rig: Rig) -> None:
    """The proof above can fail: with host memory lost, the same restart meets the refusal."""
    environment = rig.environment()
    with Daemon(runtime, environment=environment) as daemon:
        with Trainer(runtime, rig.url, steps=2, environment=environment) as trainer:
            trainer.await_event("finished")
        daemon.await_event("committed", 2)
    for path in (runtime / "buffers").iterdir():
        path.unlink()
    rig.obey(*((op, prefix, "refuse") for op, prefix in READS))
    before = rig.asked("get", "commit/")
    with (
        Daemon(runtime, environment=environment) as daemon,
        Trainer(runtime, rig.url, steps=0, environment=environment) as trainer,
    ):
        with pytest.raises(AssertionError, match="StorePermissionError"):
            trainer.await_event("restored")
        assert rig.asked("get", "commit/") > before


def test_a_buffer_whose_file_was_deleted_is_not_given_to_the_next_trainer(
    runtime: Path, rig: Rig
) -> None:
    """By a cleaner of tmpfs, or logind's RemoveIPC; what it holds is still committed."""
    with Daemon(runtime, environment=rig.environment()) as daemon:
        rig.obey(("put_new", "data/", "hold"))
        with Rank(runtime, rig.url) as rank:
            rank.save(1)
            until(lambda: rig.asked("put_new", "data/"), "it is being written")
        for path in (runtime / "buffers").iterdir():
            path.unlink()
        with Rank(runtime, rig.url) as rank:
            daemon.await_event("buffer_vanished")
            rig.obey()
            until(lambda: committed(rig, 1), "the snapshot of the deleted buffer")
            rank.save(2)
            assert rank.wait(2).outcome == Outcome.COMMITTED
        daemon.await_event("freed")
