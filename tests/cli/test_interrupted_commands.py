"""Ctrl-C ends a command, cleaned up and soon, whatever hangs; a second one at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from driven import files_below, until
from processes import many_descriptors
from rigged import Rig


@pytest.fixture
def rig(made: Path, tmp_path: Path) -> Rig:
    found = Rig(tmp_path / "rig")
    shutil.copytree(made, found.path)
    return found


def start_restore(
    rig: Rig,
    to: Path,
    *,
    ignored: bool = False,
    form: str = "safetensors",
    keep: Sequence[int] = (),
) -> subprocess.Popen[str]:
    """A restore in the state of signals that a shell gives its foreground jobs, wherever the test
    itself runs; with `ignored`, in that of its background jobs.
    """
    how = "--ignore-signal=INT" if ignored else "--default-signal=INT"
    restore = (sys.executable, "-m", "ckptmgr.cli", "restore", rig.url, f"--format={form}")
    return subprocess.Popen(
        ["env", how, *restore, "--to", to],
        env={**os.environ, "PYTHONPATH": rig.python_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=keep,
    )


def check_nothing_left(process: subprocess.Popen[str], rig: Rig, status: int = 130) -> None:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", "")
    assert [path.name for path in rig.path.parent.parent.iterdir()] == ["rig"]


def holds(rig: Rig) -> list[Path]:
    return [path for path in files_below(rig.path / "holds") if path.name.startswith("reader")]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_an_interrupt_leaves_no_half_written_directory(
    rig: Rig, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    rig.obey(("get", "data/", "hold"))
    process = start_restore(rig, tmp_path / "out")
    until(lambda: rig.asked("get", "data/"), "it reads")
    process.send_signal(number)
    check_nothing_left(process, rig, status)
    assert not holds(rig)


@pytest.mark.parametrize("where", ["get data/", "get commit/", "list", "delete holds/"])
def test_an_interrupt_ends_a_command_whose_threads_hang(
    rig: Rig, tmp_path: Path, where: str
) -> None:
    """Neither cancelling nor leaving the interpreter would end them."""
    operation, _, prefix = where.partition(" ")
    rules = [(operation, prefix, "hang")]
    if operation == "delete":  # which is asked for when the interrupt has come
        rules.append(("get", "data/", "hold"))
    rig.obey(*rules)
    process = start_restore(rig, tmp_path / "out")
    until(lambda: rig.asked(rules[-1][0], rules[-1][1]), "it hangs")
    process.send_signal(signal.SIGINT)
    check_nothing_left(process, rig)


def test_a_second_interrupt_does_not_wait(rig: Rig, tmp_path: Path) -> None:
    rig.obey(("get", "data/", "hold"), ("delete", "holds/", "hold"))
    process = start_restore(rig, tmp_path / "out")
    until(lambda: rig.asked("get", "data/"), "it reads")
    process.send_signal(signal.SIGINT)
    until(lambda: rig.asked("delete", "holds/"), "it cleans up, which hangs")
    process.send_signal(signal.SIGINT)
    check_nothing_left(process, rig)
    assert holds(rig), "the first interrupt has released it"


def test_an_interrupt_ends_the_export_too(rig: Rig, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    process = start_restore(rig, tmp_path / "out", form="torch")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    child = until(lambda: children.read_text().split(), "torch is being imported")[0]
    process.send_signal(signal.SIGINT)
    check_nothing_left(process, rig)
    assert not Path(f"/proc/{child}").exists()


def test_an_interrupt_is_heard_past_descriptor_1024(rig: Rig, tmp_path: Path) -> None:
    rig.obey(("get", "data/", "hold"))
    with many_descriptors() as opened:
        process = start_restore(rig, tmp_path / "out", keep=range(3, opened[-1] + 1))
    until(lambda: rig.asked("get", "data/"), "it reads")
    process.send_signal(signal.SIGINT)
    check_nothing_left(process, rig)


def test_an_ignored_interrupt_stays_ignored(rig: Rig, tmp_path: Path) -> None:
    """A script's background job is not ended by the Ctrl-C that ends the script."""
    rig.obey(("get", "data/", "hold"))
    process = start_restore(rig, tmp_path / "out", ignored=True)
    until(lambda: rig.asked("get", "data/"), "it reads")
    process.send_signal(signal.SIGINT)
    rig.obey()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "out").is_dir()
