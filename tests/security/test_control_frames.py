"""Whatever is written to the control socket: the daemon refuses it and goes on serving."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptmgr.config import CONTROL_FRAME_BYTES_MAX, MIB, open_private_dir
from ckptmgr.staging.inbox import BUFFERS, INBOX, SOCKET
from driven import Daemon, Rank
from scale import scaled

encode = msgspec.msgpack.encode


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One daemon for all of it: what one test does to it, the next one must not notice."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    open_private_dir(runtime)
    with Daemon(runtime) as started:
        yield started
        log = started.log.read_text()
        assert "Traceback" not in log, log
    shutil.rmtree(runtime)


def speak(daemon: Daemon, sent: bytes) -> bytes:
    """Send raw bytes, end our half, and return all that comes back."""
    received = b""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(daemon.runtime / SOCKET))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                received += piece
    return received


def frame(payload: bytes) -> bytes:
    return struct.pack("<I", len(payload)) + payload


def resident_bytes(daemon: Daemon) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def still_serves(daemon: Daemon) -> None:
    assert daemon.status()["pid"] == daemon.process.pid
    assert not daemon.gone()


GARBAGE = {
    "nothing": b"",
    "half a length": b"\x01\x00",
    "a length and nothing": struct.pack("<I", 100),
    "a cut frame": struct.pack("<I", 100) + b"\x81",
    "an empty frame": frame(b""),
    "the longest length": b"\xff" * 4 + b"x" * 100,
    "one byte too long": struct.pack("<I", CONTROL_FRAME_BYTES_MAX + 1) + b"x" * 100,
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "JSON": frame(b'{"op": "status"}'),
    "no op": frame(encode({"a": 1})),
    "an unknown op": frame(encode({"op": "shell", "command": "true"})),
    "a reply": frame(encode({"op": "attached", "path": "x", "attempt": 1, "nonce": ""})),
    "wrong types": frame(encode({"op": "wait", "step": "one", "timeout_seconds": []})),
    "a missing field": frame(encode({"op": "wait", "step": 1})),
    "an array": frame(encode([1, 2, 3])),
    "deep arrays": frame(b"\x91" * 200_000 + b"\xc0"),
    "deep maps": frame(b"\x81\xa2op" * 200_000),
    "a declared array": frame(b"\x81\xa2op\xdd\xff\xff\xff\xff"),
    "a declared string": frame(b"\x81\xa2op\xdb\xff\xff\xff\xff"),
    "bad UTF-8": frame(b"\x81\xa2op\xa6\xff\xfe\xfd\xfc\xfb\xfa"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_and_the_daemon_goes_on(daemon: Daemon, name: str) -> None:
    assert speak(daemon, GARBAGE[name]) == b"", "the daemon answered garbage"
    still_serves(daemon)


def test_a_declared_length_takes_no_memory(daemon: Daemon) -> None:
    """100 connections that declare the longest frame and send a byte of it."""
    still_serves(daemon)
    before = resident_bytes(daemon)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(daemon.runtime / SOCKET))
            sock.sendall(struct.pack("<I", CONTROL_FRAME_BYTES_MAX) + b"x")
        still_serves(daemon)
        assert resident_bytes(daemon) - before < 64 * MIB
    still_serves(daemon)


ATTACH: dict[str, Any] = {
    "op": "attach",
    "url": "memory://frames",
    "rank": 0,
    "world": 1,
    "slots": 2,
    "table_bytes": 4096,
    "data_bytes": 4096,
    "codec": "none",
    "keep": 3,
}

ODD: list[tuple[str, Any]] = [
    *(("rank", value) for value in (-1, 1, 1 << 40)),
    *(("world", value) for value in (0, -1, 1 << 62)),
    *(("slots", value) for value in (-1, 0, 1, 4, 1 << 40)),
    *(("table_bytes", value) for value in (-4096, -1, 0, 1, 4097, 1 << 62, 1 << 63)),
    *(("data_bytes", value) for value in (-4096, -1, 1, 4097, 1 << 50, 1 << 62, (1 << 64) - 1)),
    *(("keep", value) for value in (-5, 0, 1 << 62)),
    *(("codec", value) for value in ("", "lzma", "x" * 100_000)),
    *(("attempt", value) for value in (-1, 1 << 40, 1 << 62)),
    *(("nonce", value) for value in ("", "zz", "../x", "x" * 100_000)),
    *(("buffer", value) for value in ("../../etc/passwd", "x" * 100_000)),
    *(("run_id", value) for value in ("\0", "x" * 1_000_000)),
    *(
        ("url", value)
        for value in (
            "",
            "nowhere://x",
            "file://",
            "zz://nowhere",
            "file:///\0",
            "memory://" + "x" * 5000,
        )
    ),
]


@pytest.mark.parametrize(("field", "value"), ODD, ids=lambda v: repr(v)[:24])
def test_odd_requests_get_an_error_or_a_buffer(daemon: Daemon, field: str, value: Any) -> None:
    """Well-formed, of the right types, and nonsense."""
    answer = speak(daemon, frame(encode({**ATTACH, field: value})))
    assert answer, f"no answer to {field}={value!r:.60}: {daemon.log.read_text()[-2000:]}"
    still_serves(daemon)


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "restore"},
        {"op": "restore", "step": -1},
        {"op": "restore", "rejected": [[1, 2]] * 10_000},
        {"op": "release"},
        {"op": "wait", "step": 1, "timeout_seconds": float("nan")},
        {"op": "wait", "step": -1, "timeout_seconds": -1.0},
        {"op": "detach", "clean": True},
        {"op": "drain", "timeout_seconds": -1.0},
        {"op": "drain", "timeout_seconds": float("nan")},
        {"op": "load", "url": "memory://frames", "rank": -1},
        {"op": "load", "url": "memory://frames", "rank": 1 << 62, "step": -(1 << 63)},
        {"op": "load", "url": "file:///nowhere/at/all"},
        {"op": "load", "url": "relative/path"},
    ],
    ids=str,
)
def test_requests_out_of_order_get_an_answer(daemon: Daemon, request_: dict[str, Any]) -> None:
    if "rejected" in request_:
        request_ = {**request_, "rejected": [tuple(one) for one in request_["rejected"]]}
    answer = speak(daemon, frame(encode(request_)))
    assert answer, daemon.log.read_text()[-2000:]
    still_serves(daemon)


def test_a_relative_path_makes_nothing_where_the_daemon_runs(daemon: Daemon) -> None:
    sent = {**ATTACH, "url": "memory&/relative"}
    assert b"is a relative path" in speak(daemon, frame(encode(sent)))
    assert not Path(f"/proc/{daemon.process.pid}/cwd/memory&").exists()


def test_random_frames(daemon: Daemon) -> None:
    """Bytes that are random, and good requests with random bytes in them."""
    good = [frame(encode(one)) for one in (ATTACH, {"op": "status"}, {"op": "restore"})]
    for _ in range(scaled(150, 5000)):
        sent = bytearray(random.choice(good)) * random.choice((1, 1, 2))
        for _ in range(random.randrange(6)):
            sent[random.randrange(len(sent))] = random.randrange(256)
        if random.random() < 0.3:
            sent = bytearray(os.urandom(random.randrange(200)))
        speak(daemon, bytes(sent[: random.randrange(len(sent) + 1)]))
    still_serves(daemon)


def test_garbage_in_the_directories_stops_nothing(runtime: Path, store_url: str) -> None:
    """Strange tickets and files among the buffers; the job beside them is served."""
    with Daemon(runtime) as daemon:
        (runtime / INBOX / "directory").mkdir()
        (runtime / INBOX / "directory" / "x").touch()
        (runtime / INBOX / "0").symlink_to("/nowhere")
        (runtime / INBOX / ("f" * 32 + ".1")).touch()
        (runtime / BUFFERS / "rubbish.buf").write_bytes(os.urandom(5000))
        (runtime / BUFFERS / "empty.buf").touch()
        (runtime / BUFFERS / "directory").mkdir()
        with Rank(runtime, store_url) as rank:
            for step in (1, 2, 3):
                rank.save(step)
                assert rank.wait(step).outcome == 1
        still_serves(daemon)
        assert daemon.end() == 0
    with Daemon(runtime) as again:
        still_serves(again)
