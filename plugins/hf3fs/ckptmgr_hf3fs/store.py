"""hf3fs:// objects as files on a 3FS mount, moved by its rings and kept by the mount's rules."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from ckptmgr.errors import StoreUnreachableError
from ckptmgr.store.base import Buffers, Wanted, check_key, range_length
from ckptmgr.store.calls import Call, Work
from ckptmgr.store.finding import Finding
from ckptmgr.store.local import LocalStore
from ckptmgr.store.posix import write_all
from ckptmgr_hf3fs.carry import PATIENCE_SECONDS
from ckptmgr_hf3fs.client import Client
from ckptmgr_hf3fs.mount import NEGATIVE_SECONDS, MountedTree, fresh_size, virtual_directory
from ckptmgr_hf3fs.pieces import Moves, Range, Reading, Writing
from ckptmgr_hf3fs.regions import Rooms, SharedMemory, close_quietly
from ckptmgr_hf3fs.rules import findings_of
from ckptmgr_hf3fs.session import ENTRIES, Session

RING_BYTES_MIN = 256 * 1024
"""Smallest object, or range of one, that goes over a ring; below, one request of the mount is as
quick. `get_many` always takes a ring: it has many ranges in flight."""

FILES_MAX = 256
"""Most objects that one `get_many` holds open at a time."""

REFUSED_SECONDS = 60.0
"""After a mount or this machine refused rings, the next try is not made before."""

CLOSE_SECONDS = 5.0
"""How long closing a store waits for the mount to take back what was registered with it."""

_GONE = {errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN, errno.ENODEV}
"""What a mount without a daemon answers: to do without rings would not help."""

_LOGGER = logging.getLogger("ckptmgr")


class Hf3fsStore(LocalStore):
    """Objects as files below `root` on a 3FS mount. `make_client` makes the client of its rings;
    None does without rings.

    What differs from other file systems: bytes go over rings; a size is asked of the daemon where
    the kernel may remember an old one; fsync is what makes the length known to others, and after
    it the length is looked at; a name that was looked for in vain stays unknown for a while. What
    LocalStore does anyhow is needed here: link(2) to be exclusive, a file that is thrown away
    after an error of fsync or close (lost bytes are told once), and no lock, no xattr, no rename.
    """

    visibility_lag_seconds = NEGATIVE_SECONDS

    def __init__(
        self,
        root: str,
        url: str,
        make_client: Callable[[str], Client] | None,
        *,
        ring_bytes_min: int = RING_BYTES_MIN,
        entries: int = ENTRIES,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        super().__init__(root)
        self._tree = MountedTree(root)
        self._url = url
        self._make_client = make_client
        self._ring_bytes_min = ring_bytes_min
        self._entries = entries
        self._patience_seconds = patience_seconds
        self._shared = SharedMemory()
        self._session: Session | None = None
        self._session_lock = threading.Lock()
        self._refused_until = 0.0
        self._counting = threading.Lock()
        self.copied_bytes = 0
        """Bytes of objects that were copied on their way into a ring, ever."""
        self.ring_bytes = 0
        """Bytes of objects that were written over a ring, ever."""

    @property
    def url(self) -> str:
        """As `Store.url`."""
        return self._url

    def share(self, memory: memoryview, path: str) -> None:
        """As `Store.share`: the daemon of the mount reads shared memory where it lies."""
        if self._make_client is not None:
            self._shared.add(memory, path)

    def unshare(self, memory: memoryview) -> None:
        """As `Store.unshare`."""
        registered = self._shared.remove(memory)
        if registered is not None:
            _in_background(lambda: close_quietly([registered]))

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """As `Store.get_many`, with all ranges in flight over one ring."""
        for one in wanted:
            check_key(one.key)
        if not wanted:
            return
        if not await self._calls.run(wanted[0].key, self._read_all(wanted)):
            await super().get_many(wanted)

    async def examine(self, key: str, put_between: tuple[float, float]) -> Sequence[Finding]:
        """As `Store.examine`: the clock, and the rules of the mount."""
        parts = check_key(key).split("/")

        def look(_call: Call[Any]) -> list[Finding]:
            with self._object(key, parts) as (_, descriptor):
                return findings_of(descriptor)

        of_clock = await super().examine(key, put_between)
        return [*of_clock, *await self._calls.run(key, look)]

    async def aclose(self) -> None:
        """As `Store.aclose`."""
        await super().aclose()
        loop, closed = asyncio.get_running_loop(), asyncio.Event()

        def close() -> None:
            with self._session_lock:
                session, self._session = self._session, None
            if session is not None:
                session.close()
                close_quietly(self._shared.forget())
            with suppress(RuntimeError):  # nobody waits any more
                loop.call_soon_threadsafe(closed.set)

        _in_background(close)
        with suppress(TimeoutError):  # left to a daemon that hangs
            async with asyncio.timeout(CLOSE_SECONDS):
                await closed.wait()

    # -- the three steps that differ ------------------------------------------------------------

    def _write_bytes(self, call: Call[Any], descriptor: int, buffers: Buffers) -> None:
        nbytes = sum(map(len, buffers))
        session = self._rings(descriptor) if nbytes >= self._ring_bytes_min else None
        if session is None:
            # At most 16 MiB at a time from the first byte on: whole chunks of any size up to
            # that, and appends to larger ones, which 3FS does in place.
            write_all(descriptor, buffers, call.check)
        elif nbytes:
            self._write_over_ring(session, call, descriptor, buffers)
        os.fsync(descriptor)
        _check_length(call.subject, descriptor, nbytes)

    def _write_over_ring(
        self, session: Session, call: Call[Any], descriptor: int, buffers: Buffers
    ) -> None:
        writing: list[Writing] = []

        def work(rooms: Rooms) -> Moves:
            writing.append(
                Writing(
                    descriptor,
                    buffers,
                    rooms,
                    lambda view: self._shared.find(view, session.client),
                    call.subject,
                )
            )
            return writing[0].transfers(), writing[0].finished

        session.run(for_read=False, work=work, check=call.check)
        with self._counting:
            self.copied_bytes += writing[0].copied_bytes
            self.ring_bytes += sum(map(len, buffers))

    def _size(self, descriptor: int, end: int | None) -> int:
        """As the daemon knows it, unless what the kernel remembers is enough."""
        remembered = os.fstat(descriptor).st_size
        if end is not None and end <= remembered:
            return remembered
        return fresh_size(descriptor)

    def _read_bytes(
        self, key: str, descriptor: int, offset: int, into: memoryview, call: Call[Any]
    ) -> None:
        session = self._rings(descriptor) if len(into) >= self._ring_bytes_min else None
        if session is None or not len(into):
            super()._read_bytes(key, descriptor, offset, into, call)
        else:
            self._read_over_ring(session, call, [Range(descriptor, offset, into, key)])

    # -- rings ------------------------------------------------------------------------------------

    def _read_all(self, wanted: Sequence[Wanted]) -> Work[bool]:
        """The work of `get_many`: False where there are no rings."""

        def read(call: Call[Any]) -> bool:
            rest = list(wanted)
            while rest:
                with ExitStack() as stack:
                    files: dict[str, int] = {}
                    batch: list[Range] = []
                    while rest and (rest[-1].key in files or len(files) < FILES_MAX):
                        batch.append(self._range_of(rest.pop(), files, stack))
                    session = self._rings(batch[0].descriptor)
                    if session is None:
                        return False
                    self._read_over_ring(session, call, batch)
            return True

        return read

    def _range_of(self, wanted: Wanted, files: dict[str, int], stack: ExitStack) -> Range:
        if wanted.key not in files:
            _, files[wanted.key] = stack.enter_context(
                self._object(wanted.key, wanted.key.split("/"))
            )
        descriptor = files[wanted.key]
        size = self._size(descriptor, wanted.offset + len(wanted.into))
        range_length(wanted.key, size, wanted.offset, None, wanted.into)
        return Range(descriptor, wanted.offset, wanted.into, wanted.key)

    def _read_over_ring(self, session: Session, call: Call[Any], ranges: list[Range]) -> None:
        def work(rooms: Rooms) -> Moves:
            reading = Reading(ranges, rooms, call.deliver)
            return reading.transfers(), reading.finished

        session.run(for_read=True, work=work, check=call.check)

    def _rings(self, descriptor: int) -> Session | None:
        """The session with the daemon that serves the mount now; None where there can be none.

        Raises:
            StoreUnreachableError: the root is on no 3FS mount, or its daemon is gone.
        """
        with self._session_lock:
            if self._session is not None and self._session.lost:
                session, registered = self._session, self._shared.forget()
                self._session = None
                _in_background(session.close)
                _in_background(lambda: close_quietly(registered))
            wanted = self._make_client is not None and time.monotonic() >= self._refused_until
            if self._session is None and wanted:
                self._session = self._new_session(descriptor)
            return self._session

    def _new_session(self, descriptor: int) -> Session | None:
        assert self._make_client is not None
        try:
            virtual = virtual_directory(descriptor)
            client = self._make_client(virtual)
            session = Session(
                virtual,
                client,
                os.fstat(descriptor).st_blksize,
                entries=self._entries,
                patience_seconds=self._patience_seconds,
            )
        except OSError as error:
            if error.errno in _GONE:
                raise
            self._refused_until = time.monotonic() + REFUSED_SECONDS
            _tell(logging.WARNING, "rings_refused", why=str(error))
            return None
        _tell(logging.INFO, "rings_opened", client=client.name)
        return session


def _in_background(work: Callable[[], None]) -> None:
    """In a thread that nobody waits for: it hangs if the daemon of the mount does."""
    threading.Thread(target=work, name="ckptmgr-hf3fs-close", daemon=True).start()


def _check_length(key: str, descriptor: int, nbytes: int) -> None:
    """Whether the mount knows all bytes that it took.

    Raises:
        StoreUnreachableError: it does not; the file is to be thrown away.
    """
    found = fresh_size(descriptor)
    if found != nbytes:
        raise StoreUnreachableError(
            f"the mount took {nbytes} bytes and keeps {found}",
            subject=key,
            hint="Look whether usr.dryrun_bench_mode is set on the mount.",
        )


def _tell(level: int, event: str, **fields: str) -> None:
    """An event in the daemon's log (README.md lists them)."""
    _LOGGER.log(level, event, extra={"fields": fields})
