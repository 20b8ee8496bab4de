"""The report: one page that loads nothing, tells no secret, and tells the truth."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from called import call
from ckptmgr.goodput import Goodput, account
from ckptmgr.plots import POINTS_MAX, Dot, Line, Mark, duration, plot, ticks
from ckptmgr.report import STEPS_SHOWN_MAX, Job, name_of, page, plain
from ckptmgr.repository.catalog import StepEntry
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.history import Attempt, History
from ckptmgr.types import Reach, StepId, StepState
from knowing.jobs import trained

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The page as a reader sees it: tables, text, and what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A job that was killed once, its store below a home directory, and its report."""
    home = tmp_path_factory.mktemp("home")
    runtime = Path(f"/dev/shm/ckptmgr-test-{os.getpid()}-report")
    runtime.mkdir(mode=0o700)
    store = home / "researcher/data/run7"
    try:
        trained(runtime, f"file://{store}", 5, saved=(2, 3))
        trained(runtime, f"file://{store}", 4, saved=(5, 6), kill=False)
    finally:
        shutil.rmtree(runtime)
    target = home / "report.html"
    found = call("report", store, "--to", target, "--json")
    assert found.status == 0, found
    return store, target, found.document


def test_the_numbers_are_those_of_ls(made: tuple[Path, Path, Any]) -> None:
    store, target, document = made
    rows = call("ls", store, "--json").document
    (_, *shown) = Page(target.read_text()).tables[-1]
    assert [cells[0] for cells in shown] == [row["id"] for row in rows]
    assert [cells[1] for cells in shown] == [row["state"] for row in rows]
    assert [cells[5] for cells in shown] == [
        f"{row['ranks_present']}/{row['world']}" for row in rows
    ]
    assert all("attempt=" in cells[6] for cells in shown)
    assert document["steps"] == len(rows) == 4


def test_the_restart_is_told_exactly(made: tuple[Path, Path, Any]) -> None:
    _, target, document = made
    (restart,) = document["goodput"]["restarts"]
    assert (restart["resumed_from"], restart["reached"]) == ("1.3", "1.5")
    assert (restart["lost_steps"], restart["exact"]) == (2, True)
    (_, row) = Page(target.read_text()).tables[0]
    assert row[0] == "2"
    assert row[2:5] == ["1.3", "1.5", "2"]
    assert f"{document['goodput']['ettr']:.1%}" in Page(target.read_text()).text


def test_nothing_is_loaded_and_nothing_runs(made: tuple[Path, Path, Any]) -> None:
    text = made[1].read_text()
    found = Page(text)
    assert not found.open, "every element is closed"
    tags = {tag for tag, _, _ in found.attributes}
    assert not tags & {"script", "img", "link", "iframe", "object", "image", "use", "a"}
    assert not [one for one in found.attributes if one[1] in ("src", "href", "srcset", "action")]
    assert not [one for one in found.attributes if one[1].startswith("on")]
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert "default-src 'none'" in text


def test_no_directory_of_this_host_is_told(made: tuple[Path, Path, Any]) -> None:
    store, target, _ = made
    text = target.read_text()
    assert "file://…/run7" in text
    for part in store.parts[1:-1]:
        assert f"/{part}" not in text
    assert os.path.expanduser("~") + "/" not in text


def test_a_report_goes_only_where_it_can_be_written(made: tuple[Path, Path, Any]) -> None:
    store, target, _ = made
    found = call("report", store, "--to", target.parent / "nowhere/report.html")
    assert (found.status, found.out) == (2, "")
    assert "hint: Give --to" in found.err
    assert call("report", target.parent / "nothing").status == 4


