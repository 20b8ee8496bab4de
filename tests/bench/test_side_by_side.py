"""The harness that measures other libraries beside us: its arithmetic, table and visits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.beside import conductor, gauge
from bench.beside.conductor import Plan, Visit, conduct, merged
from bench.beside.environment import reason
from bench.beside.figures import figures, limits_of, rows_of
from bench.beside.roster import BY_NAME, ENTRIES, Entry
from bench.beside.table import cell, table
from nursery import torch_nursery

LIMITS = {"kind": "limits", "round": 0, "copy_s": 0.1, "write_s": 0.5, "read_s": 0.25}
MIB = 1 << 20


def snapshot(stall: float, **more: float) -> dict[str, float]:
    plain = {"lost_s": 0.3, "complete_s": 0.6, "durable_s": 0.75, "cpu_s": 2.0, "steps_cpu_s": 1.5}
    return {"stall_s": stall, "stored_bytes": 128 * MIB, **plain, **more}


def visit(peer: str, number: int = 0, stalls: tuple[float, ...] = (0.9, 0.2, 0.4)) -> Any:
    saved = {"snapshots": [snapshot(stall) for stall in stalls]}
    saved |= {"peak_bytes": 0, "extra_bytes": 512 * MIB, "version": "1.0"}
    restored = {"opened_s": 0.05, "restore_s": 0.2}
    return {
        "kind": "visit",
        "round": number,
        "peer": peer,
        "save": saved,
        "cold": restored,
        "warm": restored,
    }


def run_line(**more: Any) -> dict[str, Any]:
    plan = {"mib": 256, "tensors": 50, "dtype": "float32", "ranks": 1, "repeat": 2, "snapshots": 3}
    host = {"cores": 2, "memory_gib": 24, "kernel": "6", "python": "3.11", "when": "today"}
    return {"kind": "run", "load": 1.0, "step_seconds": 0.1, **plan, **host, **more}


def failed(peer: str, why: str) -> dict[str, Any]:
    return {"kind": "visit", "round": 0, "peer": peer, "failure": why}


def plan_of(directory: Path, *entries: Entry, **more: Any) -> Plan:
    plain = Plan(
        entries=entries,
        directory=directory,
        mib=1,
        tensors=4,
        dtype="float32",
        ranks=1,
        repeat=1,
        snapshots=2,
        step_seconds=0.01,
        timeout_seconds=60.0,
        others=None,
        missing={},
    )
    return replace(plain, **more)


# ---- arithmetic -------------------------------------------------------------


def test_the_first_snapshot_is_a_figure_of_its_own() -> None:
    found = figures(visit("a"), LIMITS, 256 * MIB)
    assert found["first_stall_s"] == 0.9
    assert found["stall_s"] == pytest.approx(0.3)


def test_figures_are_ratios_to_the_limits_of_the_same_round() -> None:
    found = figures(visit("a"), LIMITS, 256 * MIB)
    assert found["stall"] == pytest.approx(3.0)
    assert found["lost"] == pytest.approx(3.0)
    assert found["durable"] == pytest.approx(1.5)
    assert found["synced_s"] == pytest.approx(0.15)
    assert found["cold"] == pytest.approx(1.0)
    assert found["stored"] == pytest.approx(0.5)
    assert found["extra"] == pytest.approx(2.0)
    assert found["cpu_s_per_gib"] == pytest.approx(2.0)
    assert "memory" not in found


def test_rounds_are_compared_each_with_its_own_limits() -> None:
    """A machine that was three times slower in one round shows in seconds, not in ratios."""
    slow = {name: 3 * value for name, value in LIMITS.items() if name.endswith("_s")}
    lines = [run_line(), LIMITS, visit("a", stalls=(1, 0.2, 0.2))]
    lines += [{**LIMITS, **slow, "round": 1}, visit("a", 1, stalls=(3, 0.6, 0.6))]
    [row] = rows_of(lines)
    assert row["stall"] == pytest.approx(2.0)
    assert row["stall_s"] == pytest.approx(0.4)
    assert limits_of(lines)["copy_s"] == pytest.approx(0.2)


def test_of_many_ranks_the_slowest_counts_and_the_time_of_steps_adds_up() -> None:
    one, other = snapshot(0.1, steps_cpu_s=1.0), snapshot(0.4, steps_cpu_s=2.0, durable_s=0.1)
    found = merged([{"snapshots": [one], "version": "1"}, {"snapshots": [other], "version": "1"}])
    [both] = found["snapshots"]
    assert (both["stall_s"], both["durable_s"], both["steps_cpu_s"]) == (0.4, 0.75, 3.0)
    assert found["version"] == "1"


def test_one_failure_of_a_library_is_its_row() -> None:
    lines = [run_line(), LIMITS, visit("a"), {**failed("a", "save: broken"), "round": 1}]
    [row] = rows_of(lines)
    assert row.failure == "save: broken"
    assert row["stall_s"] is None


# ---- table ------------------------------------------------------------------


def test_a_table_has_a_row_for_who_ran_and_one_for_who_could_not() -> None:
    lines = [run_line(), LIMITS, visit("torch.save"), failed("Orbax", "save: a|b")]
    text = table([*lines, {"kind": "end", "load": 2.0}])
    assert (
        "| torch.save | 0.300 (3) | 0.900 (9) | 0.300 (3) | 0.300 | 0.300 | 0.750 (1.5) | 0.150 |"
        in text
    )
    assert text.count("| Orbax | could not run: save: a/b |") == 2
    assert "| torch.save | 0.250 (1) | 0.050 | 0.250 (2.5) |  | 0.50 | 2.00 | 2.00 |" in text
    assert "- torch.save: torch 1.0." in text
    assert "256 MiB of float32 in 50 tensors" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}


@pytest.mark.parametrize(
    ("seconds", "other", "shown"),
    [(1.0, 2.0, "1.000 (2)"), (1.0, None, "1.000"), (None, 0.5, "0.50"), (None, None, "")],
)
def test_a_cell_shows_what_there_is(seconds: Any, other: Any, shown: str) -> None:
    assert cell(seconds, other) == shown


# ---- visits -----------------------------------------------------------------


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks of a process that has torch; the gauge does not see them, for they keep its environ."""
    forks = SimpleNamespace(
        Popen=torch_nursery().popen,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(conductor, "subprocess", forks)


def test_the_gauge_sees_who_carries_the_token_and_their_children() -> None:
    code = "import sys; kept = bytearray(b'x') * (20 << 20); print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.fork(); {code}"],
        env={gauge.TOKEN: "bench-test"},
        stdin=pipe,
        stdout=pipe,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        pids = gauge.members("bench-test")
        assert process.pid in pids
        assert len(pids) == 2
        assert 40 * MIB < gauge.pss_bytes(pids) < 80 * MIB
        assert gauge.cpu_seconds(pids) > 0
        process.communicate()
    assert gauge.members("bench-test") == []


