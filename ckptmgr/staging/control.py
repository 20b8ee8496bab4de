"""Requests over a Unix socket: attach, restore, wait, drain, status. Never on the save path.

A frame is 4 bytes of length (little-endian) and a MessagePack map with the field `op`. The daemon
answers every request with one frame, in order. Both sides check that the peer is the same user.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from ckptmgr import errors
from ckptmgr.config import CONTROL_FRAME_BYTES_MAX, CONTROL_TIMEOUT_SECONDS
from ckptmgr.errors import ControlProtocolError, DaemonError, DaemonUnreachableError
from ckptmgr.types import MALFORMED

PROTOCOL = 2
"""Version of these messages: a daemon outlives the installation that it was started from."""

ROOT = 0

_LENGTH = struct.Struct("<I")
_UCRED = struct.Struct("3i")


class Message(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower):
    """Base of all requests and replies."""


class Attach(Message, frozen=True):
    """Take part in a job: claim an attempt (rank 0) and get a host buffer.

    `attempt` and `nonce` are given when the attempt was claimed before: by rank 0, or by the
    same trainer through a daemon that died meanwhile, which then also names its `buffer`, as does
    one that `begins` another attempt. When it is answered, what this host's memory holds of the job
    is published for the attempt.
    `max_d2h_gbps` is only shown to people.
    """

    url: str
    rank: int
    world: int
    slots: int
    table_bytes: int
    data_bytes: int
    codec: str
    keep: int | str
    attempt: int = 0
    nonce: str = ""
    begins: bool = False
    buffer: str = ""
    run_id: str = ""
    max_d2h_gbps: float = 0.0
    protocol: int = PROTOCOL


class Attached(Message, frozen=True):
    """The buffer to use and the attempt to write under; `pid` is that of the daemon, `note` is
    something a person should do.
    """

    path: str
    attempt: int
    nonce: str
    pid: int
    note: str = ""


class Restore(Message, frozen=True):
    """Decide which step the attempt resumes from: the newest usable one, or a chosen `step`.

    It is the attempt's `k`-th such decision; those from `first_k` on were made by this same restore
    and proved unusable, so their steps are not offered again. With `before`, an expression over
    tags (repository/breakout.py), only commits before it first held are offered.
    """

    step: int | None = None
    of_attempt: int | None = None
    k: int = 0
    first_k: int = 0
    before: str = ""


class Load(Message, frozen=True):
    """As Restore, for reading only: nothing is claimed or decided, only commits are offered.

    `rejected` lists (attempt, step) that proved unusable.
    """

    url: str
    step: int | None = None
    of_attempt: int | None = None
    rejected: tuple[tuple[int, int], ...] = ()
    protocol: int = PROTOCOL


class Prefetch(Message, frozen=True):
    """Bring the newest commit of a job into this host's memory for trainers that are to come: the
    parts of `ranks`, or of all that wrote it.
    """

    url: str
    ranks: tuple[int, ...] = ()
    protocol: int = PROTOCOL


class Prefetching(Message, frozen=True):
    """The step that is on its way, for which ranks, and its `nbytes` in memory; `attempt` 0 means
    that the job has no step yet. Ranks of which the memory holds a snapshot are left out.
    """

    attempt: int
    step: int
    ranks: tuple[int, ...] = ()
    nbytes: int = 0


class Restored(Message, frozen=True):
    """The step that was decided on; `attempt` 0 means that the job has no step yet.

    `world` ranks wrote it, and part `own` of it is this rank's. `tables` is a file (see
    staging/tables.py) with the table of that part; where it does not hold, `damage` says why, and
    the next k must be asked for. `skipped` names newer steps that could not be used, and why.
    """

    attempt: int
    step: int
    world: int = 0
    own: int = 0
    tables: str = ""
    damage: str = ""
    skipped: tuple[tuple[str, str], ...] = ()


class Describe(Message, frozen=True):
    """Ask for the tables of all ranks of the step that was decided on."""


class Described(Message, frozen=True):
    """`tables` is a file with the table of every rank."""

    tables: str


Ranges = tuple[tuple[int, int], ...]
"""Runs of bytes (start, stop) of a snapshot's data region."""