@pytest.mark.timeout(240)
def test_a_browser_shows_it_and_asks_nobody(made: tuple[Path, Path, Any], tmp_path: Path) -> None:
    """Headless Chromium, with a log of every request that it would make for the page."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("NEEDS chromium (apt install chromium): no browser looks at it in this run")
    log, picture = tmp_path / "net.json", tmp_path / "page.png"
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=400,900"]
    arguments += ["--disable-background-networking", "--no-first-run", "--disable-sync"]
    arguments += [f"--user-data-dir={tmp_path}/profile", f"--log-net-log={log}"]
    arguments += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={picture}"]
    done = subprocess.run(
        [browser, *arguments, "--enable-logging=stderr", f"file://{made[1]}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert picture.stat().st_size > 10_000, done.stderr
    assert "Content Security Policy" not in done.stderr, "the page breaks its own policy"
    asked = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
    ours = {url for url in asked if url.startswith("file:")}
    assert ours <= {f"file://{made[1]}"}
    strangers = {url for url in asked - ours if "google" not in url and "chrome" not in url}
    assert not strangers


# ---- pure -------------------------------------------------------------------


def job_of(entries: list[StepEntry], attempts: list[Attempt], rows: list[Any]) -> Job:
    goodput: Goodput = account(attempts, {}, 0.0, 1e6)
    return Job("s3://…/run", rows, History(tuple(attempts), tuple(entries)), goodput, 1e6)


def row_of(step: int, **more: Any) -> dict[str, Any]:
    row = {"id": f"1.{step}", "state": "committed", "sealed_at": 1e6, "raw_bytes": 1}
    row |= {"stored_bytes": 1, "ranks_present": 1, "world": 1, "tags": {}, "why": "", "damage": ""}
    return row | more


def test_hostile_tags_and_reasons_are_text() -> None:
    evil = "<script>alert(1)</script>"
    why = "StoreFullError: /home/alice/secret plans/run/pack: no space"
    rows = [row_of(1, tags={"a": evil}), row_of(2, state="aborted", why=why)]
    text = page(job_of([], [], rows))
    assert "<script" not in text
    assert "alice" not in text
    assert Page(text).tables[-1][1][6] == f"a={plain(evil)}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/a/b: gone", "…/b: gone"),
        ("can't read /root/x.", "can't read …/x."),
        ("~/data/run", "…/run"),
        ("1/2 of 3", "1/2 of 3"),
        ("no path", "no path"),
    ],
)
def test_of_a_path_its_last_part_is_left(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_job_is_named_by_the_last_part_of_its_url() -> None:
    assert name_of("file:///home/alice/run7") == "file://…/run7"
    assert name_of("s3://bucket/team/run7/") == "s3://…/run7"
    assert name_of("s3://bucket/run7?endpoint=https://minio.corp.internal:9000") == "s3://…/run7"


def test_a_job_of_many_steps_is_a_page_of_bounded_size() -> None:
    entries = [
        StepEntry(
            StepId(1, step),
            StepState.COMMITTED,
            Decision(
                *("COMMIT", 1, step),
                raw_bytes=1 << 30,
                sealed_at=1e6 + step,
                stall_seconds=0.1,
                written_at=1e6 + step + 2,
            ),
        )
        for step in range(10_000, 0, -1)
    ]
    attempts = [Attempt(1, 1e6, 1, StepId(0, 0), Reach(1, 1, 1e6, 10_000, 1.01e6))]
    text = page(job_of(entries, attempts, [row_of(e.id.step) for e in entries]))
    assert len(text) < 2_000_000
    assert f"{10_000 - STEPS_SHOWN_MAX:,} older ones are not listed" in text
    assert text.count("<circle") <= 4 * POINTS_MAX


def test_a_job_without_a_commit_is_a_page_too() -> None:
    text = page(job_of([], [Attempt(1, 1e6, 1)], []))
    assert text.count("Nothing is known yet.") >= 4


def test_a_plot_is_xml_inside_its_frame() -> None:
    dots = [Dot(100.0 + n, n * 3.7, "ok", f"<{n}>") for n in range(20)]
    line = Line(tuple((dot.at, dot.value) for dot in dots), "a & b")
    root = ET.fromstring(
        plot("t", [line], dots, [Mark(90.0, "m")], shown=lambda v: f"{v:g}", height=170)
    )
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    circles = [one for one in root.iter() if one.tag == "circle"]
    assert len(circles) == 20
    for one in circles:
        assert 0 <= float(one.attrib["cx"]) <= width
        assert 0 <= float(one.attrib["cy"]) <= height
    heights = [float(one.attrib["cy"]) for one in circles]
    assert heights == sorted(heights, reverse=True), "more is higher"


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 100) == [0, 50, 100]
    assert ticks(0, 7) == [0, 2, 4, 6]
    assert ticks(3, 3) == [3]
    assert json.dumps(ticks(0, 0.4)) == "[0.0, 0.1, 0.2, 0.30000000000000004, 0.4]"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.0123, "12.3 ms"), (5, "5 s"), (90, "1.5 min"), (7200, "2.0 h"), (2e5, "2.3 d")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
