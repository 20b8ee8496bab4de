"""The spool: a store that is down or slow costs no snapshot while a local disk has room."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import DaemonSettings
from ckptmgr.daemon.log import label_of
from ckptmgr.errors import UsageError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import abort_step
from ckptmgr.restore.verify import verify_step
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId
from crash.full_disk import mounted
from driven import Daemon, Rank, files_below, until
from processes import needs_root
from rigged import Rig

DOWN = (("*", "", "dead"),)
ONE = "00000001/00000000000"


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rigged store, and a spool that every daemon started from here on uses."""
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    monkeypatch.setenv("CKPTMGR_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("CKPTMGR_SPOOL_SECONDS", "1")
    return found


def committed(url: str) -> list[str]:
    """Commits of a store, oldest first, each read back whole."""

    async def read() -> list[str]:
        store = open_store(url)
        catalog = Catalog(store)
        found = []
        async for decision in catalog.committed():
            assert not await verify_step(catalog, decision, BufferPool(1))
            found.append(str(decision.id))
        await store.aclose()
        return found[::-1]

    return asyncio.run(read())


def give_up(url: str, step: StepId) -> None:
    async def abort() -> None:
        store = open_store(url)
        assert not (await abort_step(store, step, "by the test's will")).committed
        await store.aclose()

    asyncio.run(abort())


def spooled(tmp_path: Path, url: str) -> list[str]:
    """Parts of a spool, by its own files."""
    root = tmp_path / "spool" / label_of(url) / "man"
    return sorted(str(path.relative_to(root)) for path in files_below(root))


def spool_through_an_outage(rank: Rank, rig: Rig, tmp_path: Path, *steps: int) -> None:
    """Commit step 1; then the store dies, and `steps` go to the spool."""
    rank.save(1)
    assert rank.wait(1).outcome == Outcome.COMMITTED
    rig.obey(*DOWN)
    for step in steps:
        rank.save(step)  # waits for a free slot: the spool frees them
    until(lambda: len(spooled(tmp_path, rig.url)) == len(steps), "all are in the spool")


def spool_and_lose_memory(runtime: Path, rig: Rig, tmp_path: Path) -> None:
    """Step 1 is committed, steps 2 and 3 are in the spool only; daemon and trainer are gone."""
    with Daemon(runtime) as daemon:
        with Rank(runtime, rig.url, keep=9) as rank:
            spool_through_an_outage(rank, rig, tmp_path, 2, 3)
        daemon.end(signal.SIGKILL)
    for path in (runtime / "buffers").iterdir():
        path.unlink()


def parts(daemon: Daemon) -> list[dict[str, Any]]:
    return [part for job in daemon.status()["jobs"] for part in job["spool"]["parts"]]


def test_what_a_dead_store_does_not_take_is_spooled_and_drained_in_order(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=100) as rank:
        spool_through_an_outage(rank, rig, tmp_path, *range(2, 8))
        assert rank.wait(2, seconds=0.1).outcome == Outcome.UNDECIDED
        assert [part["step"] for part in parts(daemon)] == [f"1.{step}" for step in range(2, 8)]
        rig.obey()
        for step in range(2, 8):
            assert rank.wait(step).outcome == Outcome.COMMITTED
        until(lambda: not spooled(tmp_path, rig.url), "the spool is empty")
        order = [event["step"] for event in daemon.events("committed")]
        assert order == [f"1.{step}" for step in range(1, 8)]
        rank.save(8)
        assert rank.wait(8).outcome == Outcome.COMMITTED
        assert len(daemon.events("spooled")) == 6, "the store takes it again"
    assert committed(rig.file_url) == [f"1.{step}" for step in range(1, 9)]


def test_a_killed_daemon_and_a_lost_memory_cost_nothing(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """As after a reboot: only the spool is left, and no trainer comes back."""
    spool_and_lose_memory(runtime, rig, tmp_path)
    rig.obey()
    with Daemon(runtime):
        until(lambda: not spooled(tmp_path, rig.url), "the spool is empty")
        assert committed(rig.file_url)[-1] == "1.3"
        with Rank(runtime, rig.url, keep=9) as rank:
            assert rank.restore().step == 3


def test_an_attempt_that_does_not_wait_for_the_spool_is_told(
    runtime: Path, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers, but takes no packs: the attempt resumes from what is in it."""
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    spool_and_lose_memory(runtime, rig, tmp_path)
    rig.obey(("put_new", "data/", "hold"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        (told,) = daemon.events("spool_behind")
        assert (told["parts"], told["waited"]) == (2, 2.0)
        assert rank.restore().step == 1
        rig.obey()
        until(lambda: not spooled(tmp_path, rig.url), "the spool is empty")
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3"]


def test_what_a_newer_attempt_saves_queues_behind_what_is_being_drained(
    runtime: Path, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit would make a step of which only the packs are in the store garbage."""
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    spool_and_lose_memory(runtime, rig, tmp_path)
    rig.obey(("put_new", "man/00000001/", "hold"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        until(lambda: rig.asked("put_new", f"man/{ONE}2"), "its packs are in the store")
        assert rank.restore().step == 1
        rank.save(2)
        rank.save(3)
        until(lambda: len(spooled(tmp_path, rig.url)) == 4, "they wait")
        rig.obey()
        assert rank.wait(3).outcome == Outcome.COMMITTED
        assert not daemon.events("spool_dropped")
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3", "2.2", "2.3"]


def test_a_store_that_is_not_there_gets_nothing_and_all_when_it_is_back(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """An empty directory where a file system should be mounted."""
    spool_and_lose_memory(runtime, rig, tmp_path)
    rig.path.rename(tmp_path / "unmounted")
    rig.path.mkdir()
    rig.obey()
    with Daemon(runtime) as daemon:
        told = daemon.await_event("spool_stranded")
        assert (told["step"], told["why"]) == ("1.2", "no attempts/00000001/claim")
        assert len(spooled(tmp_path, rig.url)) == 2
        assert not any(path.is_file() for path in rig.path.rglob("*"))
        rig.path.rmdir()
        (tmp_path / "unmounted").rename(rig.path)
        with Rank(runtime, rig.url, keep=9) as rank:
            assert rank.restore().step == 3
        assert len(daemon.events("spool_stranded")) == 1
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3"]


def test_a_full_spool_leaves_the_policy_as_it_is_without_one(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """Two snapshots fit; the third stays in its slot, and goes on when there is room again."""
    mib_of_two = 2.7 / 1024
    with (
        Daemon(runtime, f"--spool-max-gib={mib_of_two}") as daemon,
        Rank(runtime, rig.url, keep=9) as rank,
    ):
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(*DOWN)
        for step in (2, 3, 4):
            rank.save(step)
        told = daemon.await_event("spool_full")
        assert told["step"] == "1.4"
        assert "has no room" in told["why"]
        waited = rank.wait(4, seconds=0.2)
        assert (waited.outcome, "has no room" in waited.why) == (Outcome.UNDECIDED, True)
        (job,) = daemon.status()["jobs"]
        assert job["spool"]["full"]
        outcomes = {s["step"]: s["outcome"] for s in job["buffers"][0]["snapshots"]}
        assert outcomes == {"1.3": "spooled", "1.4": "undecided"}
        assert spooled(tmp_path, rig.url) == [ONE + "2/000000", ONE + "3/000000"]
        assert len(list((tmp_path / "spool").rglob("*.pack"))) == 2, "nothing half-written stays"
        rig.obey()
        for step in (2, 3, 4):
            assert rank.wait(step).outcome == Outcome.COMMITTED
        until(lambda: not daemon.status()["jobs"][0]["spool"]["full"], "there is room again")
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3", "1.4"]


def test_a_disk_that_is_full_is_told_and_keeps_nothing_half_written(
    runtime: Path, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_root()
    with mounted(tmp_path / "disk", "6m") as disk:
        monkeypatch.setenv("CKPTMGR_SPOOL", str(disk))
        with Daemon(runtime) as daemon, Rank(runtime, rig.url, mib=4, keep=9) as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
            rig.obey(*DOWN)
            rank.save(2)
            daemon.await_event("spooled")
            rank.save(3)
            daemon.await_event("spool_full")
            assert len(list(disk.rglob("*.pack"))) == 1
            rig.obey()
            assert rank.wait(3).outcome == Outcome.COMMITTED
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3"]


def test_a_disk_that_turned_read_only_holds_up_no_store(
    runtime: Path, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the spool may wait for good, and nothing goes in any more."""
    needs_root()
    with mounted(tmp_path / "disk", "64m") as disk:
        monkeypatch.setenv("CKPTMGR_SPOOL", str(disk))
        with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
            rig.obey(*DOWN)
            rank.save(2)
            until(lambda: len(daemon.events("spooled")) == 1, "one is in the spool")
            rank.save(3)
            until(lambda: len(daemon.events("spooled")) == 2, "both are")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            rig.obey(("put_new", f"data/{ONE}2", "dead"))
            rank.save(4)
            assert rank.wait(4).outcome == Outcome.COMMITTED
            assert "EROFS" in daemon.await_event("spool_off")["why"]
            rig.obey()
            until(lambda: len(daemon.events("spool_left")) == 2, "the others come, too")
            rank.save(5)
            assert rank.wait(5).outcome == Outcome.COMMITTED
            assert not daemon.events("given_up")
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3", "1.4", "1.5"]


def test_a_slow_store_with_a_newer_snapshot_waiting_gives_way(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        rig.obey(("put_new", f"data/{ONE}1", "hold"))
        rank.save(1)
        rank.save(2)
        assert daemon.await_event("spooling")["step"] == "1.1"
        until(lambda: len(spooled(tmp_path, rig.url)) == 2, "both are in the spool")
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED
    assert committed(rig.file_url) == ["1.1", "1.2"]


def test_a_store_that_falls_silent_before_the_register_leaves_the_slot_free(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """All of the step is in the store, but somebody must see it decided."""
    rig.obey(("*", "commit/", "dead"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        rank.save(1)
        assert daemon.await_event("spooled")["step"] == "1.1"
        rank.save(2)
        rank.save(3)
        until(lambda: len(spooled(tmp_path, rig.url)) == 3, "they are in the spool")
        daemon.end(signal.SIGKILL)
        rig.obey()
        assert rank.wait(3).outcome == Outcome.COMMITTED
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3"]


def test_a_step_that_is_stored_whole_is_not_given_up_because_its_slot_is_reused(
    runtime: Path, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can not go to the spool any more, and need not: only its register is missing."""

    def stored(step: int) -> None:
        manifest = rig.path / f"man/{ONE}{step}/000000"
        until(manifest.exists, f"step {step} is stored")

    monkeypatch.setenv("CKPTMGR_SPOOL_SECONDS", "3")
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("*", "commit/", "dead"))
        second = rank.save(2)
        stored(2)
        rank.save(3)
        stored(3)
        rank.save(4, slot=second.slot)
        daemon.await_event("spooled")  # of another: so long the store has been silent
        rig.obey()
        until(lambda: committed(rig.file_url) == ["1.1", "1.2", "1.3", "1.4"], "all are committed")
        assert not daemon.events("given_up")


def test_what_was_given_up_meanwhile_is_dropped_and_told(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        spool_through_an_outage(rank, rig, tmp_path, 2)
        give_up(rig.file_url, StepId(1, 2))
        rig.obey()
        assert daemon.await_event("spool_dropped")["why"] == "by the test's will"
        assert rank.wait(2).outcome == Outcome.ABORTED
        until(lambda: not spooled(tmp_path, rig.url), "it is gone")
    assert committed(rig.file_url) == ["1.1"]


def test_a_part_that_does_not_hold_is_written_again_from_memory(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
        spool_through_an_outage(rank, rig, tmp_path, 2)
        (pack,) = (tmp_path / "spool").rglob("*.pack")
        with pack.open("r+b") as file:
            file.seek(5000)
            file.write(b"flipped")
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert "ChunkDamagedError" in daemon.events("spool_dropped")[0]["why"]
    assert committed(rig.file_url) == ["1.1", "1.2"]


def test_a_fault_over_a_part_in_the_spool_ends_nothing(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """It is tried once more; then the others go on, and the part waits for the next daemon."""
    with Daemon(runtime) as daemon:
        with Rank(runtime, rig.url, keep=9) as rank:
            spool_through_an_outage(rank, rig, tmp_path, 2, 3)
            rig.obey(("put_new", f"data/{ONE}2", "fault"))
            assert rank.wait(3).outcome == Outcome.COMMITTED
            rank.save(4)
            assert rank.wait(4).outcome == Outcome.COMMITTED
        assert len(daemon.events("spooled")) == 2, "the store takes it again"
        assert [e["step"] for e in daemon.events("fault")] == ["1.2", "1.2"]
        (told,) = daemon.events("given_up")
        assert (told["step"], told["kind"]) == ("1.2", "ZeroDivisionError")
        assert spooled(tmp_path, rig.url) == [ONE + "2/000000"]
        daemon.end(signal.SIGKILL)
    rig.obey()
    with Daemon(runtime):
        until(lambda: not spooled(tmp_path, rig.url), "the next daemon tries again")
    assert committed(rig.file_url) == ["1.1", "1.2", "1.3", "1.4"]


@pytest.mark.parametrize("what", ["link", "open to others", "taken", "no place"])
def test_a_spool_that_is_not_ours_is_refused_and_costs_only_itself(
    runtime: Path, rig: Rig, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "spool"
    if what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "no place":
        path.write_bytes(b"a file")
    else:
        path.mkdir(mode=0o755 if what == "open to others" else 0o700)
    with ExitStack() as stack:
        if what == "taken":
            (runtime / "other").mkdir(mode=0o700)
            stack.enter_context(Daemon(runtime / "other"))
        with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=9) as rank:
            assert daemon.await_event("spool_off")["path"] == str(path)
            assert daemon.status()["spool"] is None
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
    assert path.is_symlink() is (what == "link")


def test_everything_in_the_spool_is_private(runtime: Path, rig: Rig, tmp_path: Path) -> None:
    with Daemon(runtime), Rank(runtime, rig.url, keep=9) as rank:
        rig.obey(*DOWN)
        rank.save(1)
        until(lambda: spooled(tmp_path, rig.url), "it is in the spool")
        root = tmp_path / "spool"
        modes = {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_dir()}
        assert (root.stat().st_mode & 0o777, modes) == (0o700, {0o700})
        assert {p.stat().st_mode & 0o777 for p in root.rglob("*") if p.is_file()} == {0o600}


def test_a_relative_spool_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_SPOOL", "spool")
    with pytest.raises(UsageError, match="not an absolute path"):
        DaemonSettings.from_env(auto=True)
    monkeypatch.setenv("CKPTMGR_SPOOL", "")
    assert DaemonSettings.from_env(auto=True).spool_dir is None
