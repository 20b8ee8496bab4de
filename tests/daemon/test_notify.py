"""What the daemon tells a service manager, and takes from it: this test is the service manager.

On a real systemd: tests/systemd.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.daemon.notify import Supervisor
from ckptmgr.errors import DaemonError
from ckptmgr.staging.control import Client
from ckptmgr.staging.inbox import SOCKET, prepare
from ckptmgr.staging.launch import connect
from ckptmgr.types import Outcome
from driven import PATIENCE_SECONDS, Daemon, Rank, until
from processes import end_processes_of
from rigged import Rig
from servers.filesystems import mounted_tmpfs

AS_PID = ("sh", "-c", 'LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$@"', "sh")
"""Only the process itself knows the pid that a service manager would have told it."""


class Manager:
    """A service manager, as far as sd_notify(3) goes: what it was told, and what it keeps."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path)}
        self.lines: list[str] = []
        self.kept: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def listen(self) -> list[str]:
        """All lines so far."""
        self._socket.settimeout(0)
        while True:
            try:
                text, rights, *_ = self._socket.recvmsg(4096, 1024)
            except BlockingIOError:
                return self.lines
            told = text.decode().split("\n")
            name = next((x.partition("=")[2] for x in told if x.startswith("FDNAME=")), "")
            for _, _, packed in rights:
                (self.kept[name],) = array.array("i", packed)
            if told[0] == "FDSTOREREMOVE=1":
                os.close(self.kept.pop(name))
            self.lines += told

    def hears(self, line: str, count: int = 1) -> None:
        until(lambda: self.listen().count(line) >= count, f"{line} in {self.lines}")

    def close(self) -> None:
        self._socket.close()
        for fd in self.kept.values():
            os.close(fd)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    found = Manager(tmp_path / "notify")
    yield found
    found.close()


# ---- told ------------------------------------------------------------------


def test_it_tells_of_its_life(runtime: Path, rig: Rig, manager: Manager) -> None:
    variables = {**manager.environment, "WATCHDOG_USEC": "600000"}
    with Daemon(runtime, environment=rig.environment(**variables), prefix=AS_PID) as daemon:
        manager.hears("READY=1")
        manager.hears("WATCHDOG=1", 3)
        assert "STATUS=0 jobs, 0 trainers, 0 snapshots undecided" in manager.lines
        with Rank(runtime, rig.url):
            manager.hears("STATUS=1 jobs, 1 trainers, 0 snapshots undecided")
        daemon.process.send_signal(signal.SIGSTOP)
        until(lambda: Path(f"/proc/{daemon.process.pid}/wchan").exists(), "it is there")
        manager.listen()
        before = manager.lines.count("WATCHDOG=1")
        time.sleep(1.5)
        assert manager.listen().count("WATCHDOG=1") <= before + 1, "one may have been on its way"
        daemon.process.send_signal(signal.SIGCONT)
        assert "STOPPING=1" not in manager.lines
        assert daemon.end() == 0
        assert manager.listen()[-2:] == ["STOPPING=1", "STATUS=ending"]


def test_a_drain_asks_for_time_as_long_as_it_lasts(
    runtime: Path, rig: Rig, manager: Manager
) -> None:
    rig.obey(("put_new", "data/", "hold"))
    variables = {**manager.environment, "WATCHDOG_USEC": "600000"}
    with Daemon(runtime, environment=rig.environment(**variables), prefix=AS_PID) as daemon:
        with Rank(runtime, rig.url) as rank:
            rank.save(1)
        daemon.process.send_signal(signal.SIGTERM)
        manager.hears("EXTEND_TIMEOUT_USEC=20000000", 4)
        rig.obey()
        assert daemon.process.wait(PATIENCE_SECONDS) == 0
    assert daemon.await_event("drained")["left"] == 0


async def test_a_deaf_daemon_gives_no_sign_of_life(manager: Manager) -> None:
    """The loop turns, but no ticket would be heard: whoever watches must replace it."""
    supervisor = Supervisor(manager.environment["NOTIFY_SOCKET"], 0.03)
    async with supervisor.told(lambda: "well", lambda: False):
        while manager.listen().count("STATUS=well") < 3:
            await asyncio.sleep(0.01)
    assert "WATCHDOG=1" not in manager.lines


async def test_a_manager_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path / "nobody"), 0.03)
    async with supervisor.told(lambda: "well", lambda: True):
        await asyncio.sleep(0.1)
    assert supervisor.keep("0", 0) is False


def test_an_abstract_socket_is_found() -> None:
    name = f"ckptmgr-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0{name}")
        Supervisor(f"@{name}").forget("7")
        assert heard.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=buffer-7"


def test_what_is_another_process_s_is_not_taken() -> None:
    variables = {
        "LISTEN_PID": "1",
        "LISTEN_FDS": "1",
        "LISTEN_FDNAMES": "buffer-7",
        "WATCHDOG_PID": "1",
        "WATCHDOG_USEC": "1000000",
        "HOME": "/",
    }
    supervisor = Supervisor.from_env(variables)
    assert supervisor.buffers() == []
    assert supervisor.socket(Path("/nowhere")) is None
    assert variables == {"HOME": "/"}, "children must not take them for theirs"


# ---- given -----------------------------------------------------------------


@contextlib.contextmanager
def listening_at(runtime: Path) -> Iterator[int]:
    """The socket that a service manager has bound before the daemon was started."""
    prepare(runtime)
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(runtime / SOCKET))
        found.listen()
        yield found.fileno()


