"""`restore --to` a place that can not be written: one line, a hint, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from called import Called, call
from driven import PYTHON_PATH
from processes import needs_root

NOBODY = 65534


def check_refused(found: Called, status: int, to: Path, *words: str) -> None:
    assert (found.status, found.out) == (status, ""), found
    first, second = found.err.splitlines()
    assert first.startswith(f"ckptmgr: {to}: can not be written: ")
    assert second.startswith("hint: ")
    for word in words:
        assert word in found.err


def mounted(path: Path, options: str) -> Path:
    needs_root()
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, half of what the step needs."""
    yield mounted(tmp_path / "small", "size=512k")
    subprocess.run(["umount", "-l", tmp_path / "small"], check=True)


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield mounted(tmp_path / "fixed", "ro")
    subprocess.run(["umount", "-l", tmp_path / "fixed"], check=True)


@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_a_file_in_the_way(made: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    to = tmp_path / "file" / below
    check_refused(call("restore", made, "--to", to), 2, to, "Not a directory", "where you may")


@pytest.mark.parametrize("to", ["/proc/nope", "/proc/nope/out", "/sys/nope"])
def test_a_place_where_nothing_can_be_made(made: Path, to: str) -> None:
    check_refused(call("restore", made, "--to", to), 2, Path(to), "where you may write")


def test_a_name_that_is_too_long(made: Path, tmp_path: Path) -> None:
    to = tmp_path / ("x" * 300)
    check_refused(call("restore", made, "--to", to), 2, to, "too long")


@pytest.mark.root
def test_a_read_only_disk(made: Path, read_only_disk: Path) -> None:
    to = read_only_disk / "out"
    check_refused(call("restore", made, "--to", to), 2, to, "Read-only file system")


@pytest.mark.root
@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("below", ["out", "deep/er/out"])
def test_a_full_disk(made: Path, small_disk: Path, below: str, form: str) -> None:
    """Nothing of it is left, not even the parents that were made."""
    to = small_disk / below
    found = call("restore", made, "--to", to, f"--format={form}")
    check_refused(found, 1, to, "No space left on device", "hint: Free space")
    assert list(small_disk.iterdir()) == []


@pytest.mark.root
def test_a_disk_that_is_full_when_torch_writes(made: Path, tmp_path: Path) -> None:
    """Room for the step as it is read, and not for the file that torch makes of it."""
    pytest.importorskip("torch")
    disk = mounted(tmp_path / "small", "size=1600k")
    try:
        found = call("restore", made, "--to", disk / "out", "--format=torch")
        assert (found.status, found.out) == (1, "")
        assert len(found.err.splitlines()) == 2
        assert "hint: Free space" in found.err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_directory_of_another_user(made: Path, tmp_path: Path, mode: int) -> None:
    """Without the capability that lets root pass over rights: he can read this interpreter."""
    needs_root()
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(mode)
    os.chown(closed, NOBODY, NOBODY)
    done = subprocess.run(
        [
            *("setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable),
            *("-m", "ckptmgr.cli", "restore", made, "--to", closed / "out"),
        ],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    found = Called(done.returncode, done.stdout, done.stderr)
    check_refused(found, 2, closed / "out", "Permission denied", "where you may write")
    assert list(closed.iterdir()) == []
