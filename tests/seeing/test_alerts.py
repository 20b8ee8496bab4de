"""The rules and the dashboard hold for the real programs, name real metrics, and are explained."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from drills.watched import RULES, in_drill_time, needs_prometheus
from driven import TREE
from seeing.tables import registered

DASHBOARD = TREE / "docs/observability/ckptmgr-dashboard.json"
RUNBOOK = TREE / "docs/runbook.md"
ALERT = re.compile(r"- alert: (\w+)\n(.*?)(?=\n +- alert: |\Z)", re.DOTALL)
OF_PROMETHEUS = {"up", "process_start_time_seconds", "process_resident_memory_bytes"} | {
    "process_open_fds"
}

Series = dict[str, str]
QUIET: Series = {
    "ckptmgr_commit_awaited_timestamp_seconds": "0+60x200",
    "ckptmgr_snapshot_interval_seconds": "300x200",
    "ckptmgr_attached_ranks": "1x200",
    "ckptmgr_oldest_undecided_timestamp_seconds": "0+60x200",
    'ckptmgr_store_errors_total{class="StoreUnreachableError",op="get"}': "0+1x200",
    'ckptmgr_store_errors_total{class="StoreFullError",op="put_new"}': "0x200",
    'ckptmgr_store_op_seconds_count{op="get"}': "0+100x200",
    'ckptmgr_aborts_total{reason="rank_missing"}': "3x200",
    'ckptmgr_aborts_total{reason="newer_snapshot"}': "0+1x200",
    'ckptmgr_aborts_total{reason="failure"}': "0x200",
    "ckptmgr_commits_total": "0+1x200",
    'ckptmgr_corruption_detected_total{tier="store"}': "1x200",
    "ckptmgr_restore_fallbacks_total": "1x200",
    "ckptmgr_last_verified_timestamp_seconds": "0x200",
    "ckptmgr_superseded_attempts_total": "1x200",
    "ckptmgr_preemption_signals_total": "0x80 1x99",
    "ckptmgr_preemption_saves_total": "0x80 1x99",
    'ckptmgr_stall_seconds_bucket{le="0.3"}': "0+9x200",
    'ckptmgr_stall_seconds_bucket{le="3.0"}': "0+9x200",
    'ckptmgr_stall_seconds_bucket{le="+Inf"}': "0+9x200",
    "ckptmgr_spool_free_bytes": "50x200",
    "ckptmgr_spool_capacity_bytes": "100x200",
    "ckptmgr_spool_full": "0x200",
    "ckptmgr_mirror_behind_commits": "1x200",
    'up{job="ckptmgr"}': "1x200",
    "ckptmgr_started_after_kill": "1x200",
    "process_start_time_seconds": "0x200",
    "ckptmgr_unnamed_buffers": "0x200",
    "ckptmgr_clock_jumps_total": "1x200",
    'ckptmgr_events_total{event="spool_off",level="warning"}': "0x200",
    'ckptmgr_events_total{event="fault",level="error"}': "1x200",
}
"""An hour and a half of one daemon with which all is well now, sampled every minute."""

AT_MINUTES = 90
FIRING = 'ALERTS{alertname="Ckptmgr%s",alertstate="firing"}'
TROUBLE: dict[str, Series] = {
    "CommitOverdue": {"ckptmgr_commit_awaited_timestamp_seconds": "0+60x70 4200x130"},
    "BacklogOld": {"ckptmgr_oldest_undecided_timestamp_seconds": "0+60x70 4200x130"},
    "StoreFailing": {
        'ckptmgr_store_errors_total{class="StoreUnreachableError",op="get"}': "0+20x200"
    },
    "StoreFull": {'ckptmgr_store_errors_total{class="StoreFullError",op="put_new"}': "0x85 1x99"},
    "RankSilent": {
        'ckptmgr_aborts_total{reason="rank_missing"}': "0x85 1x99",
        "ckptmgr_commits_total": "0+9x200",
    },
    "StepsGivenUp": {'ckptmgr_aborts_total{reason="failure"}': "0+1x200"},
    "Corruption": {'ckptmgr_corruption_detected_total{tier="store"}': "0x85 1x99"},
    "FellBack": {"ckptmgr_restore_fallbacks_total": "0x85 1x99"},
    "NotVerified": {"ckptmgr_last_verified_timestamp_seconds": "-90000x200"},
    "AttemptSuperseded": {"ckptmgr_superseded_attempts_total": "0x85 1x99"},
    "PreemptionUnsaved": {"ckptmgr_preemption_saves_total": "0x200"},
    "Stalling": {
        'ckptmgr_stall_seconds_bucket{le="3.0"}': "0+10x200",
        'ckptmgr_stall_seconds_bucket{le="+Inf"}': "0+10x200",
    },
    "SpoolNearlyFull": {"ckptmgr_spool_free_bytes": "9x200"},
    "MirrorBehind": {"ckptmgr_mirror_behind_commits": "4x200"},
    "DaemonDown": {'up{job="ckptmgr"}': "1x85 0x99"},
    "DaemonKilled": {"process_start_time_seconds": "0x85 5200x99"},
    "MemoryNotShared": {"ckptmgr_unnamed_buffers": "0x85 1x99"},
    "ClockJumped": {"ckptmgr_clock_jumps_total": "0x85 1x99"},
    "PartOff": {'ckptmgr_events_total{event="spool_off",level="warning"}': "1x200"},
    "Fault": {'ckptmgr_events_total{event="fault",level="error"}': "0x85 1x99"},
}
"""Alert -> what is different when it fires, and no other one does."""

FROM_THE_START = ("Corruption", "FellBack", "AttemptSuperseded", "Fault")
"""What may have happened before a daemon was scraped the first time."""


def alerts() -> dict[str, str]:
    """Name -> the text of each alert of the rule file."""
    return dict(ALERT.findall(RULES.read_text()))


def known() -> Iterator[str]:
    for name, kind, _, _ in registered():
        yield name
        if kind == "histogram":
            yield from (f"{name}_{part}" for part in ("bucket", "count", "sum"))
    yield from OF_PROMETHEUS


def unknown_metrics(expressions: str) -> set[str]:
    names = re.findall(r"\b(?:ckptmgr|process)_\w+", expressions)
    assert names
    return set(names) - set(known())


# ---- rules --------------------------------------------------------------------------


def test_prometheus_takes_the_rules() -> None:
    needs_prometheus("promtool")
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", RULES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


def labelled(series: str) -> str:
    """A series as a daemon's: of one job on one host."""
    own = 'exported_job="ab",instance="h"'
    return f"{series[:-1]},{own}}}" if series.endswith("}") else f"{series}{{{own}}}"


