"""A proxy in front of an HTTP server that fails as planned, on the wire and not in our own code.

It knows requests and answers (their heads, lengths and chunks), so that a fault strikes a method, a
path and a place in a body. One thread per connection; what it passes on, it passes on unchanged.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO, Self

PIECE_BYTES = 64 << 10
HEAD_BYTES_MAX = 64 << 10
REASONS = {
    403: "Forbidden",
    409: "Conflict",
    412: "Precondition Failed",
    500: "Internal Server Error",
}


class Kind(Enum):
    """What goes wrong."""

    RESET = "the connection is reset in the middle of the request's body"
    STATUS = "the proxy answers itself, and the server never hears of it"
    LOST = "the server does it, and its answer is lost"
    STALL = "the request is taken, and nothing ever comes"
    LATE = "the request waits before it is passed on"
    SLOW = "bodies trickle, both ways"
    CUT = "the connection ends in the middle of the answer's body"
    SHRUNK = "the answer's body is cut, and its head says that this is all"
    FLIP_UP = "one byte of the request's body is another"
    FLIP_DOWN = "one byte of the answer's body is another"


@dataclass(frozen=True, slots=True)
class Fault:
    """Which requests it strikes: the first `times` of a method ("" any) whose path holds `path`,
    each with a `chance`.
    """

    kind: Kind
    method: str = ""
    path: str = ""
    times: int = 1 << 60
    chance: float = 1.0
    status: int = 500
    seconds: float = 0.2
    bytes_per_second: float = 4 << 20


@dataclass(frozen=True, slots=True)
class Head:
    """The first line and the fields of a message."""

    line: str
    fields: list[tuple[str, str]]

    def field(self, name: str) -> str:
        return next((value for key, value in self.fields if key.lower() == name), "")

    @property
    def length(self) -> int:
        return int(self.field("content-length") or 0)

    @property
    def chunked(self) -> bool:
        return self.field("transfer-encoding").lower() == "chunked"

    def with_length(self, length: int) -> Head:
        rest = [(key, value) for key, value in self.fields if key.lower() != "content-length"]
        return Head(self.line, [*rest, ("Content-Length", str(length))])

    def encode(self) -> bytes:
        lines = [self.line, *(f"{key}: {value}" for key, value in self.fields)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _CutError(Exception):
    """The connection to the client is to be reset."""


class FaultProxy:
    """Listens on `port` of loopback, or on a socket that it is given, in front of `target` on
    loopback; `struck` counts the faults.
    """

    def __init__(self, target: int, seed: int = 0, listener: socket.socket | None = None) -> None:
        self.struck: Counter[Kind] = Counter()
        self.requests = 0
        self._target = target
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._plan: list[tuple[Fault, list[int]]] = []
        self._healed = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = listener or socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address, self.port = self._listener.getsockname()[:2]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    def plan(self, *faults: Fault) -> None:
        """Forget the earlier faults, let go what waits, and count anew; `plan()` heals."""
        with self._lock:
            self._healed.set()
            self._healed = threading.Event()
            self._plan = [(fault, [0]) for fault in faults]

    def close(self) -> None:
        """End all connections and threads."""
        self.plan()
        self._shut(self._listener)
        with self._lock:
            left = list(self._open)
        for connection in left:
            self._shut(connection)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a connection does not end"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _shut(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                self._listener.close()
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                with socket.create_connection(("127.0.0.1", self._target)) as server:
                    self._pass_on(client, server)
            except (_CutError, OSError):
                # With nothing to linger for, close sends a reset.
                with contextlib.suppress(OSError):
                    off = struct.pack("ii", 1, 0)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            self._open |= {client, server}
        try:
            with client.makefile("rb") as requests, server.makefile("rb") as answers:
                while self._exchange(client, server, requests, answers):
                    pass
        finally:
            with self._lock:
                self._open -= {client, server}

    def _exchange(
        self, client: socket.socket, server: socket.socket, requests: BinaryIO, answers: BinaryIO
    ) -> bool:
        """One request and its answer; False when the client has no more."""
        request = read_head(requests)
        if request is None:
            return False
        fault, healed = self._strike(request)
        kind = fault.kind if fault is not None else None
        body = body_of(requests, request)
        if fault is not None and kind in (Kind.STATUS, Kind.STALL):
            self._keep_back(fault, healed, client, body)
            return True
        if fault is not None and kind is Kind.LATE:
            healed.wait(fault.seconds)
        server.sendall(request.encode())
        for piece in _altered(body, request.length, fault, healed, up=True):
            server.sendall(piece)
        answer = read_head(answers)
        if answer is None:
            raise _CutError
        bare = request.line.startswith("HEAD ") or answer.line.split()[1] in ("204", "304")
        whole = iter(()) if bare else body_of(answers, answer)
        if kind is Kind.LOST:
            for _ in whole:
                pass
            raise _CutError
        length = answer.length
        if kind is Kind.SHRUNK and not bare:
            answer = answer.with_length(length // 2)
        client.sendall(answer.encode())
        for piece in _altered(whole, length, fault, healed, up=False):
            client.sendall(piece)
        return True

    @staticmethod
    def _keep_back(
        fault: Fault, healed: threading.Event, client: socket.socket, body: Iterator[bytes]
    ) -> None:
        """Answer in the server's place, or never."""
        for _ in body:
            pass
        if fault.kind is Kind.STALL:
            healed.wait()
            raise _CutError
        head = f"HTTP/1.1 {fault.status} {REASONS.get(fault.status, 'Injected')}"
        client.sendall(Head(head, [("Content-Length", "0")]).encode())

    def _strike(self, request: Head) -> tuple[Fault | None, threading.Event]:
        method, path, _ = request.line.split(" ", 2)
        with self._lock:
            self.requests += 1
            for fault, count in self._plan:
                if (
                    fault.method in ("", method)
                    and fault.path in path
                    and count[0] < fault.times
                    and self._random.random() < fault.chance
                ):
                    count[0] += 1
                    self.struck[fault.kind] += 1
                    return fault, self._healed
            return None, self._healed


