"""Carry transfers out over one ring: keep it full, match what comes back, wait for ever never."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

from ckptmgr.config import MIB
from ckptmgr.errors import StoreError, StoreUnreachableError
from ckptmgr.store.posix import store_error
from ckptmgr_hf3fs.client import Ring, Transfer

LOOK_SECONDS = 0.2
"""How often a wait looks whether the daemon of the mount still lives, and its caller."""

PATIENCE_SECONDS = 90.0
"""Longest time in which nothing of what is in a ring comes back. The client of 3FS itself tries for
60 s to reach the storage, and answers with an error then: more can only be a daemon that hangs."""

SUBMIT_BYTES = 1 * MIB
"""Prepared bytes at which the daemon is woken: it then moves them while the next are copied, and
small transfers still come to it in batches."""

_DONE = object()

_UNREGISTERED = {errno.EACCES, errno.EBADF, errno.EINVAL}
"""Answers of a daemon that does not know the memory or the file: it is not the one we know."""

_tokens = count(1)
"""Tokens are unique in this process: a late answer is never taken for that of another transfer."""


class RingsLostError(StoreUnreachableError):
    """The daemon of the mount is gone, hangs, or knows nothing of our memory. Whatever was in a
    ring may still be read or written: neither ring nor memory is used again.
    """

    default_hint = "Look at the mount's daemon (hf3fs_fuse_main); saves resume by themselves."


@dataclass(slots=True)
class _Pending:
    whole: Transfer
    rest: Transfer


class Carrier:
    """One use of a ring. `work` yields transfers, or None while there is no room for the next one;
    `finished` is told of each when all its bytes have moved. `lost` says why the daemon of the
    mount is known to be gone, or ''. `check` raises when the caller has given up.
    """

    def __init__(
        self,
        ring: Ring,
        work: Iterator[Transfer | None],
        finished: Callable[[Transfer], None],
        lost: Callable[[], str],
        check: Callable[[], None],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._ring = ring
        self._work = work
        self._finished = finished
        self._lost = lost
        self._check = check
        self._patience_seconds = patience_seconds
        self._pending: dict[int, _Pending] = {}
        self._again: deque[_Pending] = deque()
        self._failure: Exception | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is in the ring: it can be used again, and all memory with it."""
        return not self._pending

    def run(self) -> None:
        """Return when all is done, and nothing of it is in the ring any more.

        After a failure no more is prepared, and what is under way is waited for: its memory is
        the caller's again, whatever is raised, unless it is RingsLostError.

        Raises:
            RingsLostError: what is in the ring does not come back.
            StoreError: a transfer failed; the first one that did.
        """
        since = time.monotonic()
        while True:
            self._guarded(self._check)
            if self._failure is None:
                self._guarded(self._fill)
            if not self._pending:
                break
            for token, result in self._ring.finished(LOOK_SECONDS):
                self._take(token, result)
                since = time.monotonic()
            why = self._lost()
            if not why and time.monotonic() - since > self._patience_seconds:
                why = f"nothing came back in {self._patience_seconds:g} s"
            if why and self._pending:
                raise RingsLostError(
                    f"{len(self._pending)} transfers are lost: {why}",
                    subject=next(iter(self._pending.values())).whole.subject,
                )
        if self._failure is not None:
            raise self._failure

    def _guarded(self, step: Callable[[], None]) -> None:
        """Keep a failure for the end: what is in the ring must come back first."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - raised by `run`, when the ring is empty
            self._failure = self._failure or error

    def _fill(self) -> None:
        """Prepare as many transfers as there is room for, and wake the daemon."""
        prepared_bytes = 0
        while len(self._pending) < self._ring.entries:
            if not self._again:
                transfer = next(self._work, _DONE)
                if not isinstance(transfer, Transfer):
                    assert transfer is _DONE or self._pending, "rooms are taken and not in flight"
                    break
                self._again.append(_Pending(transfer, transfer))
            try:
                token = next(_tokens)
                self._ring.prepare(self._again[0].rest, token)
            except BlockingIOError:
                if not self._pending:
                    raise RingsLostError("an empty ring says that it is full") from None
                break
            self._pending[token] = entry = self._again.popleft()
            prepared_bytes += entry.rest.nbytes
            if prepared_bytes >= SUBMIT_BYTES:
                self._ring.submit()
                prepared_bytes = 0
        if prepared_bytes:
            self._ring.submit()

    def _take(self, token: int, result: int) -> None:
        found = self._pending.pop(token, None)
        if found is None:
            raise RingsLostError(f"the daemon answers what was not asked (token {token})")
        if result <= 0:
            self._failure = self._failure or failure_of(result, found.rest)
        elif result > found.rest.nbytes:
            raise RingsLostError(f"{result} bytes moved, {found.rest.nbytes} were asked for")
        elif result < found.rest.nbytes:
            found.rest = found.rest.rest(result)
            self._again.append(found)
        else:
            self._guarded(lambda: self._finished(found.whole))


def failure_of(result: int, transfer: Transfer) -> StoreError:
    """What an answer that moved no bytes is to the caller."""
    number = -result
    at = f"at byte {transfer.file_offset}"
    if number == errno.ENODATA:
        return StoreError(
            f"has a hole {at}: a chunk of the file is missing", subject=transfer.subject
        )
    if number == 0:
        return StoreError(f"is too short: it ends {at}, or has a hole", subject=transfer.subject)
    if number in _UNREGISTERED:
        name = errno.errorcode[number]
        return RingsLostError(
            f"the daemon knows memory or file no more ({name})", subject=transfer.subject
        )
    return store_error(OSError(number, os.strerror(number)), transfer.subject)