def passing(*fds: int, names: str, pythonpath: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Environment and prefix of a daemon that is given descriptors as 3, 4, ..."""
    moved = " ".join(f"{3 + k}<&{fd}" for k, fd in enumerate(fds))
    shell = f'LISTEN_PID=$$ exec "$@" {moved}'
    environment = {
        **os.environ,
        "PYTHONPATH": pythonpath,
        "LISTEN_FDS": str(len(fds)),
        "LISTEN_FDNAMES": names,
    }
    return environment, ("bash", "-c", shell, "bash")


def started(runtime: Path, rig: Rig, *fds: int, names: str, more: dict[str, str]) -> Daemon:
    environment, prefix = passing(*fds, names=names, pythonpath=rig.python_path)
    for fd in fds:
        os.set_inheritable(fd, True)
    return Daemon(runtime, environment={**environment, **more}, prefix=prefix, pass_fds=fds)


def test_a_given_socket_stays_when_the_daemon_ends(runtime: Path, rig: Rig) -> None:
    with listening_at(runtime) as fd:
        inode = os.lstat(runtime / SOCKET).st_ino
        with started(runtime, rig, fd, names="control", more={}) as daemon:
            assert daemon.status()["runtime_dir"] == str(runtime)
            assert daemon.end() == 0
        assert os.lstat(runtime / SOCKET).st_ino == inode


def test_a_socket_that_somebody_else_has_put_there_meanwhile_stays(runtime: Path) -> None:
    with Daemon(runtime) as daemon, socket.socket(socket.AF_UNIX) as other:
        (runtime / SOCKET).unlink()
        other.bind(str(runtime / SOCKET))
        assert daemon.end() == 0
        assert (runtime / SOCKET).exists()


def test_a_socket_elsewhere_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        found.bind(str(tmp_path / "elsewhere"))
        supervisor = Supervisor(given=(("control", os.dup(found.fileno())),))
        with pytest.raises(DaemonError, match="ListenStream"):
            supervisor.socket(tmp_path / SOCKET)


def test_a_death_is_noticed_before_the_daemon_had_time_for_a_connection(
    runtime: Path, rig: Rig, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manager's socket keeps it for the next daemon: its end would not tell of the first."""
    with listening_at(runtime) as fd:
        first = started(runtime, rig, fd, names="control", more=manager.environment)

        def connect_while_it_is_busy(runtime: Path) -> Client:
            first.process.send_signal(signal.SIGSTOP)
            return connect(runtime)

        monkeypatch.setattr("ckptmgr.rank.link.connect", connect_while_it_is_busy)
        with Rank(runtime, rig.url) as rank:
            monkeypatch.undo()
            first.end(signal.SIGKILL)
            with started(runtime, rig, fd, names="control", more=manager.environment):
                until(lambda: rank.link.rejoined, "the trainer has attached again")
                rank.save(1)
                assert rank.wait(1).outcome == Outcome.COMMITTED


# ---- kept ------------------------------------------------------------------


@pytest.fixture
def small(runtime: Path) -> Iterator[Path]:
    """A runtime directory whose file system is too small for any buffer."""
    if os.getuid() != 0:
        pytest.skip("NEEDS ROOT: not checked in this run; run the suite as root to check it")
    with mounted_tmpfs(runtime / "small", "1m") as path:
        path.chmod(0o700)
        yield path
        end_processes_of(path)


def counted(daemon: Daemon, name: str) -> float:
    """A metric without labels."""
    port = daemon.status()["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    (value,) = [line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")]
    return float(value)


@pytest.mark.root
def test_kept_memory_is_the_same_for_the_trainer_and_is_given_back(
    small: Path, rig: Rig, manager: Manager
) -> None:
    """Under its new name, because each daemon has another path to a buffer without one."""
    more = {**manager.environment, "CKPTMGR_MEMORY_SECONDS": "1"}
    rig.obey(("put_new", "data/", "hold"))
    with listening_at(small) as fd:
        with pytest.warns(RuntimeWarning, match="lasts as long as the daemon's unit runs"):
            first = started(small, rig, fd, names="control", more=more)
            rank = Rank(small, rig.url)
        rank.save(1)
        rank.save(2)
        before = rank.buffer.path
        until(lambda: manager.listen() and manager.kept, "the memory is kept")
        first.end(signal.SIGKILL)
        ((name, memory),) = manager.kept.items()
        assert name == f"buffer-{rank.buffer.id}"
        with started(small, rig, fd, memory, names=f"control:{name}", more=more) as second:
            adopted = second.await_event("adopted")
            assert (adopted["snapshots"], adopted["unnamed"]) == (2, True)
            assert counted(second, "ckptmgr_fdstore_recovered_total") == 1
            until(lambda: rank.link.rejoined, "the trainer has attached again")
            rig.obey()
            for step in (1, 2):
                assert rank.wait(step).outcome == Outcome.COMMITTED
            assert not rank.link.lost
            assert rank.buffer.path != before
            assert rank.buffer.is_reachable()
            rank.save(3)
            assert rank.wait(3).outcome == Outcome.COMMITTED
            assert manager.listen().count("FDSTORE=1") == 1, "no second buffer was made"
            rank.close()
            second.await_event("freed")
            until(lambda: manager.listen() and not manager.kept, "the memory is given back")