def read_head(source: BinaryIO) -> Head | None:
    """The next head; None where the connection ended."""
    raw = b""
    while not raw.endswith(b"\r\n\r\n"):
        line = source.readline(HEAD_BYTES_MAX)
        if not line:
            return None
        raw += line
    line, *fields = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (field.partition(":") for field in fields)
    return Head(line, [(name, value.strip()) for name, _, value in pairs])


def body_of(source: BinaryIO, head: Head) -> Iterator[bytes]:
    """The bytes of a body as they are on the wire, chunk heads too."""
    if not head.chunked:
        yield from _exactly(source, head.length)
        return
    while True:
        line = source.readline(HEAD_BYTES_MAX)
        yield line
        size = int(line.partition(b";")[0], 16)
        yield from _exactly(source, size + 2)
        if size == 0:
            return


def _exactly(source: BinaryIO, count: int) -> Iterator[bytes]:
    while count:
        piece = source.read(min(count, PIECE_BYTES))
        if not piece:
            raise _CutError
        count -= len(piece)
        yield piece


def _altered(
    body: Iterator[bytes], length: int, fault: Fault | None, healed: threading.Event, *, up: bool
) -> Iterator[bytes]:
    """A body on its way, with what the fault does to it in its middle."""
    kind = None if fault is None else fault.kind
    cuts = kind in ((Kind.RESET,) if up else (Kind.CUT, Kind.SHRUNK))
    flips = kind is (Kind.FLIP_UP if up else Kind.FLIP_DOWN)
    done = 0
    for piece in body:
        middle = length // 2 - done
        done += len(piece)
        if cuts and middle < len(piece):
            yield piece[: max(middle, 0)]
            break
        if flips and 0 <= middle < len(piece):
            yield piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
            continue
        if fault is not None and kind is Kind.SLOW:
            healed.wait(len(piece) / fault.bytes_per_second)
        yield piece
    if kind is Kind.SHRUNK:
        for _ in body:
            pass
    elif cuts:
        raise _CutError
