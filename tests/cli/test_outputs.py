"""Where the output of a command goes: a pipe that closes, a disk that is full, nowhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from called import call
from driven import PYTHON_PATH


def test_a_reader_that_closes_the_pipe_is_no_error(made: Path) -> None:
    command = f"{sys.executable} -m ckptmgr.cli show {made} --tensors | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("id ")
    assert "Traceback" not in done.stderr


def with_output_to(redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "ckptmgr.cli", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *program],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_an_output_that_is_full_is_said(made: Path, how: list[str]) -> None:
    done = with_output_to(">/dev/full", "ls", made, *how)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first == "ckptmgr: standard output: can not be written: No space left on device"
    assert second.startswith("hint: ")


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_an_output_that_is_closed_gets_nothing(made: Path, how: list[str]) -> None:
    done = with_output_to(">&-", "ls", made, *how)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_error_output_leaves_the_status(tmp_path: Path) -> None:
    done = with_output_to(">&- 2>&-", "ls", tmp_path / "nothing")
    assert done.returncode == 4


def test_a_hold_whose_id_nobody_was_told_is_none(made: Path) -> None:
    """Whoever asks again would have two."""
    assert with_output_to(">/dev/full", "hold", made, "2").returncode == 1
    assert not [path for path in (made / "holds").rglob("*") if path.is_file()]


def test_a_report_needs_a_name(made: Path) -> None:
    found = call("report", made, "--to", "/")
    assert (found.status, found.err.splitlines()[0]) == (2, "ckptmgr: /: is a directory")
