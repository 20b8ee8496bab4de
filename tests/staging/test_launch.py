"""A daemon on demand: detached, one for everybody, and with its last words if it dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.errors import DaemonUnreachableError, HostMemoryError
from ckptmgr.staging import launch
from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.inbox import LOG, OLD_LOG, SOCKET, prepare
from ckptmgr.staging.launch import connect, connect_or_start
from driven import PYTHON_PATH, events_of, until
from processes import end, owners_of

pytestmark = pytest.mark.usefixtures("quick_end", "real_daemons")


@pytest.fixture
def quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is left over ends by itself, soon."""
    monkeypatch.setenv("CKPTMGR_IDLE_SECONDS", "30")


def status(runtime: Path) -> dict[str, Any]:
    with connect(runtime) as client:
        return client.ask(Status(), Stated).state


def test_a_daemon_is_started_once_and_then_used(runtime: Path) -> None:
    with connect_or_start(runtime) as client:
        pid = client.ask(Status(), Stated).state["pid"]
    with connect_or_start(runtime) as client:
        assert client.ask(Status(), Stated).state["pid"] == pid
    assert os.getsid(pid) == pid != os.getsid(0)  # signals to the job do not reach it
    assert os.readlink(f"/proc/{pid}/cwd") == "/"  # it keeps no directory of the job busy


def test_training_comes_first_where_cores_are_short(runtime: Path) -> None:
    """By the process, and by its session where the kernel weighs those against each other."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    with connect_or_start(runtime) as client:
        pid = client.ask(Status(), Stated).state["pid"]
    # Of the thread that starts all others that work; a library may have started one before.
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(ours + 5, 19)
    session = Path(f"/proc/{pid}/autogroup")
    if session.exists():
        assert session.read_text().split("nice")[-1].strip() in ("", "5")


def test_an_auto_started_daemon_ends_when_idle(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_IDLE_SECONDS", "0.2")
    connect_or_start(runtime).close()
    until(lambda: [e for e in events_of(runtime / LOG) if e["event"] == "ended"], "it ends")
    assert [e["event"] for e in events_of(runtime / LOG)] == ["started", "idle", "ended"]
    assert not (runtime / SOCKET).exists()


def test_a_socket_that_a_dead_daemon_left_is_no_daemon(runtime: Path) -> None:
    prepare(runtime)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / SOCKET))
    with pytest.raises(DaemonUnreachableError):
        connect(runtime)
    connect_or_start(runtime).close()
    assert status(runtime)["runtime_dir"] == str(runtime)


def test_a_daemon_that_was_killed_is_replaced(runtime: Path) -> None:
    connect_or_start(runtime).close()
    first = status(runtime)["pid"]
    end(first)  # all of it: while its files are closed, some still listen
    connect_or_start(runtime).close()
    assert status(runtime)["pid"] != first


STARTER = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ckptmgr.staging import launch
from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.launch import connect_or_start
sys.stdin.readline()
with connect_or_start(Path(sys.argv[1])) as client:
    print(client.ask(Status(), Stated).state["pid"])
"""


def test_eight_processes_at_once_get_one_daemon(runtime: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(runtime)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("go\n")
        starter.stdin.flush()
    pids = {starter.communicate()[0].strip() for starter in starters}
    assert len(pids) == 1
    assert [starter.returncode for starter in starters] == [0] * 8
    (pid,) = pids
    until(lambda: owners_of(runtime) == {int(pid)}, "the others give way")
    assert len([e for e in events_of(runtime / LOG) if e["event"] == "started"]) == 1


def test_the_error_has_the_last_words_of_a_daemon_that_died(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTMGR_IDLE_SECONDS", "soon")
    with pytest.raises(DaemonUnreachableError, match="'soon' is not a number") as caught:
        connect_or_start(runtime)
    assert caught.value.subject == str(runtime)
    assert "\n" not in caught.value.message


def test_a_foreign_runtime_directory_starts_nothing(runtime: Path) -> None:
    runtime.chmod(0o755)
    with pytest.raises(HostMemoryError):
        connect_or_start(runtime)
    assert not list(runtime.iterdir())


@pytest.fixture
def small_log(monkeypatch: pytest.MonkeyPatch) -> int:
    """A bound of few bytes, so that no test writes megabytes."""
    monkeypatch.setattr(launch, "LOG_BYTES_MAX", 1000)
    return 1000


def test_a_log_that_has_grown_too_large_is_put_aside(runtime: Path, small_log: int) -> None:
    prepare(runtime)
    (runtime / OLD_LOG).write_text("the one before")
    (runtime / LOG).write_text("x" * small_log)
    os.close(launch.open_log(runtime))
    assert (runtime / OLD_LOG).read_text() == "the one before", "it is not larger than the bound"
    with (runtime / LOG).open("a") as log:
        log.write("\n")
    connect_or_start(runtime).close()
    assert (runtime / OLD_LOG).read_text().startswith("x" * small_log)
    assert [e["event"] for e in events_of(runtime / LOG)] == ["started"]
    assert (runtime / LOG).stat().st_mode & 0o777 == 0o600


def test_links_in_place_of_logs_lead_nowhere(runtime: Path, tmp_path: Path, small_log: int) -> None:
    prepare(runtime)
    victim = tmp_path / "victim"
    victim.write_text("v" * 2 * small_log)
    (runtime / OLD_LOG).symlink_to(victim)
    (runtime / LOG).write_text("x" * 2 * small_log)
    connect_or_start(runtime).close()
    assert (runtime / OLD_LOG).read_text() == "x" * 2 * small_log
    assert not (runtime / OLD_LOG).is_symlink()
    assert victim.read_text() == "v" * 2 * small_log


def test_of_many_who_start_at_once_one_puts_the_log_aside(runtime: Path, small_log: int) -> None:
    """Who comes later must not put aside the new log, and so lose the old one."""
    prepare(runtime)
    (runtime / LOG).write_text("x" * 2 * small_log)
    barrier = threading.Barrier(8)

    def opened(_: int) -> int:
        barrier.wait()
        return launch.open_log(runtime)

    with ThreadPoolExecutor(8) as threads:
        logs = list(threads.map(opened, range(8)))
    for log in logs:
        os.close(log)
    assert (runtime / OLD_LOG).read_text() == "x" * 2 * small_log
    assert (runtime / LOG).read_text() == ""


def test_a_log_that_can_not_be_put_aside_is_written_on(runtime: Path, small_log: int) -> None:
    prepare(runtime)
    (runtime / OLD_LOG).mkdir()
    (runtime / LOG).write_text("x" * 2 * small_log + "\n")
    connect_or_start(runtime).close()
    assert [e["event"] for e in events_of(runtime / LOG)] == ["started"]


def test_a_log_that_is_a_link_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    prepare(runtime)
    (runtime / LOG).symlink_to(tmp_path / "victim")
    with pytest.raises(HostMemoryError, match="log"):
        connect_or_start(runtime)
    assert not (tmp_path / "victim").exists()