class Fetch(Message, frozen=True):
    """Bring bytes of the step into this host's memory: (saved rank, ranges) for each part."""

    wanted: tuple[tuple[int, Ranges], ...]


class Lent(msgspec.Struct, frozen=True):
    """Where the bytes of a part are; only those that were asked for may be read.

    `source` is "memory" where the snapshot was still on this host, else "store".
    """

    rank: int
    source: str
    path: str
    slot: int
    generation: int


class Fetched(Message, frozen=True):
    """Every wanted byte is verified and in place, until Release."""

    parts: tuple[Lent, ...]


class Release(Message, frozen=True):
    """The rank has copied what it fetched; tables and lent memory may go."""


class Wait(Message, frozen=True):
    """Wait until a step of this attempt is decided, at most `timeout_seconds`."""

    step: int
    timeout_seconds: float


class Waited(Message, frozen=True):
    """How the step stands; `why` is the last failure where it is not committed."""

    outcome: int
    why: str = ""


class Preempt(Message, frozen=True):
    """The trainer will be ended, in about `seconds` (0: not known). It is counted, unless a daemon
    before this one has, and what is sealed goes on its way without a pause.
    """

    source: str
    why: str
    seconds: float
    again: bool = False


class Detach(Message, frozen=True):
    """The trainer leaves; `clean` frees its host memory when everything is decided."""

    clean: bool


class Drain(Message, frozen=True):
    """Wait until no snapshot on this host is undecided, at most `timeout_seconds`."""

    timeout_seconds: float


class Status(Message, frozen=True):
    """Ask for the state of the daemon."""


class Stop(Message, frozen=True):
    """End the daemon; undecided snapshots stay in host memory for the next one."""


class Done(Message, frozen=True):
    """A request was carried out; `left` counts snapshots that are still undecided."""

    left: int = 0


class Stated(Message, frozen=True):
    """State of the daemon; the fields are a documented contract (docs/cli-json.md)."""

    state: dict[str, Any]


class Failed(Message, frozen=True):
    """A request failed with the named error of ckptmgr.errors."""

    error: str
    message: str
    subject: str
    hint: str


Request = (
    Attach
    | Restore
    | Load
    | Prefetch
    | Describe
    | Fetch
    | Release
    | Wait
    | Preempt
    | Detach
    | Drain
    | Status
    | Stop
)
Reply = Attached | Prefetching | Restored | Described | Fetched | Waited | Done | Stated | Failed

_encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

R = TypeVar("R", bound=Message)


def failed(error: errors.CkptmgrError) -> Failed:
    """The reply that carries an error."""
    return Failed(type(error).__name__, error.message, error.subject, error.hint)


def _raise(reply: Failed) -> None:
    kind = getattr(errors, reply.error, DaemonError)
    if not (isinstance(kind, type) and issubclass(kind, errors.CkptmgrError)):
        kind = DaemonError
    raise kind(reply.message, subject=reply.subject, hint=reply.hint)


