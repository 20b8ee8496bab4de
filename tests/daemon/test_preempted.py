"""What the daemon makes of a preemption that it is told of: counted as saved, or told as not."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from called import call
from ckptmgr.daemon.preempted import Verdict, verdict
from ckptmgr.daemon.service import PREEMPTED
from ckptmgr.repository.commit import abort_step
from ckptmgr.staging.control import Done, Preempt
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId
from driven import Daemon, Rank, until
from preemption.counted import counted
from rigged import Rig


@contextmanager
def preempted_amid_a_write(runtime: Path, rig: Rig) -> Iterator[Rank]:
    """A trainer has sealed step 3 and told of its preemption; it ends with the block."""
    rig.obey(("put_new", "data/", "hold"))
    with Rank(runtime, rig.url) as rank:
        rank.save(3)
        rank.link.ask(Preempt("test", "preempted", 1.0), Done)
        until(lambda: rig.asked("put_new", "data/"), "it is being written")
        yield rank


@contextmanager
def dead_amid_a_write(runtime: Path, rig: Rig) -> Iterator[Daemon]:
    """A daemon whose trainer has told of its preemption, sealed step 3, and is no more."""
    with Daemon(runtime, environment=rig.environment()) as daemon:
        with preempted_amid_a_write(runtime, rig):
            pass
        yield daemon


def test_a_dead_trainers_last_snapshot_counts_when_it_is_committed(
    runtime: Path, tmp_path: Path
) -> None:
    rig = Rig(tmp_path)
    with dead_amid_a_write(runtime, rig) as daemon:
        daemon.await_event("preempted")
        assert counted(runtime) == {"signals": 1, "saves": 0}
        rig.obey()
        until(lambda: counted(runtime) == {"signals": 1, "saves": 1}, "saved by the daemon")
        assert daemon.await_event("preemption_saved")["step"] == "1.3"


def test_a_daemon_that_is_killed_after_its_trainer_has_died_leaves_the_rest_to_the_next(
    runtime: Path, tmp_path: Path
) -> None:
    rig = Rig(tmp_path)
    with dead_amid_a_write(runtime, rig) as first:
        until(lambda: first.status()["trainers"] == 0, "its trainer is gone")
        first.end(signal.SIGKILL)
    (note,) = (runtime / PREEMPTED).iterdir()
    note.with_name("cut short").write_bytes(note.read_bytes()[:20])
    with Daemon(runtime, environment=rig.environment()) as second:
        assert counted(runtime) == {"signals": 0, "saves": 0}, "the first has counted the signal"
        rig.obey()
        assert second.await_event("preemption_saved")["step"] == "1.3"
        assert counted(runtime) == {"signals": 0, "saves": 1}
        until(lambda: not list((runtime / PREEMPTED).iterdir()), "it is over")
        assert second.end() == 0


def test_a_trainer_that_outlives_the_daemon_is_not_counted_twice(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", rig.python_path)
    with Daemon(runtime) as daemon:
        with preempted_amid_a_write(runtime, rig) as rank:
            rank.link.ask_later_daemons(Preempt("test", "preempted", 1.0, again=True))
            daemon.end(signal.SIGKILL)
            rig.obey()
            assert rank.wait(3).outcome == Outcome.COMMITTED  # by a daemon that the rank started
        until(lambda: counted(runtime) == {"signals": 0, "saves": 1}, "saved")
        assert call("drain", "--stop", runtime=runtime).status == 0
        assert len(daemon.events("preemption_saved")) == 1


def test_a_trainer_that_had_sealed_nothing_has_nothing_to_lose(
    runtime: Path, store_url: str
) -> None:
    """It hangs before its first snapshot: whether it began from scratch or from an older step."""
    with Daemon(runtime) as daemon:
        with Rank(runtime, store_url) as rank:
            rank.link.ask(Preempt("test", "preempted", 0.0), Done)
            assert counted(runtime) == {"signals": 1, "saves": 0}, "it may still seal something"
        assert daemon.await_event("preemption_saved")["step"] == ""
        with Rank(runtime, store_url) as rank:
            rank.save(1)
            rank.wait(1)
        with Rank(runtime, store_url) as rank:
            rank.restore()
            rank.link.ask(Preempt("test", "preempted", 0.0), Done)
        until(lambda: counted(runtime) == {"signals": 2, "saves": 2}, "nothing is lost")
        assert not daemon.events("preemption_unsaved")
        assert daemon.end() == 0


def test_a_dead_trainers_last_snapshot_that_is_given_up_is_told(
    runtime: Path, tmp_path: Path
) -> None:
    rig = Rig(tmp_path)
    with Daemon(runtime, environment=rig.environment()) as daemon:
        with preempted_amid_a_write(runtime, rig):
            asyncio.run(abort_step(open_store(rig.file_url), StepId(1, 3), "by the test"))
        rig.obey()
        told = daemon.await_event("preemption_unsaved")
        assert (told["step"], told["why"]) == ("1.3", "by the test")
        assert counted(runtime) == {"signals": 1, "saves": 0}


def test_a_daemon_that_ends_counts_what_it_has_just_finished(runtime: Path, store_url: str) -> None:
    with Daemon(runtime) as daemon:
        with Rank(runtime, store_url) as rank:
            rank.save(1)
            rank.wait(1)
            rank.link.ask(Preempt("test", "preempted", 0.0), Done)
        assert daemon.end() == 0
        (saved,) = daemon.events("preemption_saved")
        assert saved["step"] == "1.1"


COMMITTED, ABORTED = (Outcome.COMMITTED, ""), (Outcome.ABORTED, "why")
OPEN = (Outcome.UNDECIDED, "")


@pytest.mark.parametrize(
    ("sealed", "before", "gone", "expected"),
    [
        ({}, -1, False, None),
        ({}, -1, True, Verdict(saved=True)),
        ({5: COMMITTED}, 5, False, None),  # the loop may still come to a step
        ({5: COMMITTED}, 5, True, Verdict(saved=True, step=5)),
        ({5: COMMITTED, 7: COMMITTED}, 5, False, Verdict(saved=True, step=7)),
        ({5: COMMITTED, 7: OPEN}, 5, True, None),
        ({5: COMMITTED, 7: (Outcome.SPOOLED, "")}, 5, True, None),
        ({5: ABORTED, 7: COMMITTED}, 5, True, Verdict(saved=True, step=7)),  # given up for it
        ({5: COMMITTED, 7: ABORTED}, 5, False, None),
        ({5: COMMITTED, 7: ABORTED}, 5, True, Verdict(saved=False, step=7, why="why")),
    ],
)
def test_the_verdict_on_a_preemption(
    sealed: dict[int, tuple[Outcome, str]], before: int, gone: bool, expected: Verdict | None
) -> None:
    assert verdict(sealed, before, gone=gone) == expected
