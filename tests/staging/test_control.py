"""Control requests: every broken frame and every wrong peer is refused, and the daemon lives on."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptmgr import errors
from ckptmgr.config import CONTROL_FRAME_BYTES_MAX
from ckptmgr.errors import (
    ControlProtocolError,
    DaemonError,
    DaemonUnreachableError,
    NothingToRestoreError,
    UsageError,
)
from ckptmgr.staging import control
from ckptmgr.staging.control import (
    Client,
    Done,
    Drain,
    Failed,
    Message,
    Release,
    Stated,
    Status,
    failed,
    read_request,
)
from ckptmgr.staging.inbox import SOCKET
from driven import PYTHON_PATH, Daemon
from processes import needs_root


def framed(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def encoded(message: Message) -> bytes:
    return framed(msgspec.msgpack.encode(message))


class OneAnswer:
    """A peer that reads once, sends `answer` and closes (or, with None, never answers)."""

    def __init__(self, path: Path, answer: bytes | None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._answer = answer
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.recv(1 << 16)
            if self._answer is None:
                self._ended.wait()
            else:
                connection.sendall(self._answer)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


Peer = Callable[[bytes | None], Client]


@pytest.fixture
def peer(runtime: Path) -> Iterator[Peer]:
    """A client of a peer that gives one answer."""
    made: list[tuple[OneAnswer, Client]] = []

    def make(answer: bytes | None) -> Client:
        server = OneAnswer(runtime / SOCKET, answer)
        client = Client(runtime / SOCKET)
        made.append((server, client))
        return client

    yield make
    for server, client in made:
        client.close()
        server.close()


# ---- the rank's end ---------------------------------------------------------


def test_no_daemon_is_an_error_that_says_what_to_do(runtime: Path) -> None:
    with pytest.raises(DaemonUnreachableError, match="no daemon answers") as caught:
        Client(runtime / SOCKET)
    assert "ckptmgr daemon" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "error", "what"),
    [
        (framed(b"\xc1"), ControlProtocolError, "malformed reply"),
        (framed(b"\x81\xa2op\xa4nope"), ControlProtocolError, "malformed reply"),
        (framed(b"\x82\xa2op\xa4done\xa4left\xa1\x80"), ControlProtocolError, "malformed reply"),
        (framed(b""), ControlProtocolError, "malformed reply"),
        (struct.pack("<I", CONTROL_FRAME_BYTES_MAX + 1), ControlProtocolError, "frame of"),
        (b"", DaemonUnreachableError, "closed the connection"),
        (b"\x01\x00", DaemonUnreachableError, "closed the connection"),
        (encoded(Done())[:-1], DaemonUnreachableError, "closed the connection"),
        (encoded(Done()), ControlProtocolError, "unexpected reply Done"),
    ],
)
def test_a_broken_reply_is_refused(
    peer: Peer, answer: bytes, error: type[DaemonError], what: str
) -> None:
    with pytest.raises(error, match=what):
        peer(answer).ask(Status(), Stated)


def test_a_daemon_that_is_silent_is_unreachable(peer: Peer) -> None:
    with pytest.raises(DaemonUnreachableError, match="does not answer"):
        peer(None).ask(Status(), Stated, timeout_seconds=0.05)


def test_a_failure_arrives_as_the_error_that_it_is(peer: Peer) -> None:
    error = NothingToRestoreError("no committed step 7", subject="file:///x", hint="Look.")
    with pytest.raises(NothingToRestoreError) as caught:
        peer(encoded(failed(error))).ask(Status(), Stated)
    assert str(caught.value) == str(error)


@pytest.mark.parametrize("name", ["annotations", "ClassVar", "EXIT_OK", "SystemExit", ""])
def test_a_failure_of_no_known_name_is_a_daemon_error(peer: Peer, name: str) -> None:
    with pytest.raises(DaemonError, match="what happened") as caught:
        peer(encoded(Failed(name, "what happened", "", ""))).ask(Status(), Stated)
    assert type(caught.value) is DaemonError


def test_every_error_crosses_the_socket() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    for kind in kinds:
        if issubclass(kind, errors.CkptmgrError):
            reply = failed(kind("what", subject="where", hint="do"))
            with pytest.raises(kind) as caught:
                control._raise(reply)
            assert type(caught.value) is kind
            assert str(caught.value) == "where: what\nhint: do"


# ---- the daemon's end -------------------------------------------------------


def parse(stream: bytes) -> object:
    async def run() -> object:
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        return await read_request(reader)

    return asyncio.run(run())


def test_requests_come_back_as_they_were_sent() -> None:
    assert parse(encoded(Drain(1.5)) + encoded(Status())) == Drain(1.5)
    assert parse(b"") is None
    assert parse(b"\x01") is None
    assert parse(encoded(Drain(1.5))[:-1]) is None


@pytest.mark.parametrize(
    "stream",
    [
        framed(b""),
        framed(b"\xc1"),
        framed(b"\x80"),
        framed(b"\x81\xa2op\xa4nope"),
        framed(b"\x81\xa2op\xa1\x80"),
        framed(b"\x82\xa2op\xa5drain\xafx"),
        framed(b"\x91" * 100_000),
        struct.pack("<I", CONTROL_FRAME_BYTES_MAX + 1),
        b"\xff" * 4,
    ],
)
def test_a_broken_request_is_refused(stream: bytes) -> None:
    with pytest.raises(ControlProtocolError):
        parse(stream)


@given(st.binary(max_size=300))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_no_bytes_do_anything_else_than_parse_or_be_refused(noise: bytes) -> None:
    for stream in (noise, framed(noise)):
        try:
            found = parse(stream)
        except ControlProtocolError:
            continue
        assert found is None or isinstance(found, Message)


@pytest.fixture(scope="module")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    runtime = tmp_path_factory.mktemp("run")
    runtime.chmod(0o700)
    with Daemon(runtime) as daemon:
        yield daemon


def connected(daemon: Daemon) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    found.settimeout(60)
    found.connect(str(daemon.runtime / SOCKET))
    return found


@pytest.mark.parametrize(
    "stream",
    [
        framed(b"\xc1"),
        framed(b"\x81\xa2op\xa4nope"),
        framed(b"\x81\xa2op\xa1\x80"),
        struct.pack("<I", CONTROL_FRAME_BYTES_MAX + 1),
    ],
)
def test_the_daemon_ends_a_connection_that_makes_no_sense(
    shared_daemon: Daemon, stream: bytes
) -> None:
    before = len(shared_daemon.events("connection_refused"))
    with connected(shared_daemon) as sock:
        sock.sendall(stream)
        assert sock.recv(1) == b""
    shared_daemon.await_event("connection_refused", before + 1)
    assert shared_daemon.status()["pid"] == shared_daemon.process.pid


def test_a_cut_frame_holds_up_nobody_else(shared_daemon: Daemon) -> None:
    with connected(shared_daemon) as half:
        half.sendall(encoded(Status())[:-1])
        assert shared_daemon.status()["pid"] == shared_daemon.process.pid
        half.sendall(encoded(Status())[-1:])
        assert len(half.recv(4)) == 4


def test_two_clients_are_answered_each_in_its_order(shared_daemon: Daemon) -> None:
    """One waits for long; the other is answered meanwhile."""
    path = shared_daemon.runtime / SOCKET
    with Client(path) as one, Client(path) as other:
        assert one.ask(Drain(60.0), Done).left == 0
        for client in (one, other, one, other):
            assert client.ask(Status(), Stated).state["pid"] == shared_daemon.process.pid


def test_requests_that_need_a_session_say_so(shared_daemon: Daemon) -> None:
    with Client(shared_daemon.runtime / SOCKET) as client:
        with pytest.raises(UsageError, match="attach first"):
            client.ask(control.Restore(), control.Restored)
        with pytest.raises(UsageError, match="attach first"):
            client.ask(control.Wait(1, 0.0), control.Waited)
        assert client.ask(Release(), Done) == Done()


@pytest.mark.parametrize("length", [1 << 20, CONTROL_FRAME_BYTES_MAX - 200])
def test_a_long_request_within_the_bound_is_read(shared_daemon: Daemon, length: int) -> None:
    with Client(shared_daemon.runtime / SOCKET) as client:
        request = control.Load("file:///" + "x" * length)
        with pytest.raises(UsageError, match="has more than 2048 characters"):
            client.ask(request, control.Restored, 60)
        assert client.ask(Status(), Stated).state["pid"] == shared_daemon.process.pid


# ---- other users ------------------------------------------------------------

STRANGER = """
import os, socket, sys
os.setuid(12345)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
if sys.argv[1] == "connect":
    try:
        sock.connect(sys.argv[2])
    except PermissionError:
        print("no permission")
    else:
        sock.sendall(bytes.fromhex(sys.argv[3]))
        print(sock.recv(1))
