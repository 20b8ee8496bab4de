"""Several ranks of one job: committed together or not at all, and resumed from one step."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from asking import Came
from ckptmgr.errors import DamageError, UsageError
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Decision
from ckptmgr.staging.control import Describe, Described, Fetch, Fetched, Restore, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.tables import read_tables
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId
from driven import PATIENCE_SECONDS, Daemon, Rank, half_stored, ranks, until
from rigged import Rig

ONE = "00000001/000000000001"


def restored(job: list[Rank], request: Restore | None = None) -> list[Came]:
    """What each rank gets, rank 0 first: the others obey its decision."""
    return [rank.restore(request) for rank in job]


def committed(rig: Rig, attempt: int, step: int) -> Decision:
    async def read() -> Decision:
        store = open_store(rig.file_url)
        decision = await Catalog(store).decision(StepId(attempt, step))
        await store.aclose()
        return decision

    return asyncio.run(read())


def test_a_step_is_committed_when_every_rank_has_stored_it(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    with Daemon(hosts[0]) as one, Daemon(hosts[1]) as other, ranks(rig.url, *hosts) as job:
        job[0].save(1)
        assert job[0].wait(1, seconds=0.5).outcome == Outcome.UNDECIDED
        job[1].save(1)
        assert job[0].wait(1).outcome == job[1].wait(1).outcome == Outcome.COMMITTED
        assert [len(daemon.events("committed")) for daemon in (one, other)] == [1, 1]
    assert committed(rig, 1, 1).world == len(committed(rig, 1, 1).manifests) == 2


@pytest.mark.parametrize("step", [4, 5])
def test_the_daemon_whose_turn_it_is_commits(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path], step: int
) -> None:
    with Daemon(hosts[0]), Daemon(hosts[1]), ranks(rig.url, *hosts) as job:
        for rank in job:
            rank.save(step)
        for rank in job:
            assert rank.wait(step).outcome == Outcome.COMMITTED
    puts = rig.asked("put_new", f"commit/00000001/{step:012d}")
    assert puts == 1, "one daemon puts the register, the other finds it"


def test_a_daemon_that_is_stopped_does_not_keep_the_others_from_committing(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    """It has put its manifest, and it was its turn."""
    with half_stored(rig, rig.url, hosts, 2) as (first, job):
        with first.stopped():
            rig.obey()
            job[1].save(2)
            assert job[1].wait(2).outcome == Outcome.COMMITTED
        assert job[0].wait(2).outcome == Outcome.COMMITTED


def test_a_step_that_a_rank_never_stores_is_given_up_by_name(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    environment = rig.environment(CKPTMGR_STUCK_SECONDS="1")
    with (
        Daemon(hosts[0], environment=environment),
        Daemon(hosts[1], environment=environment),
        ranks(rig.url, *hosts) as job,
    ):
        job[0].save(1)
        waited = job[0].wait(1)
        assert waited.outcome == Outcome.ABORTED
        assert "rank 1 of 2" in waited.why
        for rank in job:
            rank.save(2)
        for rank in job:
            assert rank.wait(2).outcome == Outcome.COMMITTED
        job[1].save(3)  # the other way round
        assert "rank 0 of 2" in job[1].wait(3).why


def test_killed_daemons_finish_what_all_ranks_have_sealed(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    rig.obey(("put_new", "man/", "hold"))
    with Daemon(hosts[0]) as one, Daemon(hosts[1]) as other, ranks(rig.url, *hosts) as job:
        for rank in job:
            rank.save(1)
        until(lambda: rig.asked("put_new", "man/") == 2, "both are at it")
        for daemon in (one, other):
            daemon.process.kill()
            daemon.process.wait()
        rig.obey()
        for rank in job:  # each starts a daemon again, which adopts the buffer
            assert rank.wait(1).outcome == Outcome.COMMITTED


def test_a_rank_hears_of_a_newer_attempt_by_the_end_of_a_step_that_it_has_stored(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    """It may never snapshot again: rank 0, which plans that, has heard of it and is gone."""
    third = runtime / "h2"
    third.mkdir(mode=0o700)
    with Daemon(hosts[0]), Daemon(hosts[1]), Daemon(third), ranks(rig.url, *hosts) as job:
        job[1].save(3)
        until((rig.path / "man/00000001/000000000003/000001").exists, "it has stored its part")
        with Rank(third, rig.url) as newer:
            newer.save(5)
            assert newer.wait(5).outcome == Outcome.COMMITTED
            job[0].save(3)
            assert [rank.wait(3).outcome for rank in job] == [Outcome.ABORTED] * 2
            assert [rank.buffer.superseded_by for rank in job] == [2, 2]


# ---- resume -----------------------------------------------------------------


def test_all_ranks_resume_from_memory_though_nothing_is_committed(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    rig.obey(("put_new", "data/00000001/", "hold"))
    with Daemon(hosts[0]), Daemon(hosts[1]):
        with ranks(rig.url, *hosts) as job:
            for rank in job:
                rank.save(1)
        with ranks(rig.url, *hosts) as job:
            came = restored(job)
        assert [(c.attempt, c.step, c.source) for c in came] == [(1, 1, "memory")] * 2
        rig.obey()
        until((rig.path / f"commit/{ONE}").exists, "it is committed all the same")


def test_a_step_that_one_host_lost_is_not_resumed_from(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    """Step 2 is sealed everywhere and committed nowhere; then a host loses its memory."""
    with Daemon(hosts[0]) as one, Daemon(hosts[1]) as other:
        with ranks(rig.url, *hosts) as job:
            for rank in job:
                rank.save(1)
            for rank in job:
                assert rank.wait(1).outcome == Outcome.COMMITTED
            rig.obey(("put_new", "data/00000001/000000000002", "hold"))
            for rank in job:
                rank.save(2)
            until(lambda: rig.asked("put_new", "data/00000001/000000000002") == 2, "at it")
        for daemon in (one, other):  # when nobody is left who would start them again
            daemon.end(signal.SIGKILL)
    for path in (hosts[1] / "buffers").iterdir():
        path.unlink()
    with Daemon(hosts[0]), Daemon(hosts[1]), ranks(rig.url, *hosts) as job:
        came = restored(job)
    assert [(c.attempt, c.step) for c in came] == [(1, 1)] * 2
    assert [c.source for c in came] == ["memory", "store"]


def test_ranks_that_change_hosts_get_their_own_parts(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    """Each part is in the memory of the other host, which brings it to the store."""
    rig.obey(("put_new", "man/00000001/", "hold"))
    with Daemon(hosts[0]), Daemon(hosts[1]):
        with ranks(rig.url, *hosts) as job:
            for rank in job:
                rank.save(1)
            until(lambda: rig.asked("put_new", "man/00000001/") == 2, "nothing is committed yet")
        rig.obey()
        with ranks(rig.url, *reversed(hosts)) as job:
            came = restored(job)
    assert [(c.attempt, c.step, c.source) for c in came] == [(1, 1, "store")] * 2


def test_only_rank_0_claims(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime), pytest.raises(UsageError, match="only rank 0"):
        Rank(runtime, rig.url, rank=1, world=2)


def test_everybody_obeys_the_decision_of_rank_0(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    with Daemon(hosts[0]), Daemon(hosts[1]):
        with ranks(rig.url, *hosts) as job:
            for step in (1, 2):
                for rank in job:
                    rank.save(step)
                for rank in job:
                    assert rank.wait(step).outcome == Outcome.COMMITTED
        with ranks(rig.url, *hosts) as job:
            decide = Restore(step=1), Restore()
            replies = [
                rank.link.ask(request, Restored, PATIENCE_SECONDS)
                for rank, request in zip(job, decide, strict=True)
            ]
    assert [(r.attempt, r.step) for r in replies] == [(1, 1)] * 2


# ---- parts of other ranks ---------------------------------------------------


@pytest.fixture
def saved(runtime: Path, rig: Rig, hosts: tuple[Path, Path]) -> Rig:
    """Step 1 of four ranks on one host, committed; host memory is lost."""
    with Daemon(hosts[0]), ranks(rig.url, *[hosts[0]] * 4) as job:
        for rank in job:
            rank.save(1)
        for rank in job:
            assert rank.wait(1).outcome == Outcome.COMMITTED
    for path in (hosts[0] / "buffers").iterdir():
        path.unlink()
    return rig


def test_a_new_daemon_knows_the_memory_of_ranks_that_have_nothing_to_say(
    runtime: Path, rig: Rig
) -> None:
    """It was killed amid a restore: rank 0 has its part and waits for rank 1, which asks again."""
    with Daemon(runtime) as daemon:
        with ranks(rig.url, runtime, runtime) as job:
            for rank in job:
                rank.save(1)
            for rank in job:
                assert rank.wait(1).outcome == Outcome.COMMITTED
        with ranks(rig.url, runtime, runtime) as job:
            assert job[0].restore().source == "memory"

            def ask_again() -> None:
                daemon.end(signal.SIGKILL)
                reply = job[1].link.ask(Restore(), Restored, PATIENCE_SECONDS)
                assert (reply.attempt, reply.step) == (1, 1)
                whole = ((0, job[1].nbytes),)
                wanted = Fetch(((0, whole), (1, whole)))
                parts = job[1].link.ask(wanted, Fetched, PATIENCE_SECONDS).parts
                assert [part.source for part in parts] == ["memory"] * 2

            # Rank 0 attaches again only afterwards, as slowly as a busy machine makes it.
            job[0].link._turns.take(ask_again, 0.0)


def test_another_world_reads_the_parts_it_wants(saved: Rig, hosts: tuple[Path, Path]) -> None:
    """Two ranks of a new world read all four parts; each byte is fetched once for the host."""
    before = saved.asked("get", "data/")
    with Daemon(hosts[0]), ranks(saved.url, hosts[0], hosts[0]) as job:
        for rank in job:
            reply = rank.link.ask(Restore(), Restored, PATIENCE_SECONDS)
            assert (reply.world, reply.own) == (4, rank.rank)
            described = rank.link.ask(Describe(), Described, PATIENCE_SECONDS)
            tables = read_tables(Path(described.tables))
            assert [table.rank for table in tables.ranks] == [0, 1, 2, 3]
            wanted = tuple((number, ((0, 4096),)) for number in range(4))
            parts = rank.link.ask(Fetch(wanted), Fetched, PATIENCE_SECONDS).parts
            assert [(part.rank, part.source) for part in parts] == [(n, "store") for n in range(4)]
            for part in parts:
                with HostBuffer.open(Path(part.path)) as buffer:
                    snapshot = buffer.snapshot(part.slot)
                    assert snapshot is not None
                    assert (snapshot.rank, snapshot.generation) == (part.rank, part.generation)
        assert saved.asked("get", "data/") == before + 4


def test_a_range_outside_of_a_part_is_refused(saved: Rig, hosts: tuple[Path, Path]) -> None:
    with Daemon(hosts[0]), Rank(hosts[0], saved.url) as rank:
        rank.link.ask(Restore(), Restored, PATIENCE_SECONDS)
        with pytest.raises(UsageError, match="has no bytes"):
            rank.link.ask(Fetch(((0, ((0, 1 << 40),)),)), Fetched, PATIENCE_SECONDS)
        with pytest.raises(UsageError, match="ranks"):
            rank.link.ask(Fetch(((4, ((0, 1),)),)), Fetched, PATIENCE_SECONDS)


def test_a_damaged_part_of_another_rank_is_told(saved: Rig, hosts: tuple[Path, Path]) -> None:
    (path,) = (saved.path / f"data/{ONE}/000003").iterdir()
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with Daemon(hosts[0]) as daemon, Rank(hosts[0], saved.url) as rank:
        rank.link.ask(Restore(), Restored, PATIENCE_SECONDS)
        with pytest.raises(DamageError, match="000003"):
            rank.link.ask(Fetch(((3, ((0, 4096),)),)), Fetched, PATIENCE_SECONDS)
        assert daemon.await_event("restore_skipped")["step"] == "1.1"
        assert not list((hosts[0] / "fetched").glob("*.buf"))


def test_hosts_of_one_name_are_told_apart(
    runtime: Path, rig: Rig, hosts: tuple[Path, Path]
) -> None:
    with Daemon(hosts[0]), Daemon(hosts[1]), ranks(rig.url, *hosts):
        assert len(os.listdir(rig.path / "attempts/00000001/have")) == 2
