"""Drills of docs/runbook.md: the store, the spool and the mirror fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.config import GIB
from ckptmgr.types import Outcome
from crash.full_disk import fill, mounted
from drills.acting import commit, in_full, logged, training
from drills.conftest import WatchDaemon
from driven import Daemon, Rank, until
from processes import needs_root
from rigged import Rig

pytestmark = pytest.mark.reliability


def test_a_store_that_is_down(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    """For ten minutes and more, in drill time: training goes on, then it stands still, too."""
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank, watch(daemon) as alerts:
        commit(rank, 1)
        with training(rank, 2) as steps:
            until(lambda: len(steps) > 3, "it trains")
            alerts.is_quiet()
            rig.obey(("*", "", "dead"))
            alerts.fires("CkptmgrStoreFailing", "CkptmgrCommitOverdue")
        assert logged(daemon, "CKM1601")["event"] == "store_failed"
        assert alerts.value("ckptmgr_dropped_snapshots_total") > 0
        alerts.fires("CkptmgrBacklogOld")
        assert alerts.value("ckptmgr_upload_backlog_bytes") > 0
        rig.obey()  # the action: the store is there again
        assert rank.wait(steps[-1]).outcome == Outcome.COMMITTED
        # The trainer still stands still.
        with training(rank, steps[-1] + 1):
            alerts.ends("CkptmgrStoreFailing", "CkptmgrCommitOverdue", "CkptmgrBacklogOld")


@in_full
def test_a_disk_that_is_full(runtime: Path, rig: Rig, tmp_path: Path, watch: WatchDaemon) -> None:
    needs_root()
    with (
        mounted(tmp_path / "disk", "6m") as disk,
        Daemon(runtime) as daemon,
        Rank(runtime, f"file://{disk}/store", keep=2) as rank,
        watch(daemon) as alerts,
    ):
        commit(rank, 1)
        alerts.is_quiet()
        filler = fill(disk)
        with training(rank, 2) as steps:
            alerts.fires("CkptmgrStoreFull", "CkptmgrCommitOverdue")
        assert logged(daemon, "CKM1601")["kind"] == "StoreFullError"
        assert logged(daemon, "CKM1308")["event"] == "write_failed"
        filler.unlink()  # the action: free space
        assert rank.wait(steps[-1]).outcome == Outcome.COMMITTED
        with training(rank, steps[-1] + 1):
            alerts.ends("CkptmgrStoreFull", "CkptmgrCommitOverdue")


@in_full
def test_a_spool_that_fills_up(
    runtime: Path, rig: Rig, tmp_path: Path, watch: WatchDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_SPOOL_SECONDS", "0.2")
    spool = [f"--spool={tmp_path}/spool", f"--spool-max-gib={3.5 * (1 << 20) / GIB}"]
    with Daemon(runtime, *spool) as daemon, Rank(runtime, rig.url) as rank, watch(daemon) as alerts:
        commit(rank, 1)
        alerts.is_quiet()
        rig.obey(("*", "", "dead"))
        with training(rank, 2) as steps:
            alerts.fires("CkptmgrSpoolNearlyFull")
        assert logged(daemon, "CKM1406")["event"] == "spool_full"
        rig.obey()  # the action: the store is there again, and the spool drains
        assert rank.wait(steps[-1]).outcome == Outcome.COMMITTED
        alerts.ends("CkptmgrSpoolNearlyFull")


@in_full
def test_a_mirror_that_does_not_follow(
    runtime: Path, rig: Rig, tmp_path: Path, watch: WatchDaemon
) -> None:
    mirror = tmp_path / "mirror"
    mirror.write_text("no directory")
    with (
        Daemon(runtime, f"--mirror=file://{mirror}") as daemon,
        Rank(runtime, rig.url) as rank,
        watch(daemon) as alerts,
    ):
        for step in range(1, 6):
            commit(rank, step)
        alerts.fires("CkptmgrMirrorBehind")
        assert logged(daemon, "CKM1503")["event"] == "mirror_failed"
        mirror.unlink()  # the action: the mirror is there
        alerts.ends("CkptmgrMirrorBehind")
        assert daemon.await_event("mirrored")
