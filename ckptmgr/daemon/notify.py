"""The service manager that started the daemon: what it is told, what it gives, what it keeps.

The protocols are sd_notify(3), sd_listen_fds(3) and the descriptor store of systemd; a few lines
each, so that no library is needed. Without a service manager nothing is told, given or kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from pathlib import Path

from ckptmgr.daemon.log import warning
from ckptmgr.errors import DaemonError

FIRST_DESCRIPTOR = 3
"""SD_LISTEN_FDS_START: descriptors that are given follow the three of every process."""

BUFFER = "buffer-"
"""What the names of kept host buffers begin with; their id follows."""

BEAT_SECONDS_MAX = 10.0
"""Longest time between two signs of life: what `systemctl status` shows is not older than this."""

BEATS_PER_TIMEOUT = 3
"""Signs of life within the watchdog's time, so that a busy second is not taken for death."""

EXTENSION_SECONDS = 2 * BEAT_SECONDS_MAX
"""Asked for with every sign of life while snapshots are drained; the drain itself is bounded."""

TELL_SECONDS_MAX = 1.0
"""How long a service manager that does not read may hold us up: it must never stop a save."""


class Supervisor:
    """The service manager at `address` (empty: there is none), and the descriptors it gave us.

    `watchdog_seconds` is how long it waits for a sign of life before it kills us; 0 is for ever.
    `given` are descriptors with their names.
    """

    def __init__(
        self,
        address: str = "",
        watchdog_seconds: float = 0.0,
        given: tuple[tuple[str, int], ...] = (),
    ) -> None:
        self._address = address
        self._watchdog_seconds = watchdog_seconds
        self._given = given
        self._stopping = False

    @classmethod
    def from_env(cls, environ: MutableMapping[str, str] = os.environ) -> Supervisor:
        """Whoever started us, by the variables that it set; they are taken out of `environ`, so
        that children do not take them for theirs.
        """
        address = environ.pop("NOTIFY_SOCKET", "")
        # Without their pid these are the variables of another process.
        pids = {name: environ.pop(name, "") for name in ("LISTEN_PID", "WATCHDOG_PID")}
        count, names = environ.pop("LISTEN_FDS", "0"), environ.pop("LISTEN_FDNAMES", "")
        usec = environ.pop("WATCHDOG_USEC", "0")
        own = str(os.getpid())
        given = _descriptors(int(count), names) if pids["LISTEN_PID"] == own else ()
        watchdog = int(usec) / 1e6 if pids["WATCHDOG_PID"] in (own, "") else 0.0
        return cls(address, watchdog, given)

    # -- given --------------------------------------------------------------------------------

    def socket(self, path: Path) -> socket.socket | None:
        """The socket on which the service manager listens for us; None if we must listen ourselves.

        Raises:
            DaemonError: it listens elsewhere than at `path`, where our trainers look.
        """
        for _, fd in self._given:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            found = socket.socket(fileno=fd)
            if found.getsockname() == str(path):
                return found
            raise DaemonError(
                f"is given a socket at {found.getsockname()!r}",
                subject=str(path),
                hint="Let ListenStream= of the socket unit and CKPTMGR_RUNTIME_DIR agree.",
            )
        return None

    def buffers(self) -> list[int]:
        """Descriptors of the host buffers that a daemon before this one let be kept."""
        return [fd for name, fd in self._given if name.startswith(BUFFER)]

    # -- kept ---------------------------------------------------------------------------------

    def keep(self, buffer_id: str, fd: int) -> bool:
        """Let the memory of a buffer without a name outlive us; False where nobody keeps it.

        A service manager that keeps no descriptors (FileDescriptorStoreMax=0) does not say so.
        """
        return self._tell("FDSTORE=1", f"FDNAME={BUFFER}{buffer_id}", fd=fd)

    def forget(self, buffer_id: str) -> None:
        """Give back the memory of a kept buffer."""
        self._tell("FDSTOREREMOVE=1", f"FDNAME={BUFFER}{buffer_id}")

    # -- told ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def told(
        self, status: Callable[[], str], alive: Callable[[], bool]
    ) -> AsyncIterator[None]:
        """Inside, we are ready, and give signs of life for as long as the event loop turns and
        `alive` says so; `status` is shown to people.
        """
        beating = asyncio.create_task(self._beat(status, alive), name="signs of life")
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            self._tell("STOPPING=1", "STATUS=ending")

    async def _beat(self, status: Callable[[], str], alive: Callable[[], bool]) -> None:
        pause = BEAT_SECONDS_MAX
        if self._watchdog_seconds:
            pause = min(pause, self._watchdog_seconds / BEATS_PER_TIMEOUT)
        self._tell("READY=1")
        while self._address:
            lines = [f"STATUS={status()}"]
            if alive():
                lines.append("WATCHDOG=1")
            else:
                warning("inbox_deaf", why="its thread has ended")
            self._tell(*lines, *self._extension())
            await asyncio.sleep(pause)

    def _extension(self) -> list[str]:
        return [f"EXTEND_TIMEOUT_USEC={EXTENSION_SECONDS * 1e6:.0f}"] if self._stopping else []

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, we are about to end and must be given the time for it."""
        self._stopping = True
        self._tell("STOPPING=1", *self._extension())
        try:
            yield
        finally:
            self._stopping = False

    def _tell(self, *lines: str, fd: int | None = None) -> bool:
        """Whether the service manager was told."""
        if not self._address:
            return False
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        # The name of an abstract socket is written with @, and begins with a zero.
        address = f"\0{self._address[1:]}" if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(TELL_SECONDS_MAX)
                sender.sendmsg(["\n".join(lines).encode()], rights, 0, address)
        except OSError as error:
            warning("notify_failed", told=lines[0], why=str(error))
            return False
        return True


def _descriptors(count: int, names: str) -> tuple[tuple[str, int], ...]:
    """What was given to this process, with its names."""
    fds = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count)
    for fd in fds:
        os.set_inheritable(fd, False)
    named = names.split(":") if names else []
    return tuple(zip([*named, *[""] * (count - len(named))], fds, strict=True))