def unit_test(series: Series, expected: dict[str, bool]) -> dict[str, Any]:
    """One test for promtool: which alerts fire, with the windows that are shipped."""
    return {
        "interval": "1m",
        "input_series": [{"series": labelled(k), "values": v} for k, v in series.items()],
        "promql_expr_test": [
            {
                "expr": f"count({FIRING % name}) or vector(0)",
                "eval_time": f"{AT_MINUTES}m",
                "exp_samples": [{"labels": "{}", "value": int(fires)}],
            }
            for name, fires in expected.items()
        ],
    }


def test_each_alert_fires_over_its_trouble_and_no_other_does(tmp_path: Path) -> None:
    needs_prometheus("promtool")
    assert {f"Ckptmgr{name}" for name in TROUBLE} == set(alerts())
    tests = [unit_test(QUIET, dict.fromkeys(TROUBLE, False))]
    for name, trouble in TROUBLE.items():
        expected = {other: other == name for other in TROUBLE}
        tests.append(unit_test(QUIET | trouble, expected))
    for name in FROM_THE_START:
        (series,) = TROUBLE[name]
        tests.append(
            unit_test(QUIET | {series: "_x85 1x99"}, {other: other == name for other in TROUBLE})
        )
    plan = tmp_path / "tests.json"
    plan.write_text(json.dumps({"rule_files": [str(RULES)], "tests": tests}))
    done = subprocess.run(
        ["promtool", "test", "rules", plan], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_rules_name_real_metrics() -> None:
    assert unknown_metrics(RULES.read_text().partition("groups:")[2]) == set()
    assert unknown_metrics("ckptmgr_no_such_total") == {"ckptmgr_no_such_total"}


def test_every_alert_says_how_bad_it_is_and_where_it_is_explained() -> None:
    for name, text in alerts().items():
        assert re.search(r"severity: (page|ticket)\n", text), name
        assert f"runbook_url: 'docs/runbook.md#{name.lower()}'" in text


def test_drill_time_changes_every_duration_and_nothing_else() -> None:
    text = "expr: rate(a_5m_total[15m]) > a offset 5m + 24 * 3600 + 5 * 60 + 3 * b\nfor: 2m\n"
    assert in_drill_time(text) == (
        "expr: rate(a_5m_total[6000ms]) > a offset 2000ms + 24 * 0.5 + 5 * 0.4 + 3 * b\n"
        "for: 800ms\n"
    )
    assert not re.search(r"\[\d+[mh]\]|for: \d+[mh]\b", in_drill_time(RULES.read_text()))


# ---- the runbook --------------------------------------------------------------------


def sections(level: str) -> dict[str, str]:
    """Title -> text of the sections of the runbook."""
    parts = re.split(rf"^{level} (.+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_an_entry_in_the_runbook_and_a_drill_that_makes_it_fire() -> None:
    entries = {title: text for title, text in sections("###").items() if "`" not in title}
    assert set(entries) == set(alerts())
    for name, text in entries.items():
        drill = re.search(r"Drill: `(tests/[\w/]+\.py)::(\w+)`\.$", text, re.MULTILINE)
        assert drill, f"{name} has no drill"
        body = (TREE / drill[1]).read_text().partition(f"def {drill[2]}(")[2].partition("\ndef ")[0]
        assert f'"{name}"' in body, f"{drill[2]} does not act {name} out"
        codes = re.search(r"^Codes: (.+)\. Drill", text, re.MULTILINE)
        assert codes, f"{name} names no codes"
        shown = set(re.findall(r"CKM\d{4}", codes[1]))
        logged = set(re.findall(r'"(CKM\d{4})"', body))
        assert shown & logged or codes[1] == "none", f"{drill[2]} shows none of {shown}"


# ---- the dashboard ------------------------------------------------------------------


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """What of a document is not in what its types made of it."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key not in kept and value is not None:
                yield f"{place}/{key}"
            elif value is not None:
                yield from lost(value, kept[key], f"{place}/{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for at, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}/{at}")
    elif given != kept:
        yield place


def through_the_types(document: Any) -> Any:
    """A dashboard as Grafana's published types read and write it."""
    plugins.register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(document)))


def test_the_dashboard_is_one_by_grafanas_types() -> None:
    document = json.loads(DASHBOARD.read_text())
    assert not list(lost(document, through_the_types(document)))
    document["panels"][0]["gridPos"]["hight"] = 4
    document["panels"][1]["targets"][0]["query"] = "up"
    assert set(lost(document, through_the_types(document))) == {
        "/panels/0/gridPos/hight",
        "/panels/1/targets/0/query",
    }


def test_the_panels_are_where_they_fit_and_have_their_own_ids() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["description"], panel["title"]


def test_the_dashboard_names_real_metrics() -> None:
    assert unknown_metrics(DASHBOARD.read_text()) == set()