def test_who_is_not_installed_is_told_with_the_reason(tmp_path: Path) -> None:
    entry = BY_NAME["Orbax"]
    absent = {"missing": {"orbax-checkpoint": reason("noise\nERROR: no such version\n")}}
    assert Visit(plan_of(tmp_path, entry, **absent), entry).made() == {
        "failure": "not installed: no such version"
    }
    assert "make bench" in Visit(plan_of(tmp_path, entry), entry).made()["failure"]


def test_who_can_not_take_so_many_ranks_is_told() -> None:
    for entry in ENTRIES:
        if entry.ranks_max == 1:
            plan = plan_of(Path(), entry, ranks=2)
            assert Visit(plan, entry).made() == {"failure": "not with 2 ranks"}


def test_a_library_that_fails_becomes_a_row_and_is_not_tried_again(
    quick_processes: None, tmp_path: Path
) -> None:
    broken = Entry("broken", "bench.beside.nowhere:Peer", "torch")
    lines = list(conduct(plan_of(tmp_path, broken, repeat=2, snapshots=1), lambda _: None))
    [row] = rows_of(lines)
    assert row.failure.startswith("save: ModuleNotFoundError: No module named")
    assert [line["kind"] for line in lines] == ["run", "limits", "visit", "limits", "end"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ckptmgr", "torch.save"])
def test_a_library_is_measured_from_end_to_end(
    name: str, quick_processes: None, tmp_path: Path
) -> None:
    visited = Visit(plan_of(tmp_path, BY_NAME[name]), BY_NAME[name], operations=1)
    found = json.loads(json.dumps(visited.made()))
    assert "failure" not in found, found
    assert found.keys() == {"save", "cold", "warm"} | ({"memory"} & found.keys())
    assert ("memory" in found) == (name == "ckptmgr")
    assert all(found[phase]["wrong"] == 0 for phase in found if phase != "save")
    for one in found["save"]["snapshots"]:
        assert 0 < one["stall_s"] <= one["took_s"]
        assert one["complete_s"] <= one["durable_s"]
        assert one["stored_bytes"] > MIB // 2  # `auto` may compress
    if name == "ckptmgr":
        sources = [found[phase]["source"] for phase in ("memory", "cold", "warm")]
        assert sources == ["memory", "store", "store"]
    assert gauge.members(visited.token) == []
    assert list(tmp_path.iterdir()) == []


def test_a_phase_that_does_not_end_is_ended(quick_processes: None, tmp_path: Path) -> None:
    entry = BY_NAME["torch.save"]
    visited = Visit(plan_of(tmp_path, entry, timeout_seconds=0.0), entry)
    assert visited.made() == {"failure": "save: no end after 0 s"}
    assert gauge.members(visited.token) == []
