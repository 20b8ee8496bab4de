"""Tickets: a file that appears by rename wakes the daemon; the host buffers are the truth."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from watchdog.events import FileMovedEvent, FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from ckptmgr.config import open_private_dir
from ckptmgr.errors import HostMemoryError

BUFFERS = "buffers"
INBOX = "inbox"
SOCKET = "control.sock"
LOCK = "daemon.lock"
LOG = "daemon.log"
OLD_LOG = "daemon.log.1"

_SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7), without its final zero


def prepare(runtime: Path) -> None:
    """Make (or check) the runtime directory and the two directories in it.

    Raises:
        HostMemoryError: one of them is not a private directory of this user, or the path is
            longer than the name of a socket may be.
    """
    if len(os.fsencode(runtime / SOCKET)) > _SOCKET_PATH_BYTES_MAX:
        raise HostMemoryError(
            "is too long a path for a control socket",
            subject=str(runtime),
            hint="Set CKPTMGR_RUNTIME_DIR to a shorter path on tmpfs.",
        )
    for path in (runtime, runtime / BUFFERS, runtime / INBOX):
        open_private_dir(path)


def drop_ticket(runtime: Path, buffer_id: str) -> None:
    """Tell the daemon that something in buffer `buffer_id` was sealed. Never blocks on it.

    A lost ticket loses nothing: the daemon scans every buffer when it starts and on each ticket.
    """
    inbox = runtime / INBOX
    name = f"{buffer_id}.{secrets.token_hex(4)}"
    try:
        fd = os.open(inbox / f".{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.close(fd)
        os.rename(inbox / f".{name}", inbox / name)
    except OSError as error:
        raise HostMemoryError(
            f"ticket can not be dropped: {error.strerror}", subject=str(inbox)
        ) from error


def take_tickets(runtime: Path) -> set[str]:
    """Remove all tickets; returns the ids of the buffers they name."""
    inbox = runtime / INBOX
    taken = set()
    for entry in os.scandir(inbox):
        if not entry.name.startswith("."):
            taken.add(entry.name.partition(".")[0])
            with suppress(OSError):  # what is no ticket stays, and must not hide those that are
                os.unlink(entry.path)
    return taken


class InboxWatch(FileSystemEventHandler):
    """Calls `wake` (from a thread of its own) whenever a ticket appears."""

    def __init__(self, runtime: Path, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._observer = Observer()
        self._observer.schedule(self, str(runtime / INBOX), event_filter=[FileMovedEvent])
        self._observer.start()

    def on_moved(self, event: FileSystemEvent) -> None:  # noqa: ARG002 - any ticket will do
        """A ticket got its final name."""
        self._wake()

    def is_alive(self) -> bool:
        """Whether tickets are heard."""
        return bool(self._observer.is_alive())

    def close(self) -> None:
        """Stop watching."""
        self._observer.stop()
        self._observer.join()