def check_peer(sock: socket.socket, *trusted: int) -> int:
    """Refuse a peer of another user; returns its process id (0 from another pid namespace).

    `trusted` are users who may be at the other end as well.

    Raises:
        ControlProtocolError: the peer is another user.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    if uid not in (os.getuid(), *trusted):
        raise ControlProtocolError(f"peer is user {uid}", subject="control socket")
    return int(pid)


class Client:
    """A blocking connection to the daemon; one request at a time, one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._awaits_reply = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(CONTROL_TIMEOUT_SECONDS)
            self._socket.connect(str(path))
            # A service manager listens for the daemon until that has started. Root could do without
            # our trust whatever we would let him do here.
            check_peer(self._socket, ROOT)
        except OSError as error:
            self._socket.close()
            raise DaemonUnreachableError(
                f"no daemon answers: {error.strerror or error}", subject=str(path)
            ) from error
        except BaseException:
            self._socket.close()
            raise

    def ask(
        self, request: Message, expect: type[R], timeout_seconds: float = CONTROL_TIMEOUT_SECONDS
    ) -> R:
        """Send a request and wait for its reply.

        Whatever cuts that short, as KeyboardInterrupt does, ends the connection: the reply that is
        still to come would be taken for the next one's.

        Raises:
            DaemonUnreachableError: the connection is broken or the time is over.
            CkptmgrError: whatever the daemon answered with.
        """
        received = self._exchange(_encode(request), timeout_seconds)
        try:
            reply = _replies.decode(received)
        except MALFORMED as error:
            raise ControlProtocolError(f"malformed reply: {error}") from error
        if isinstance(reply, Failed):
            _raise(reply)
        if not isinstance(reply, expect):
            raise ControlProtocolError(f"unexpected reply {type(reply).__name__}")
        return reply

    def _exchange(self, frame: bytes, timeout_seconds: float) -> bytes:
        if self._awaits_reply:
            self.shutdown()  # cut short by two exceptions, of which the second kept it from closing
        self._awaits_reply = True
        try:
            self._socket.settimeout(timeout_seconds)
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
            length = _LENGTH.unpack(self._receive(_LENGTH.size))[0]
            if length > CONTROL_FRAME_BYTES_MAX:
                raise ControlProtocolError(f"frame of {length} bytes", subject=str(self.path))
            received = self._receive(length)
            self._awaits_reply = False
        except OSError as error:
            raise DaemonUnreachableError(
                f"does not answer: {error.strerror or error}", subject=str(self.path)
            ) from error
        finally:
            if self._awaits_reply:
                self.shutdown()
                self.close()
        return received

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            piece = self._socket.recv(length - len(received))
            if not piece:
                raise DaemonUnreachableError("closed the connection", subject=str(self.path))
            received += piece
        return bytes(received)

    @property
    def is_open(self) -> bool:
        """Whether nobody has closed this end."""
        return self._socket.fileno() >= 0

    def shutdown(self) -> None:
        """End the connection for everyone who has it: threads that wait, and forked processes."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def wait_closed(self, timeout_seconds: float | None = CONTROL_TIMEOUT_SECONDS) -> None:
        """Wait for the daemon to close the connection, as it does when it dies; None: for ever.

        Raises:
            DaemonUnreachableError: it did not within the time.
        """
        try:
            self._socket.settimeout(timeout_seconds)
            while self._socket.recv(4096):
                pass
        except OSError as error:
            raise DaemonUnreachableError("does not end", subject=str(self.path)) from error

    def close(self) -> None:
        """Close the connection; the daemon takes this as the trainer's death or detachment."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """The next request of a connection, or None when the peer has closed it.

    Raises:
        ControlProtocolError: a frame that is too long, cut or malformed.
    """
    try:
        length = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))[0]
        if length > CONTROL_FRAME_BYTES_MAX:
            raise ControlProtocolError(f"frame of {length} bytes", subject="control socket")
        return _requests.decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except MALFORMED as error:
        raise ControlProtocolError(f"malformed request: {error}") from error


async def send_reply(writer: asyncio.StreamWriter, reply: Reply) -> None:
    """Send one reply."""
    frame = _encode(reply)
    writer.write(_LENGTH.pack(len(frame)) + frame)
    await writer.drain()


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

_OPTIONS: dict[str, Any] = {"limit": CONTROL_FRAME_BYTES_MAX}
if sys.version_info >= (3, 13):
    _OPTIONS["cleanup_socket"] = False  # it would remove a file that is not ours


class Listener:
    """The daemon's end of a control socket; its file is removed with it if we have made it."""

    def __init__(self, server: asyncio.Server, path: Path, inode: int) -> None:
        self._server = server
        self._path = path
        self._inode = inode

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            # A service manager may listen at the same place by now.
            if os.lstat(self._path).st_ino == self._inode:
                self._path.unlink()


async def listen(path: Path, serve: Serve, given: socket.socket | None = None) -> Listener:
    """Listen on `path` (mode 0600), or on a socket that is bound to it already.

    The caller holds the daemon's lock, so a socket file that is already there belongs to a dead
    daemon.
    """
    if given is not None:
        return Listener(await asyncio.start_unix_server(serve, sock=given, **_OPTIONS), path, 0)
    path.unlink(missing_ok=True)
    old = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(serve, str(path), **_OPTIONS)
        return Listener(server, path, os.lstat(path).st_ino)
    finally:
        os.umask(old)
