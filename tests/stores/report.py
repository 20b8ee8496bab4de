"""A pytest plugin that writes what `make stores` ran into docs/stores.md.

    pytest -p stores.report --stores-table docs/stores.md -m stores

One line per store: what passed, failed and was skipped, with the reasons. It replaces the text
between the two marks, and nothing else of the page.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BEGIN, END = "<!-- written by make stores -->", "<!-- end of what make stores wrote -->"
HEAD = """\
| store | tests | passed | failed | skipped, and why |
|---|---|---|---|---|
"""


@dataclass
class Row:
    """What was run on one store."""

    files: set[str] = field(default_factory=set)
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def line(self, place: str) -> str:
        files = ", ".join(f"`{name}`" for name in sorted(self.files))
        skipped = "; ".join(f"{count}: {why}" for why, count in sorted(self.reasons.items()))
        passed, failed = self.outcomes["passed"], self.outcomes["failed"]
        return f"| {place} | {files} | {passed} | {failed} | {skipped or '0'} |\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stores-table", type=Path, help="the page that gets the table of stores")


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--stores-table")
    if page is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(page, Path(config.rootpath)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tell the process that writes the table where a test belongs."""
    mark = item.get_closest_marker("stores")
    if mark is not None:
        place = mark.kwargs.get("place", item.path.parent.name)
        item.user_properties.append(("place", place))


class Table:
    """Counts the outcomes of tests, store by store."""

    def __init__(self, page: Path, root: Path) -> None:
        self.page = page
        self.root = root
        self.rows: defaultdict[str, Row] = defaultdict(Row)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        place = dict(report.user_properties).get("place")
        decides = report.when == "call" or report.outcome != "passed"
        if place is None or not decides:
            return
        row = self.rows[str(place)]
        row.files.add(report.nodeid.partition("::")[0])
        row.outcomes[report.outcome] += 1
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            row.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_sessionfinish(self) -> None:
        before, _, rest = self.page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        lines = "".join(row.line(place) for place, row in sorted(self.rows.items()))
        body = f"{BEGIN}\n{self.origin()}\n\n{HEAD}{lines}{END}"
        self.page.write_text(before + body + after)

    def origin(self) -> str:
        """When, from what, and on what."""
        described = ["git", "-C", str(self.root), "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(described, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or "unknown"
        kernel = platform.release().partition("-")[0]
        machine = f"{os.cpu_count()} cores, Linux {kernel}, Python {platform.python_version()}"
        return f"{time.strftime('%d %B %Y', time.gmtime())}, commit {commit}, {machine}."
