"""Every metric is documented, and counted where it happens, by a real daemon."""

from __future__ import annotations

import math
import re
import shutil
import urllib.request
from pathlib import Path

import pytest

import called
from ckptmgr import __version__
from ckptmgr.daemon.counts import reason_of
from ckptmgr.daemon.log import label_of
from ckptmgr.metrics import REASONS, Metrics
from ckptmgr.types import Outcome
from daemon.test_writing import spoil
from driven import Daemon, Rank, ranks, until
from rigged import Rig
from seeing.tables import METRICS, found_table, metrics_table, registered

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


class Scraped:
    """The metrics of a daemon, read anew at each question."""

    def __init__(self, daemon: Daemon, url: str = "") -> None:
        self._port = daemon.status()["metrics_port"]
        self._job = label_of(url)

    def value(self, name: str, **labels: str) -> float:
        """The sum of all samples of a name with these labels; NaN without any."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics") as reply:
            text = reply.read().decode()
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        found = [
            float(value)
            for sample, given, value in SAMPLE.findall(text)
            if sample == f"ckptmgr_{name}" and wanted <= set(given.split(","))
        ]
        return sum(found) if found else math.nan

    def of_job(self, name: str, **labels: str) -> float:
        return self.value(name, job=self._job, **labels)

    def reaches(self, expected: float, name: str, **labels: str) -> None:
        until(lambda: self.of_job(name, **labels) == expected, f"{name} {labels} is {expected}")


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    return found


def commit(rank: Rank, *steps: int) -> None:
    for step in steps:
        rank.save(step)
        assert rank.wait(step).outcome == Outcome.COMMITTED


# ---- the page -----------------------------------------------------------------------


def test_the_table_of_metrics_is_that_of_the_registry() -> None:
    assert found_table(METRICS.read_text()) == metrics_table(), "run tests/seeing/tables.py"


def test_every_name_is_ours_says_its_unit_and_is_explained() -> None:
    for name, kind, labels, text in registered():
        assert name.startswith("ckptmgr_")
        assert text.endswith(".")
        assert kind != "histogram" or name.endswith("_seconds")
        assert not set(labels) & {"url", "path", "host", "step"}, (
            "a label of many values, or a name"
        )


# ---- counted where it happens -------------------------------------------------------


def test_a_job_that_goes_well(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon, Rank(runtime, rig.url, keep=2) as rank:
        seen = Scraped(daemon, rig.url)
        assert seen.value("build_info", version=__version__) == 1
        for name in ("commits", "restore_fallbacks", "superseded_attempts", "dropped_snapshots"):
            assert seen.of_job(f"{name}_total") == 0, "it starts at 0"
        assert seen.of_job("attempt") == 1
        awaited = seen.of_job("commit_awaited_timestamp_seconds")
        commit(rank, 5, 6, 7, 8)
        seen.reaches(8, "last_snapshot_step")
        seen.reaches(8, "last_commit_step")
        assert seen.of_job("commits_total") == 4
        assert seen.of_job("commit_awaited_timestamp_seconds") > awaited
        assert seen.of_job("attached_ranks") == 1
        assert seen.of_job("snapshot_interval_seconds") > 0
        assert seen.of_job("stall_seconds_count") == 4
        assert seen.of_job("unnamed_buffers") == 0
        assert math.isnan(seen.of_job("oldest_undecided_timestamp_seconds"))
        until(lambda: len(daemon.events("retired")) == 2, "two are retired")
        deleted = sum(event["bytes"] for event in daemon.events("retired"))
        seen.reaches(deleted, "gc_deleted_bytes_total")
        assert deleted > 2 << 20
        left = sum(event["stored_bytes"] for event in daemon.events("committed")[-2:])
        until(lambda: seen.of_job("store_bytes") == left, "the newest two are left")
        assert seen.of_job("store_bytes", state="verified") > 1 << 20
        assert seen.of_job("pinned_bytes") == 0
        assert seen.of_job("d2h_bytes_total") == 4 << 20
        assert seen.of_job("last_verified_timestamp_seconds") > awaited
        puts = rig.asked("put_new", "")
        assert 0 < seen.of_job("store_op_seconds_count", op="put_new") <= puts
        assert seen.of_job("store_errors_total") == seen.of_job("store_retries_total") == 0
        rank.restore()
        seen.reaches(1, "restores_total", source="memory")
        assert seen.of_job("restore_seconds_count", source="memory") == 1
        assert seen.value("events_total", code="CKM1302", event="committed", level="info") == 4
        assert seen.value("events_total", event="fault") == 0


def test_a_store_that_fails_and_snapshots_that_wait(
    runtime: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_MEMORY_SECONDS", "0")
    with Daemon(runtime) as daemon:
        seen = Scraped(daemon, rig.url)
        with Rank(runtime, rig.url) as rank:
            commit(rank, 1)
            rig.obey(("put_new", "data/", "dead"))
            writing = rank.save(2)
            failed = {"op": "put_new", "class": "StoreUnreachableError"}
            until(lambda: seen.of_job("store_errors_total", **failed) >= 1, "2 is being written")
            rank.save(3)
            seen.reaches(2 << 20, "upload_backlog_bytes")
            seen.reaches(writing.sealed_at, "oldest_undecided_timestamp_seconds")
            seen.reaches(2, "queue_snapshots")
            rank.save(4, 1 - writing.slot)
            seen.reaches(1, "dropped_snapshots_total", reason="waiting")
            seen.reaches(2, "queue_snapshots")
            rank.save(5, writing.slot)
            seen.reaches(1, "dropped_snapshots_total", reason="writing")
            assert seen.of_job("dropped_snapshots_total") == 2
            assert seen.of_job("d2h_bytes_total") == 5 << 20, "what was dropped had been copied"
            until(lambda: seen.of_job("store_errors_total", **failed) >= 3, "it failed three times")
            until(
                lambda: seen.of_job("store_retries_total", op="put_new") >= 2, "it was tried again"
            )
            rig.obey()
            assert rank.wait(5).outcome == Outcome.COMMITTED
            seen.reaches(0, "upload_backlog_bytes")
            seen.reaches(1, "aborts_total", reason="newer_snapshot")
        until(lambda: math.isnan(seen.of_job("attached_ranks")), "gauges of a closed job are gone")
        assert seen.of_job("commits_total") == 3


def test_damage_in_memory_and_in_the_store(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        commit(rank, 1, 2)
    shutil.rmtree(runtime / "buffers")
    called.spoil(rig.path, 1, 2)
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        seen = Scraped(daemon, rig.url)
        assert seen.of_job("corruption_detected_total") == 0
        assert rank.restore().step == 1
        # The prefetch meets it, too, and leaves it to the restore to tell.
        seen.reaches(1, "corruption_detected_total", tier="store")
        assert seen.of_job("restore_fallbacks_total") == 1
        assert seen.of_job("restores_total", source="store") == 1
        assert seen.of_job("restore_seconds_count", source="store") == 1


def test_a_snapshot_that_no_longer_holds_when_its_turn_comes(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", "data/", "hold"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        seen = Scraped(daemon, rig.url)
        rank.save(1)
        rank.save(2)
        seen.reaches(2, "queue_snapshots")
        spoil(runtime, 2, 100)
        seen.reaches(1, "dropped_snapshots_total", reason="damaged")
        assert seen.of_job("corruption_detected_total", tier="memory") == 1
        rig.obey()
        assert rank.wait(1).outcome == Outcome.COMMITTED
        assert seen.of_job("dropped_snapshots_total") == 1


def test_a_rank_that_does_not_come(
    runtime: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_STUCK_SECONDS", "1")
    with Daemon(runtime) as daemon, ranks(rig.url, runtime, runtime) as (first, _):
        seen = Scraped(daemon, rig.url)
        assert seen.of_job("attached_ranks") == 2
        first.save(1)
        assert first.wait(1).outcome == Outcome.ABORTED
        assert seen.of_job("aborts_total", reason="rank_missing") == 1
        assert seen.of_job("aborts_total") == 1


def test_a_daemon_that_was_killed_and_one_that_was_not(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as first, Rank(runtime, rig.url) as rank:
        assert Scraped(first).value("started_after_kill") == 0
        assert Scraped(first).value("daemon_restarts_total") == 0
        commit(rank, 1)
    with Daemon(runtime) as second:
        assert second.await_event("killed_before")["code"] == "CKM1003"
        seen = Scraped(second)
        assert seen.value("started_after_kill") == 1
        assert seen.value("daemon_restarts_total") == 1
        assert not seen.value("d2h_bytes_total"), "what it adopts was counted by the one before"
        assert seen.value("adopted_snapshots") == 1
        assert seen.value("fdstore_recovered_total") == 0, "it is in /dev/shm"
        second.end()
    with Daemon(runtime) as third:
        assert Scraped(third).value("started_after_kill") == 0
        assert Scraped(third).value("daemon_restarts_total") == 2
        assert len(third.events("killed_before")) == 1


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("no manifest of ranks 1, 2 of 4 in 120 s", "rank_missing"),
        ("no manifest of rank 1 of 4 in 120 s", "rank_missing"),
        ("the daemon of rank 0, which decides, is silent", "decider_silent"),
        ("superseded by a newer snapshot", "newer_snapshot"),
        ("superseded", "newer_attempt"),
        ("RecordDamagedError: has chunks that overlap in a pack", "failure"),
        ("w is F32[4] on rank 0, but F32[5] on rank 1", "parts_missing"),
    ],
)
def test_why_a_step_was_given_up_has_a_word(why: str, reason: str) -> None:
    assert reason_of(why) == reason
    assert reason in REASONS


def test_a_job_that_is_opened_has_every_counter_of_it() -> None:
    metrics = Metrics()
    metrics.open_job("ab")
    found = {
        sample.name: sample.labels
        for family in metrics.registry.collect()
        for sample in family.samples
        if family.type == "counter" and sample.labels.get("job") == "ab"
    }
    assert len([name for name in found if name.endswith("_total")]) >= 8