else:
    sock.bind(sys.argv[2])
    sock.listen()
    os.chmod(sys.argv[2], 0o777)
    print("listening", flush=True)
    sock.accept()
"""


def stranger(*arguments: str) -> subprocess.Popen[str]:
    needs_root()
    return subprocess.Popen(
        [sys.executable, "-c", STRANGER, *arguments],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_another_user_can_not_reach_the_socket(runtime: Path) -> None:
    with Daemon(runtime), stranger("connect", str(runtime / SOCKET), "00") as process:
        assert process.communicate()[0] == "no permission\n"


def test_another_user_who_reaches_the_socket_is_refused(runtime: Path) -> None:
    """Even where somebody has opened the directory: the kernel tells who is at the other end."""
    with Daemon(runtime) as daemon:
        runtime.chmod(0o755)
        (runtime / SOCKET).chmod(0o777)
        arguments = ("connect", str(runtime / SOCKET), encoded(Status()).hex())
        with stranger(*arguments) as process:
            assert process.communicate()[0] in ("b''\n", "")
        assert "peer is user 12345" in daemon.await_event("connection_refused")["why"]


def test_the_rank_refuses_a_daemon_of_another_user(runtime: Path) -> None:
    runtime.chmod(0o777)
    with stranger("listen", str(runtime / "trap")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        with pytest.raises(ControlProtocolError, match="peer is user 12345"):
            Client(runtime / "trap")
        process.kill()
