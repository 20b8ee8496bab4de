"""Drills of docs/runbook.md: damage, commits that nobody reads back, and stalls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from called import call, spoil
from drills.acting import commit, in_full, logged
from drills.conftest import WatchDaemon
from driven import Daemon, Rank, until
from rigged import Rig

pytestmark = pytest.mark.reliability


def test_a_chunk_that_is_damaged(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    with Daemon(runtime) as before:
        with Rank(runtime, rig.url) as rank:
            for step in (1, 2):
                commit(rank, step)
        assert before.end() == 0
    shutil.rmtree(runtime / "buffers")
    spoil(rig.path, 1, 2)
    with Daemon(runtime) as daemon, watch(daemon) as alerts, Rank(runtime, rig.url) as rank:
        alerts.is_quiet()
        assert rank.restore().step == 1
        assert logged(daemon, "CKM1704")["step"] == "1.2"
        alerts.fires("CkptmgrCorruption", "CkptmgrFellBack")
        found = call("verify", rig.file_url, "--all")  # the action: what else is damaged?
        assert found.status == 3
        assert "1.2" in found.out
        commit(rank, 3)
        commit(rank, 4)
        alerts.ends("CkptmgrCorruption", "CkptmgrFellBack")
        assert call("verify", rig.file_url).status == 0


@in_full
def test_commits_that_are_not_read_back(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=2) as rank, watch(daemon) as alerts:
        for step in range(1, 5):
            commit(rank, step)
        assert logged(daemon, "CKM1801")["event"] == "verified"
        alerts.is_quiet()
        assert rank.attempt == 1
        alerts.fires("CkptmgrNotVerified")
        before = len(daemon.events("verified"))
        for step in range(5, 9):  # the action: the job goes on
            commit(rank, step)
            until(lambda n=step: daemon.events("retired")[-1]["step"] == f"1.{n - 2}", "retired")
        daemon.await_event("verified", before + 1)
        alerts.ends("CkptmgrNotVerified")


@in_full
def test_snapshots_that_block_training(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank, watch(daemon) as alerts:
        commit(rank, 1)
        alerts.is_quiet()
        step = 1
        rank.stall_seconds = 9.0
        while "CkptmgrStalling" not in alerts.firing():
            step += 1
            commit(rank, step)
        rank.stall_seconds = 0.001  # the action: snapshots block no more
        while "CkptmgrStalling" in alerts.firing():
            step += 1
            commit(rank, step)
        assert daemon.events("committed")[-1]["step"] == f"1.{step}"
