"""Drills of docs/runbook.md: the daemon, its host and its own faults."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from called import call
from crash.full_disk import mounted
from drills.acting import commit, in_full, logged
from drills.conftest import WatchDaemon
from drills.watched import free_port
from driven import Daemon, Rank, until
from processes import needs_root
from rigged import Rig

pytestmark = pytest.mark.reliability


def test_a_daemon_that_is_killed(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    port = f"--metrics-port={free_port()}"
    with Daemon(runtime, port) as first, watch(first) as alerts:
        with Rank(runtime, rig.url) as rank:
            commit(rank, 1)
            rig.obey(("put_new", "data/", "hold"))
            rank.save(2)
            until(lambda: rig.asked("put_new", "data/00000001/000000000002"), "it is written")
            alerts.is_quiet()
        first.end(signal.SIGKILL)
        alerts.fires("CkptmgrDaemonDown")
        rig.obey()
        with Daemon(runtime, port) as second:  # the action
            assert logged(second, "CKM1003")["event"] == "killed_before"
            assert logged(second, "CKM1101")["snapshots"] == 2
            alerts.ends("CkptmgrDaemonDown")
            alerts.fires("CkptmgrDaemonKilled")
            assert alerts.value("ckptmgr_adopted_snapshots") == 2
            until(lambda: second.status()["undecided"] == 0, "what was sealed is committed")
            alerts.ends("CkptmgrDaemonKilled")


@in_full
def test_shared_memory_that_is_too_small(
    tmp_path: Path, runtime: Path, rig: Rig, watch: WatchDaemon
) -> None:
    needs_root()
    with mounted(runtime / "shm", "1m") as small:
        with Daemon(small) as daemon, watch(daemon) as alerts:
            with Rank(small, rig.url) as rank:
                commit(rank, 1)
                alerts.fires("CkptmgrMemoryNotShared")
                assert logged(daemon, "CKM1104")["event"] == "shared_memory_small"
            # The action: enlarge it, and let the next daemon make new buffers.
            subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
            assert call("drain", "--stop", runtime=small).status == 0
            daemon.process.wait()
        with Daemon(small) as daemon, watch(daemon) as alerts, Rank(small, rig.url) as rank:
            commit(rank, 2)
            until(lambda: alerts.value("ckptmgr_attached_ranks") == 1, "the rank is seen")
            assert alerts.value("ckptmgr_unnamed_buffers") == 0
            alerts.is_quiet()


@in_full
def test_a_clock_that_is_set(tmp_path: Path, runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    if shutil.which("cc") is None:
        pytest.skip("NEEDS cc: not checked in this run; install a C compiler")
    shim, clock = tmp_path / "clock.so", tmp_path / "clock"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
    clock.write_text("0")
    preloaded = ("env", f"LD_PRELOAD={shim}", f"CLOCK_FILE={clock}")  # which no fork would be
    with (
        Daemon(runtime, prefix=preloaded) as daemon,
        Rank(runtime, rig.url) as rank,
        watch(daemon) as alerts,
    ):
        commit(rank, 1)
        alerts.is_quiet()
        clock.write_text("3600")
        assert abs(float(str(logged(daemon, "CKM1004")["seconds"])) - 3600) < 60
        alerts.fires("CkptmgrClockJumped")
        commit(rank, 2)  # nothing is decided by it
        clock.write_text("0")  # the action: time is synchronised again, which is a jump, too
        daemon.await_event("clock_jumped", 2)
        commit(rank, 3)
        alerts.ends("CkptmgrClockJumped")
        assert rank.restore().step == 3


@in_full
def test_a_spool_that_can_not_be_used(
    runtime: Path, rig: Rig, tmp_path: Path, watch: WatchDaemon
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o755)
    with Daemon(runtime, f"--spool={spool}") as daemon, watch(daemon) as alerts:
        assert logged(daemon, "CKM1402")["event"] == "spool_off"
        alerts.fires("CkptmgrPartOff")
        spool.chmod(0o700)  # the action
        assert call("drain", "--stop", runtime=runtime).status == 0
        daemon.process.wait()
    with Daemon(runtime, f"--spool={spool}") as daemon, watch(daemon) as alerts:
        until(lambda: alerts.value("ckptmgr_spool_capacity_bytes") > 0, "the spool is there")
        alerts.is_quiet()


@in_full
def test_a_fault_of_ckptmgr(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank, watch(daemon) as alerts:
        commit(rank, 1)
        alerts.is_quiet()
        rig.obey(("put_new", "data/", "fault once"))
        rank.save(2)
        assert "ZeroDivisionError" in str(logged(daemon, "CKM1010")["traceback"])
        alerts.fires("CkptmgrFault")
        assert rank.wait(2).outcome == 1  # it is tried again without anybody
        alerts.ends("CkptmgrFault")
