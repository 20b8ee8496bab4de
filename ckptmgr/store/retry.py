"""Deadlines and retries around any store, and the read-back that settles an ambiguous put."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from ckptmgr.config import MIB, STORE_TIMEOUT_SECONDS
from ckptmgr.errors import (
    DamageError,
    MediumError,
    ObjectUnreadableError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)
from ckptmgr.store.base import Buffers, PutResult, Store, Wanted

BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 10.0
"""Longest pause is random in [0, this]: short enough that a store that is back is used at once,
long enough that 10,000 daemons together ask a broken store 2,000 times a second."""

BYTES_PER_SECOND_MIN = 1 * MIB
"""A try gets one second more for each of these, so that a slow link is not taken for a dead one."""

UNREADABLE_TRIES = 6
"""Tries to read an object over which the medium fails, before another object is read to tell
whether it is this one only: 3 s at most. Bad sectors stay bad, and a step before is waiting."""

COMPARE_BYTES = 4 * MIB
"""Most that is read at once when an object is compared with what was to be written."""

T = TypeVar("T")

OnFailure = Callable[[str, Exception], None]
"""Told of each failed try: the name of the operation and its error."""

OnAnswer = Callable[[str, float], None]
"""Told of each try that worked: the name of the operation, and its seconds without pauses."""

OnRetry = Callable[[str], None]
"""Told of each try after one that failed: the name of the operation."""

Pace = Callable[[int], Awaitable[None]]
"""Awaited before so many bytes of objects are moved; waits as long as a limit asks."""


def ignore(*_told: object) -> None:
    """Nobody is told."""


async def _at_once(_nbytes: int) -> None:
    pass


def _backoff_seconds(failed: int) -> float:
    """Longest pause after `failed` tries in a row."""
    return min(BACKOFF_SECONDS_MIN * 2.0 ** min(failed - 1, 30), BACKOFF_SECONDS_MAX)


def _silence(operation: str, subject: str, failed: int) -> StoreUnreachableError:
    """What a timeout of the last try is to the caller."""
    return StoreUnreachableError(
        f"{operation} got no answer in time ({failed} tries)", subject=subject
    )


def _told(error: Exception, what: str, seconds: float) -> Exception:
    """What failed a try, where a timeout says nothing by itself."""
    if str(error):
        return error
    return TimeoutError(f"{what} got no answer in {seconds:.1f} s")


def _worth_retrying(error: Exception) -> bool:
    """Full and refused do not pass by themselves: to wait for a person is the caller's choice."""
    if isinstance(error, (StoreFullError, StorePermissionError)):
        return False
    return isinstance(error, (StoreUnreachableError, TimeoutError))


