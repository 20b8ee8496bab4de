"""Every event is documented with its fields, and a log is for machines or for people."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.daemon import log
from ckptmgr.daemon.codes import CODES
from driven import PYTHON_PATH, TREE, Daemon, until

ROW = re.compile(r"^\| (CKM\d{4}) \| `(\w+)` \| (\w+) \| (.*?) \| .+ \|$", re.MULTILINE)
LEVELS = {"event": "info", "warning": "warning", "fault": "error"}
HEADING = re.compile(r"^### (CKM\d{4}) `(\w+)`$", re.MULTILINE)
Found = dict[str, tuple[str, set[str]]]


def documented() -> Found:
    """Event -> level and fields, as docs/events.md has them."""
    text = (TREE / "docs/events.md").read_text()
    return {
        name: (level, set(re.findall(r"`(\w+)`", fields)))
        for _, name, level, fields in ROW.findall(text)
    }


def emitted() -> Found:
    """Event -> level and fields, as the source has them."""
    found: Found = {}
    for path in sorted((TREE / "ckptmgr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name != "log.py":
                for name, level, fields in called(node, path):
                    old = found.setdefault(name, (level, set()))
                    assert old[0] == level, f"{name} has two levels"
                    old[1].update(fields)
    return found


def called(node: ast.Call, path: Path) -> Iterator[tuple[str, str, set[str]]]:
    kind = getattr(node.func, "id", "")
    if kind not in LEVELS:
        return
    fields = {str(keyword.arg) for keyword in node.keywords}
    if kind == "fault":
        yield "fault", "error", fields | {"why"}
        return
    name = node.args[0]
    assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: its name must be written out"
    yield str(name.value), LEVELS[kind], fields


def test_every_event_is_documented_and_every_documented_one_exists() -> None:
    assert emitted() == documented()


def test_every_event_has_one_code_for_ever() -> None:
    rows = ROW.findall((TREE / "docs/events.md").read_text())
    shown = {name: (code, level) for code, name, level, _ in rows}
    assert shown == CODES
    codes = [code for code, _ in CODES.values()]
    assert len(set(codes)) == len(codes), "a code is used twice"
    assert {name: level for name, (_, level) in CODES.items()} == {
        name: level for name, (level, _) in emitted().items()
    }


def test_the_runbook_says_what_to_do_about_every_warning_and_error() -> None:
    text = (TREE / "docs/runbook.md").read_text()
    entries = HEADING.findall(text)
    assert len(entries) == text.count("\n### CKM")
    assert {(CODES[name][0], name) for _, name in entries} == set(entries)
    wanted = {name for name, (_, level) in CODES.items() if level != "info"}
    assert wanted <= {name for _, name in entries}
    known = {code for code, _ in CODES.values()}
    assert set(re.findall(r"CKM\d{4}", text)) <= known
    assert [code for code, _ in entries] == sorted(code for code, _ in entries)


# ---- how they look ----------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def restored_logging() -> Iterator[None]:
    loggers = [logging.getLogger("ckptmgr"), logging.getLogger("asyncio")]
    kept = [list(one.handlers) for one in loggers]
    yield
    for one, handlers in zip(loggers, kept, strict=True):
        one.handlers[:] = handlers
    loggers[0].propagate = True


def lines_of(stream: io.StringIO) -> list[str]:
    log.configure(stream)
    log.event("started", pid=7, runtime="/dev/shm/a b")
    log.warning("given_up", step="1.2", why='a "quoted"\nsecond line')
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.fault(error)
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("restored_logging")
def test_off_a_terminal_every_event_is_one_json_line() -> None:
    found: list[dict[str, Any]] = [json.loads(line) for line in lines_of(io.StringIO())]
    assert all(isinstance(line.pop("at"), float) for line in found)
    assert found[0] == {
        "level": "info",
        "event": "started",
        "code": "CKM1001",
        "pid": 7,
        "runtime": "/dev/shm/a b",
    }
    assert found[1]["why"] == 'a "quoted"\nsecond line'
    assert found[1]["level"] == "warning"
    assert (found[2]["event"], found[2]["why"]) == ("fault", "ValueError('broken')")
    assert "Traceback" in found[2]["traceback"]
    assert found[3]["event"] == "fault"
    assert found[3]["why"] == "Task exception was never retrieved"


@pytest.mark.usefixtures("restored_logging")
def test_on_a_terminal_an_event_is_a_line_for_people() -> None:
    lines = lines_of(Terminal())
    assert re.fullmatch(r"\d\d:\d\d:\d\d started {12}pid=7 runtime=/dev/shm/a b", lines[0])
    assert not any(line.startswith("{") for line in lines)
    assert "Traceback (most recent call last):" in lines


def test_the_daemon_writes_json_into_a_pipe(runtime: Path) -> None:
    with Daemon(runtime) as daemon:
        daemon.end()
        lines = daemon.log.read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["started", "draining", "drained", "ended"]


def test_the_daemon_writes_for_people_on_a_terminal(runtime: Path) -> None:
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptmgr.cli", "daemon", "--idle-seconds=0.1"],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stderr=slave,
    )
    os.close(slave)
    text = ""

    def ended() -> bool:
        nonlocal text
        text += os.read(master, 4096).decode()
        return " ended " in text

    until(ended, "the daemon ends")
    assert process.wait() == 0
    os.close(master)
    lines = text.splitlines()
    assert re.match(rf"\d\d:\d\d:\d\d started +pid={process.pid} runtime={runtime} ", lines[0])
    assert "{" not in text
