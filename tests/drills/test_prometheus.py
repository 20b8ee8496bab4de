"""A real Prometheus takes the rules and every expression of the dashboard, on real metrics."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from ckptmgr.staging.reached import reach
from drills.acting import commit
from drills.conftest import WatchDaemon
from drills.watched import LOOK_SECONDS, Prometheus
from driven import TREE, Daemon, Rank, until
from rigged import Rig

QUIET = {
    *("Mirror", "Spool", "Oldest undecided snapshot", "Warnings and errors"),
    "Lost to restarts",
}
"""Panels that have something to show on bad days only, or with a spool or a mirror."""


def test_every_panel_shows_something_of_a_job_that_goes_well(
    runtime: Path, rig: Rig, prometheus: Prometheus, watch: WatchDaemon
) -> None:
    panels = json.loads((TREE / "docs/observability/ckptmgr-dashboard.json").read_text())["panels"]
    with (
        Daemon(runtime) as daemon,
        Rank(runtime, rig.url, keep=2) as rank,
        watch(daemon) as alerts,
    ):
        steps = itertools.count(1)

        def train() -> None:
            step = next(steps)
            commit(rank, step)
            reach(rank.buffer.memory, rank.attempt, step)  # as every step of a trainer does

        for _ in range(4):
            train()
        rank.restore()
        until(lambda: alerts.value("ckptmgr_last_commit_step") == 4, "it is scraped")

        def empty() -> set[str]:
            return {panel["title"] for panel in panels if not shown(panel)}

        def shown(panel: dict[str, Any]) -> list[object]:
            asked = [one["expr"].replace("$instance", alerts.instance) for one in panel["targets"]]
            return [sample for one in asked for sample in prometheus.query(one)]

        def all_show() -> bool:
            train()  # else a commit is overdue
            return empty() <= QUIET

        # A rate needs two samples.
        until(all_show, f"all panels but {QUIET} show something", LOOK_SECONDS)
        assert empty(), "panels of bad days are empty on a good one"
        alerts.is_quiet()


def test_the_rules_are_evaluated_without_fault(prometheus: Prometheus) -> None:
    def settled() -> bool:
        (group,) = prometheus.ask("rules")["groups"]
        health = {rule["health"] for rule in group["rules"]}
        assert "err" not in health, group
        return health == {"ok"}

    until(settled, "every rule was evaluated")
