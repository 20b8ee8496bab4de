"""Drills of docs/runbook.md: ranks that stop, and incarnations that come back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from called import call
from ckptmgr.staging.control import Done, Preempt
from drills.acting import commit, in_full, logged
from drills.conftest import WatchDaemon
from driven import Daemon, Rank, until
from peers.job import commit as commit_all
from peers.job import go_on, started, stop
from rigged import Rig

pytestmark = pytest.mark.reliability


def test_a_rank_that_is_stuck(
    runtime: Path, rig: Rig, watch: WatchDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_STUCK_SECONDS", "2")
    with (
        Daemon(runtime) as daemon,
        watch(daemon) as alerts,
        started(rig.url, runtime, runtime) as job,
    ):
        commit_all(job, 1)
        alerts.is_quiet()
        stuck = job[1]
        stop([stuck.process])
        try:
            job[0].ask("save", 2)
            stuck.tell("save", 2)
            alerts.fires("CkptmgrRankSilent", "CkptmgrStepsGivenUp")
            assert "no manifest of rank 1 of 2" in str(logged(daemon, "CKM1305")["why"])
        finally:
            go_on([stuck.process])  # the action: continue it
        stuck.hear()
        commit_all(job, 3)
        alerts.ends("CkptmgrRankSilent", "CkptmgrStepsGivenUp")


@in_full
def test_a_preempted_rank_whose_store_is_down(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    with Daemon(runtime) as daemon, watch(daemon) as alerts, Rank(runtime, rig.url) as rank:
        commit(rank, 1)
        alerts.is_quiet()
        rig.obey(("put_new", "data/", "dead"))
        rank.link.ask(Preempt("test", "the host is needed", 30.0), Done)
        rank.save(2)
        assert logged(daemon, "CKM1208")["source"] == "test"
        alerts.fires("CkptmgrPreemptionUnsaved")
        rig.obey()  # the action: make the store take it
        assert call("drain", runtime=runtime).status == 0
        alerts.ends("CkptmgrPreemptionUnsaved")


@in_full
def test_an_incarnation_that_comes_back(runtime: Path, rig: Rig, watch: WatchDaemon) -> None:
    hosts = [runtime / "h0", runtime / "h1"]
    for host in hosts:
        host.mkdir(mode=0o700)
    with Daemon(hosts[0]) as old, Daemon(hosts[1]), watch(old) as alerts, ExitStack() as cut_off:
        first = cut_off.enter_context(Rank(hosts[0], rig.url))
        commit(first, 1)
        with Rank(hosts[1], rig.url) as second:
            commit(second, 2)
            alerts.is_quiet()
            first.save(3)
            told = logged(old, "CKM1205")
            assert (told["attempt"], told["newest"]) == (1, 2)
            alerts.fires("CkptmgrAttemptSuperseded")
            assert call("drain", runtime=hosts[0]).status == 6
            cut_off.close()  # the action: end it
            commit(second, 3)
            until(lambda: call("drain", runtime=hosts[0]).status == 0, "nothing runs there")
            alerts.ends("CkptmgrAttemptSuperseded")
