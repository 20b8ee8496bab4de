"""Another user of the host can neither look at nor touch what is ours, and can not be us."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import open_private_dir
from ckptmgr.errors import ControlProtocolError, DaemonUnreachableError, HostMemoryError
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.control import check_peer
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.inbox import BUFFERS, INBOX, SOCKET, prepare
from ckptmgr.staging.launch import connect
from ckptmgr.types import PAGE_BYTES, Binding
from driven import Daemon, Rank
from processes import needs_root

NOBODY = 65534

AS_NOBODY = """
import errno, json, os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)

def attempt(work):
    try:
        return work() or "done"
    except OSError as error:
        return errno.errorcode[error.errno]

def ask(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(path)
        sock.sendall(bytes.fromhex(sys.argv[2]))
        return "answered" if sock.recv(4096) else "closed"

results = {}
for path in json.loads(sys.argv[1]):
    if os.path.basename(path) == "control.sock":
        results[f"ask {path}"] = attempt(lambda: ask(path))
        continue
    ways = {"read": os.O_RDONLY, "write": os.O_RDWR, "cut": os.O_WRONLY | os.O_TRUNC}
    for name, flags in ways.items():
        results[f"{name} {path}"] = attempt(lambda: os.close(os.open(path, flags)))
    results[f"list {path}"] = attempt(lambda: os.listdir(path) and "listed")
    results[f"add to {path}"] = attempt(lambda: os.mkdir(path + "/mine"))
    results[f"delete {path}"] = attempt(lambda: os.unlink(path))
    results[f"rename {path}"] = attempt(lambda: os.rename(path, path + ".mine"))
print(json.dumps(results))
"""

STATUS_FRAME = b"\x81\xa2op\xa6status"


def as_nobody(paths: list[Path]) -> dict[str, str]:
    """What user 65534 gets for everything it could try on `paths`."""
    needs_root()
    frame = struct.pack("<I", len(STATUS_FRAME)) + STATUS_FRAME
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, json.dumps([str(path) for path in paths]), frame.hex()],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def everything_in(runtime: Path) -> list[Path]:
    return [runtime, *sorted(runtime.rglob("*"))]


@pytest.mark.root
def test_another_user_gets_at_nothing(runtime: Path, store_url: str) -> None:
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        rank.save(1)
        rank.wait(1)
        paths = everything_in(runtime)
        names = {path.name for path in paths}
        assert {SOCKET, BUFFERS, INBOX, rank.buffer.path.name} <= names
        found = as_nobody(paths)
        assert len(found) > 30
        assert set(found.values()) <= {"EACCES", "EPERM", "EISDIR"}, found


@pytest.mark.root
def test_files_and_socket_are_closed_even_if_the_directories_are_opened(
    runtime: Path, store_url: str
) -> None:
    """Two locks, not one: who may pass through the directories still may not open what is there."""
    with Daemon(runtime), Rank(runtime, store_url) as rank:
        rank.save(1)
        for path in everything_in(runtime):
            if path.is_dir():
                path.chmod(0o711)
        found = as_nobody([runtime / SOCKET, runtime / "daemon.lock", rank.buffer.path])
        assert f"ask {runtime / SOCKET}" in found
        assert f"read {rank.buffer.path}" in found
        assert set(found.values()) <= {"EACCES", "EPERM", "ENOTDIR"}, found


@pytest.mark.root
def test_the_daemon_does_not_answer_another_user(runtime: Path) -> None:
    """The last lock: the credentials of the peer, whatever the modes are."""
    with Daemon(runtime) as daemon:
        runtime.chmod(0o777)
        (runtime / SOCKET).chmod(0o777)
        (answer,) = as_nobody([runtime / SOCKET]).values()
        assert answer in ("closed", "ECONNRESET", "EPIPE")
        assert "65534" in daemon.await_event("connection_refused")["why"]
        runtime.chmod(0o700)
        assert daemon.status()["pid"] == daemon.process.pid


@pytest.mark.root
def test_a_rank_does_not_talk_to_another_users_daemon(runtime: Path) -> None:
    """Somebody else listens where our daemon should: nothing is sent to him."""
    needs_root()
    script = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
peer, _ = listener.accept()
print(len(peer.recv(4096)))
"""
    runtime.chmod(0o777)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(runtime / SOCKET)], stdout=subprocess.PIPE, text=True
    ) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "listening\n"
        with pytest.raises(ControlProtocolError, match="65534"):
            connect(runtime)
        assert listener.stdout.readline() == "0\n"


def test_a_peer_of_this_user_is_known_by_its_pid() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert check_peer(ours) == os.getpid()


@pytest.mark.root
@pytest.mark.parametrize("name", ["", BUFFERS, INBOX])
@pytest.mark.parametrize("what", ["of another user", "a link", "open to the group", "a file"])
def test_a_directory_that_somebody_else_prepared_is_refused(
    tmp_path: Path, name: str, what: str
) -> None:
    needs_root()
    runtime = tmp_path / "runtime"
    if name:
        open_private_dir(runtime)
    path = runtime / name
    trap = tmp_path / "trap"
    trap.mkdir(mode=0o700)
    if what == "a link":
        path.symlink_to(trap)
    elif what == "a file":
        path.write_text("")
    else:
        path.mkdir(mode=0o700)
        path.chmod(0o770 if what == "open to the group" else 0o700)
        os.chown(path, NOBODY if what == "of another user" else 0, -1)
    with pytest.raises(HostMemoryError, match="is not a directory of this user") as refused:
        prepare(runtime)
    assert str(path).rstrip("/") in str(refused.value)
    assert list(trap.iterdir()) == []


@pytest.mark.root
def test_a_daemon_does_not_start_in_a_directory_of_another_user(runtime: Path) -> None:
    needs_root()
    os.chown(runtime, NOBODY, -1)
    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr.cli", "daemon"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is not a directory of this user" in done.stderr
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_link_in_place_of_the_socket_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    """Left by a dead daemon or put there: it is removed, and what it points at is not touched."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    prepare(runtime)
    (runtime / SOCKET).symlink_to(victim)
    with Daemon(runtime) as daemon:
        assert daemon.status()["pid"] == daemon.process.pid
        assert (runtime / SOCKET).is_socket()
    assert victim.read_text() == "precious"


def test_a_link_in_place_of_the_lock_is_not_followed(runtime: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    prepare(runtime)
    (runtime / "daemon.lock").symlink_to(victim)
    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr.cli", "daemon"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert victim.read_text() == "precious"


@pytest.mark.root
def test_a_buffer_that_is_a_link_or_of_another_user_is_refused(runtime: Path) -> None:
    needs_root()
    prepare(runtime)
    directory = runtime / BUFFERS
    with HostBuffer.create(
        directory, Binding("memory://x", 0, 1), Capacity(2, PAGE_BYTES, PAGE_BYTES)
    ) as made:
        path = made.path
    link = directory / f"{'0' * 32}.buf"
    link.symlink_to(path)
    with pytest.raises(HostMemoryError, match="can not be opened"):
        HostBuffer.open(link)
    os.chown(path, NOBODY, -1)
    with pytest.raises(HostMemoryError, match="belongs to another user"):
        HostBuffer.open(path)
    with Daemon(runtime) as daemon:
        daemon.await_event("buffer_refused", 2)
        assert {e["path"] for e in daemon.events("buffer_refused")} == {path.name, link.name}
        assert path.exists(), "a buffer that is not ours was deleted"


def test_no_daemon_is_told_as_such(runtime: Path) -> None:
    with pytest.raises(DaemonUnreachableError):
        connect(runtime)
    anything: Any = runtime
    assert anything.exists()
