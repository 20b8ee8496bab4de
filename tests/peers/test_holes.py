"""What hurts jobs under other checkpoint systems, acted out here: nothing is mixed, lost or stuck.

What the others do was measured with the versions that docs/peers.md names.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from called import call
from ckptmgr.staging.inbox import SOCKET
from ckptmgr.types import Outcome, StepState
from driven import Daemon, files_below, until
from peers.job import commit, entries, kill, latest, lose_memory, resumed, started
from rigged import Rig

DONE = {StepState.COMMITTED, StepState.VERIFIED}


@contextmanager
def daemons(*places: Path, **environment: str) -> Iterator[list[Daemon]]:
    """A daemon on each host."""
    with ExitStack() as stack:
        given = {**os.environ, **environment}
        yield [stack.enter_context(Daemon(place, environment=given)) for place in places]


def reboot(hosts: list[Daemon]) -> None:
    """Every host loses its daemon and its memory."""
    for daemon in hosts:
        daemon.end(signal.SIGKILL)
    lose_memory(*[daemon.runtime for daemon in hosts])


def check_whole(rig: Rig, *steps: str) -> None:
    """These steps, and no others, are committed, and every byte of them holds."""
    assert {name for name, one in entries(rig).items() if one.state in DONE} == set(steps)
    found = call("verify", rig.file_url, "--all")
    assert found.status == 0, found


# ---- DLRover ----------------------------------------------------------------


def test_a_rank_killed_amid_a_copy_leaves_the_step_before_whole(
    rig: Rig, hosts: list[Path]
) -> None:
    """DLRover's one buffer is overwritten in place: of rank 1 killed amid step 20, a mix of 10 and
    20 is restored and committed as step 10, and rank 0's part of it is all step 20.
    """
    place = hosts[:2]
    rig.obey(("put_new", "data/", "hold"))
    with daemons(*place, CKPTMGR_STUCK_SECONDS="5"):
        with started(rig.url, *place) as job:
            for member in job:
                member.ask("save", 10)
            until(lambda: rig.asked("put_new", "data/") == 2, "step 10 is in memory only")
            job[0].ask("save", 20)
            job[1].ask("copy", 20)
            kill(job[1:])
            kill(job)
        rig.obey()
        with started(rig.url, *place) as job:
            assert resumed(job) == ("1.10", {"memory"}, [0, 1])
            until(lambda: entries(rig)["1.10"].state in DONE, "the daemons bring it to the store")
            until(lambda: entries(rig)["1.20"].state is StepState.ABORTED, "20 is given up")
            assert "rank 1 of 2" in getattr(entries(rig)["1.20"].decision, "why", "")
            commit(job, 11)
    check_whole(rig, "1.10", "2.11")


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_all_ranks_killed_amid_a_copy_never_start_from_scratch(
    rig: Rig, hosts: list[Path], memory: str
) -> None:
    """DLRover's tracker then names step 10, which has no files: both ranks get {} and train from
    scratch, with step 5 whole on disk.
    """
    place = hosts[:2]
    with daemons(*place) as there:
        with started(rig.url, *place) as job:
            commit(job, 5)
            rig.obey(("put_new", "data/", "hold"))
            for member in job:
                member.ask("save", 10)
            until(lambda: rig.asked("put_new", "data/00000001/000000000010") == 2, "in memory")
            for member in job:
                member.ask("copy", 20)
        if memory == "lost":
            reboot(there)
        rig.obey()
        with daemons(*(place if memory == "lost" else [])), started(rig.url, *place) as job:
            expected = ("1.10", {"memory"}) if memory == "kept" else ("1.5", {"store"})
            assert resumed(job) == (*expected, [0, 1])
            if memory == "kept":
                until(lambda: entries(rig)["1.10"].state in DONE, "it is brought to the store")
            commit(job, 11)
    check_whole(rig, "1.5", "2.11", *(["1.10"] if memory == "kept" else []))


def test_a_rank_killed_before_its_manifest_costs_nothing_though_the_next_world_is_smaller(
    rig: Rig, hosts: list[Path]
) -> None:
    """DLRover refuses what is in memory when one rank was killed and goes back to the step on disk;
    memory of another world is of no use to it.
    """
    place = hosts[:3]
    late = "man/00000001/000000000020/000001"
    with daemons(*place) as there:
        with started(rig.url, *place) as job:
            commit(job, 5)
            rig.obey(("put_new", late, "hold"))
            for member in job:
                member.ask("save", 20)
            until(lambda: rig.asked("put_new", "man/00000001/000000000020/") == 3, "all are at it")
            kill(job[1:2])
            there[1].end(signal.SIGKILL)
            assert latest(rig) == "1.5"
            kill(job)
        rig.obey()
        with daemons(place[1]), started(rig.url, *place[:2]) as job:
            assert resumed(job)[0] == "1.20"
            commit(job, 21)
            # Whether the daemons were faster than the new attempt, or gave it up for that.
            decided = DONE | {StepState.ABORTED}
            until(lambda: entries(rig)["1.20"].state in decided, "the step itself is decided")
            own = ["1.20"] if entries(rig)["1.20"].state in DONE else []
    check_whole(rig, "1.5", *own, "2.21")


def test_a_part_that_never_comes_blocks_no_later_step(rig: Rig, hosts: list[Path]) -> None:
    """DLRover's FSDP shards share one done-file: the saver waits 600 s for a second one, and the
    tracker has named the step all the while.
    """
    place = [hosts[0], hosts[0]]
    with daemons(hosts[0]), started(rig.url, *place) as job:
        commit(job, 10)
        job[0].ask("save", 20)
        until(lambda: rig.asked("list", "man/00000001/000000000020/"), "rank 0's part is there")
        assert latest(rig) == "1.10"
        commit(job, 30)
        assert entries(rig)["1.20"].missing == (1,)
    check_whole(rig, "1.10", "1.30")


def test_a_trainer_killed_amid_a_message_holds_up_nobody(rig: Rig, hosts: list[Path]) -> None:
    """DLRover's agent reads on for ever at full speed, and the next trainer's metadata never gets
    through: no checkpoint until the agent is restarted.
    """
    with daemons(hosts[0]) as (daemon,):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as torn:
                torn.connect(str(hosts[0] / SOCKET))
                torn.sendall(struct.pack("<I", 1 << 20) + bytes(1 << 19))
        with socket.socket(socket.AF_UNIX) as stopped, started(rig.url, hosts[0]) as job:
            stopped.connect(str(hosts[0] / SOCKET))
            stopped.sendall(struct.pack("<I", 1 << 20) + bytes(1 << 19))
            commit(job, 1)
            daemon.await_event("committed")
            assert until(lambda: daemon.status()["jobs"], "it answers")
    check_whole(rig, "1.1")


# ---- NVRx -------------------------------------------------------------------


def test_what_a_killed_save_left_does_not_stop_the_next_save_of_the_same_step(
    rig: Rig, hosts: list[Path]
) -> None:
    """NVRx's `.dirty` file of a killed save makes the next save of that iteration raise
    SameMachineReplicationException: the job dies again at each restart.
    """
    place = hosts[:2]
    with daemons(*place) as there:
        with started(rig.url, *place) as job:
            commit(job, 100)
            rig.obey(("put_new", "man/00000001/000000000200/", "hold"))
            for member in job:
                member.ask("save", 200)
            until(lambda: rig.asked("put_new", "man/00000001/000000000200/") == 2, "half stored")
        reboot(there)
    assert len(list((rig.path / "data/00000001/000000000200").rglob("*.pack"))) == 2
    unfinished = next(rig.path.glob("data/00000001/000000000200/000000/*.pack"))
    shutil.copy(unfinished, unfinished.with_name(".tmp-left-by-a-kill"))
    rig.obey()
    with daemons(*place), started(rig.url, *place) as job:
        assert resumed(job) == ("1.100", {"store"}, [0, 1])
        for step in (200, 300):
            commit(job, step)
        gone = rig.path / "data/00000001/000000000200"
        until(
            lambda: not [p for p in files_below(gone) if p.suffix == ".pack"],
            "the leftovers are collected",
        )
    check_whole(rig, "1.100", "2.200", "2.300")


# ---- DeepSpeed --------------------------------------------------------------


def test_nothing_is_latest_before_every_rank_has_written_it(rig: Rig, hosts: list[Path]) -> None:
    """DeepSpeed's rank 0 writes `latest` before the others have written their shards: the job that
    is killed then can not resume, though the step before is whole.
    """
    place = hosts[:2]
    with daemons(*place) as there:
        with started(rig.url, *place) as job:
            commit(job, 1)
            rig.obey(("put_new", "data/00000001/000000000002/000001", "hold"))
            for member in job:
                member.ask("save", 2)
            until(lambda: rig.asked("list", "man/00000001/000000000002/"), "rank 0 has done all")
            assert latest(rig) == "1.1"
            newest, before = call("ls", rig.file_url, "--json").document
            assert (newest["id"], newest["state"]) == ("1.2", "undecided")
            assert before["state"] in ("committed", "verified")
            assert entries(rig)["1.2"].missing == (1,)
        reboot(there)
    rig.obey()
    with daemons(*place), started(rig.url, *place) as job:
        assert resumed(job) == ("1.1", {"store"}, [0, 1])
        commit(job, 2)
    check_whole(rig, "1.1", "2.2")


# ---- DCP --------------------------------------------------------------------


def test_a_step_that_is_saved_again_is_never_a_mix_of_both(rig: Rig, hosts: list[Path]) -> None:
    """DCP overwrites in place: killed when one of two ranks has written, load succeeds with rank
    0's shard of the new save and rank 1's of the old; with one rank the old one is gone.
    """
    place = hosts[:2]
    with daemons(*place) as there:
        with started(rig.url, *place) as job:
            commit(job, 50)
            commit(job, 100)
        with started(rig.url, *place) as job:
            assert resumed(job, 50)[0] == "1.50"
            rig.obey(("put_new", "data/00000002/000000000100/000001", "hold"))
            for member in job:
                member.ask("save", 100)
            until(lambda: rig.asked("list", "man/00000002/000000000100/"), "rank 0 has done all")
        reboot(there)
    rig.obey()
    with daemons(*place), started(rig.url, *place) as job:
        assert resumed(job) == ("1.100", {"store"}, [0, 1])
        commit(job, 100)
        assert resumed(job, 100) == ("3.100", {"memory"}, [0, 1])
    check_whole(rig, "1.50", "1.100", "3.100")


# ---- torch_checkpointing ----------------------------------------------------


def test_what_more_ranks_left_of_a_step_is_in_no_later_commit(rig: Rig, hosts: list[Path]) -> None:
    """torch_checkpointing reuses `tmp_step-9`: the `model_7.pt` of a killed save of 8 ranks is
    committed within `step-9` of the next job, which has one.
    """
    four = [hosts[0]] * 4
    with daemons(hosts[0]) as there:
        with started(rig.url, *four) as job:
            rig.obey(("put_new", "man/00000001/000000000009/000000", "hold"))
            for member in job:
                member.ask("save", 9)
            until(lambda: rig.asked("put_new", "man/00000001/") == 4, "one manifest is missing")
            until(lambda: len(entries(rig)["1.9"].ranks) == 3, "three are there")
        reboot(there)
    rig.obey()
    with daemons(hosts[0]), started(rig.url, hosts[0]) as job:
        assert resumed(job)[0] == "0.0"
        commit(job, 9)
        decision = entries(rig)["2.9"].decision
        assert decision is not None
        assert (decision.world, len(decision.manifests)) == (1, 1)
        assert decision.nonce == job[0].claimed[1]
    with daemons(hosts[1]), started(rig.url, hosts[1]) as job:
        assert resumed(job) == ("2.9", {"store"}, [0])
    check_whole(rig, "2.9")


# ---- counts and restart counts ----------------------------------------------


def test_a_part_of_a_killed_attempt_counts_for_no_other(rig: Rig, hosts: list[Path]) -> None:
    """DLRover commits when as many done-files are there as ranks; one that a killed attempt left
    is one of them.
    """
    place = hosts[:2]
    with daemons(*place):
        with started(rig.url, *place) as job:
            commit(job, 10)
        stale = rig.path / "man/00000001/000000000010/000001"
        with started(rig.url, *place) as job:
            assert resumed(job)[0] == "1.10"
            planted = rig.path / "man/00000002/000000000020/000001"
            planted.parent.mkdir(parents=True)
            shutil.copy(stale, planted)
            job[0].ask("save", 20)
            assert job[0].ask("wait", 20)["outcome"] == Outcome.ABORTED
            assert latest(rig) == "1.10"
            commit(job, 30)
    check_whole(rig, "1.10", "2.30")


def test_attempts_with_equal_restart_counts_are_never_mixed(
    rig: Rig, hosts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchelastic does not count a restart after a change of members: whoever takes run id and
    TORCHELASTIC_RESTART_COUNT for the incarnation puts two of them into one checkpoint.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    old, new = hosts[:2], hosts[2:]
    with daemons(*hosts):
        with started(rig.url, *old) as before, started(rig.url, *new) as after:
            before[0].ask("save", 30)
            until((rig.path / "man/00000001/000000000030/000000").exists, "rank 0 of the old one")
            after[1].ask("save", 30)
            until((rig.path / "man/00000002/000000000030/000001").exists, "rank 1 of the new one")
            assert latest(rig) == "None"
            after[0].ask("save", 30)
            told = [member.ask("wait", 30) for member in after]
            assert [one["outcome"] for one in told] == [Outcome.COMMITTED] * 2
            assert before[0].ask("wait", 30)["outcome"] == Outcome.ABORTED
            decision = entries(rig)["2.30"].decision
            assert decision is not None
            assert decision.nonce == after[0].claimed[1]
        with started(rig.url, *old) as job:
            assert resumed(job) == ("2.30", {"store"}, [0, 1])
    check_whole(rig, "2.30")
