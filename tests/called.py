"""The command line as people and scripts use it: a process, its two outputs and its status."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ckptmgr import cli
from ckptmgr.types import Outcome
from driven import PYTHON_PATH, Daemon, Rank
from nursery import nursery


@dataclass(frozen=True, slots=True)
class Called:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


def warm() -> None:
    """Import what the parser imports only when it parses."""
    typer.main.get_command(cli.app).make_context("ckptmgr", ["status"])


def call(*arguments: object, runtime: Path | None = None, **environment: str) -> Called:
    """Run `ckptmgr ARGUMENTS` off a terminal."""
    given = {"CKPTMGR_RUNTIME_DIR": str(runtime or "/nonexistent/ckptmgr"), **environment}
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH, **given}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = ["ckptmgr.cli", *map(str, arguments)]
        with nursery().start(program, env=environment, stdout=out, stderr=err) as process:
            status = process.wait()
        out.seek(0)
        err.seek(0)
        return Called(status, out.read(), err.read())


def check_error(found: Called, status: int, *words: str) -> None:
    """One line, a hint, nothing on standard output, and no traceback."""
    assert found.status == status, found
    assert found.out == ""
    lines = found.err.splitlines()
    assert lines[0].startswith("ckptmgr: "), found.err
    assert len(lines) <= 2, found.err
    assert all(line.startswith("hint: ") for line in lines[1:]), found.err
    for word in words:
        assert word in found.err
    assert "Traceback" not in found.err


def make_store(directory: Path, runtime: Path) -> Path:
    """A store of one job: steps 1 to 3 of attempt 1, and step 2 of attempt 2, all committed."""
    store = directory / "store"
    with Daemon(runtime):
        for attempt, steps in ((1, (1, 2, 3)), (2, (2,))):
            with Rank(runtime, f"file://{store}", keep=9) as rank:
                assert rank.attempt == attempt
                rank.restore()
                for step in steps:
                    rank.save(step)
                    assert rank.wait(step).outcome == Outcome.COMMITTED
    shutil.rmtree(runtime / "buffers")
    return store


def spoil(store: Path, attempt: int, step: int, kind: str = "data") -> Path:
    """Change one byte in the middle of an object of a step."""
    place = store / f"{kind}/{attempt:08d}/{step:012d}"
    path = place if place.is_file() else next(p for p in place.rglob("*") if p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path