class RetryingStore(Store):
    """`inner` with a deadline on every operation.

    Each try may take `timeout_seconds` (more for many bytes, see BYTES_PER_SECOND_MIN; and so long
    anew for each page of a listing, because nobody knows before how many there are); tries
    follow each other with exponential backoff and full jitter until `deadline_seconds` are over,
    then the last error is raised. Only `StoreUnreachableError` and timeouts are retried, and not
    its subclasses for a full store or refused access. `jitter()` gives numbers in [0, 1).

    `landmark` is the key of an object that every such store holds. Where it can be read, and
    another object has failed UNREADABLE_TRIES times by `MediumError`, that object is damaged.

    `pace` is awaited before the bytes of each try, outside its deadlines. A read to the end of an
    object, whose length nobody knows before, is paced afterwards.
    """

    def __init__(
        self,
        inner: Store,
        *,
        timeout_seconds: float = STORE_TIMEOUT_SECONDS,
        deadline_seconds: float = 4 * STORE_TIMEOUT_SECONDS,
        jitter: Callable[[], float] = random.random,
        landmark: str = "",
        on_failure: OnFailure = ignore,
        on_answer: OnAnswer = ignore,
        on_retry: OnRetry = ignore,
        pace: Pace = _at_once,
    ) -> None:
        self.durable_on_return = inner.durable_on_return
        self.visibility_lag_seconds = inner.visibility_lag_seconds
        self.exclusive = inner.exclusive
        self._inner = inner
        self._timeout_seconds = timeout_seconds
        self._deadline_seconds = deadline_seconds
        self._jitter = jitter
        self._landmark = landmark
        self._on_failure = on_failure
        self._on_answer = on_answer
        self._on_retry = on_retry
        self._pace = pace

    @property
    def url(self) -> str:
        """As `Store.url`."""
        return self._inner.url

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """As `Store.put_new`; a CONFLICT with an object that an earlier try of this very call
        wrote is OK.
        """
        count = sum(map(len, buffers))
        result, failed = await self._tries(
            "put_new", key, lambda _: self._inner.put_new(key, buffers), count
        )
        if result is PutResult.CONFLICT and failed and await self._is_ours(key, buffers):
            await self.make_durable(key)
            return PutResult.OK
        return result

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """As `Store.get`.

        Raises:
            ObjectUnreadableError: this object stays unreadable, and the landmark can be read.
        """
        count = len(into) if into is not None else (length or 0)
        unreadable = 0

        async def read(_: asyncio.Timeout) -> memoryview:
            nonlocal unreadable
            try:
                return await self._inner.get(key, offset, length, into)
            except MediumError as error:
                unreadable += 1
                if unreadable >= UNREADABLE_TRIES and await self._others_can_be_read(key):
                    raise ObjectUnreadableError(error.message, subject=key) from error
                raise

        found, _ = await self._tries("get", key, read, count)
        await self._pace(len(found) - count)  # nothing, where it was known
        return found

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """As `Store.get_many`: one try for all, then each by `get`, so that an error is of one
        object and what can be read is read.
        """
        count = sum(len(one.into) for one in wanted)
        await self._pace(count)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_seconds + count / BYTES_PER_SECOND_MIN):
                await self._inner.get_many(wanted)
            self._on_answer("get_many", time.monotonic() - begun)
        except (StoreUnreachableError, TimeoutError) as error:
            what, seconds = f"get_many of {len(wanted)} parts", time.monotonic() - begun
            self._on_failure("get_many", _told(error, what, seconds))
            await super().get_many(wanted)

    def came_damaged(self, error: DamageError) -> None:
        """A reader found that what `get` brought does not hold, and reads it again."""
        self._on_failure("get", error)

    async def _others_can_be_read(self, key: str) -> bool:
        if self._landmark in ("", key):
            return False
        try:
            await self._inner.get(self._landmark)
        except StoreError:
            return False
        return True

    async def uncache(self, key: str) -> None:
        """As `Store.uncache`, once: what can not be dropped is not, and a read tells why."""
        await self._perhaps(self._inner.uncache(key))

    async def prune(self, prefix: str) -> None:
        """As `Store.prune`, once: what is kept costs a little time, and nothing else."""
        await self._perhaps(self._inner.prune(prefix))

    async def _perhaps(self, work: Awaitable[None]) -> None:
        with suppress(StoreError, TimeoutError):
            async with asyncio.timeout(self._timeout_seconds):
                await work

    def share(self, memory: memoryview, path: str) -> None:
        """As `Store.share`."""
        self._inner.share(memory, path)

    def unshare(self, memory: memoryview) -> None:
        """As `Store.unshare`."""
        self._inner.unshare(memory)

    async def list(self, prefix: str) -> list[str]:
        """As `Store.list`."""

        async def listed(limit: asyncio.Timeout) -> list[str]:
            found: list[str] = []
            async for page in self._inner.list_pages(prefix):
                found += page
                limit.reschedule(asyncio.get_running_loop().time() + self._timeout_seconds)
            return sorted(found)

        keys, _ = await self._tries("list", prefix, listed)
        return keys

    async def delete(self, key: str) -> None:
        """As `Store.delete`."""
        await self._tries("delete", key, lambda _: self._inner.delete(key))

    async def make_durable(self, key: str) -> None:
        """As `Store.make_durable`."""
        await self._tries("make_durable", key, lambda _: self._inner.make_durable(key))

    async def aclose(self) -> None:
        """As `Store.aclose`."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._inner.aclose()
        except TimeoutError as error:
            raise _silence("aclose", self.url, 1) from error

    async def _tries(
        self,
        operation: str,
        subject: str,
        work: Callable[[asyncio.Timeout], Awaitable[T]],
        nbytes: int = 0,
    ) -> tuple[T, int]:
        """The result of the first try that works, and how many failed before it. `work` is given
        the limit of its try, to move it where it sees that the store goes on.
        """
        ends_at = time.monotonic() + self._deadline_seconds + nbytes / BYTES_PER_SECOND_MIN
        failed = 0
        reason: StoreError | None = None
        while True:
            begun = time.monotonic()
            await self._pace(nbytes)
            ends_at += time.monotonic() - begun
            left = max(ends_at - time.monotonic(), 0.0)
            patience = min(self._timeout_seconds + nbytes / BYTES_PER_SECOND_MIN, left)
            begun = time.monotonic()
            try:
                async with asyncio.timeout(patience) as limit:
                    found = await work(limit)
                self._on_answer(operation, time.monotonic() - begun)
                return found, failed
            except (StoreUnreachableError, TimeoutError) as error:
                failed += 1
                what, seconds = f"{operation} {subject}".rstrip(), time.monotonic() - begun
                self._on_failure(operation, _told(error, what, seconds))
                if isinstance(error, StoreError):
                    reason = error
                pause = self._jitter() * _backoff_seconds(failed)
                if not _worth_retrying(error) or time.monotonic() + pause >= ends_at:
                    if reason is not None:  # says more than that time is over
                        raise reason from None
                    raise _silence(operation, subject, failed) from error
            await asyncio.sleep(pause)
            self._on_retry(operation)

    async def _is_ours(self, key: str, buffers: Buffers) -> bool:
        """Whether `key` holds exactly `buffers`; of an object that is gone again, False unless
        `buffers` are empty.
        """
        offset = 0
        for buffer in buffers:
            for start in range(0, len(buffer), COMPARE_BYTES):
                piece = bytes(buffer[start : start + COMPARE_BYTES])
                if await self._bytes_at(key, offset, len(piece)) != piece:
                    return False
                offset += len(piece)
        return await self._bytes_at(key, offset, 1) is None

    async def _bytes_at(self, key: str, offset: int, length: int) -> bytes | None:
        """None where the object ends before, or is not there."""
        try:
            # Not `get`: an object that can not be read is not known to be another's.
            found, _ = await self._tries("get", key, lambda _: self._inner.get(key, offset, length))
            return bytes(found)
        except StoreUnreachableError:
            raise
        except StoreError:
            return None
