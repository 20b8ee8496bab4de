"""Reading a store that has a mirror: what the first one does not give is read from the second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit

from ckptmgr.config import store_timeout_seconds
from ckptmgr.errors import (
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
    UsageError,
)
from ckptmgr.store.base import Buffers, PutResult, Store, Wanted
from ckptmgr.store.registry import OF_PATHS, normalise_url, open_store
from ckptmgr.store.retry import OnFailure, RetryingStore, ignore

AGAIN_SECONDS = 30.0
"""How long a store that did not answer is not asked again: each of its deadlines is minutes."""

_HEALED = ("data/", "man/", "commit/")
"""What the mirror is asked for where the first store answers that it is not there. Everything else
may be missing by right, and only the first store knows."""

_HASHED = ("data/", "man/")
"""What a commit tells the hashes of: whoever gives the bytes, they are the right ones or damage, if
the commit was."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Terms:
    """On which a mirror is read, from whoever knows what the objects mean.

    `landmark` is the object without which a place is no store. `same` tells whether the second
    store is a copy of the first, and not of another job that was there before; None where nothing
    tells. `read` hears of each object that came from the mirror, and why; `refused` that the mirror
    is no copy, and not read.
    """

    landmark: str
    same: Callable[[Store, Store], Awaitable[bool | None]]
    read: Callable[[str, str], None]
    refused: Callable[[], None]


def place_of(mirror: str, url: str) -> str:
    """The URL of a job's copy below a mirror: its scheme, its host and its path.

    Raises:
        UsageError: one of them is not a URL, or the job's leads out of the mirror.
    """
    mirror, parts = normalise_url(mirror), urlsplit(normalise_url(url))
    path = "/".join(filter(None, (parts.netloc, parts.path.strip("/"))))
    named = unquote(path) if parts.scheme in OF_PATHS else path
    if {".", ".."} & set(named.split("/")):
        raise UsageError("leads out of a mirror", subject=url, hint="Leave out '.' and '..'.")
    path = quote(named) if urlsplit(mirror).scheme in OF_PATHS else path
    if parts.query:
        path += f"-{blake2b(parts.query.encode(), digest_size=4).hexdigest()}"
    base, question, query = mirror.partition("?")
    return f"{base}/{parts.scheme}/{path}{question}{query}"


def open_for_reading(url: str, mirror: str, terms: Terms, *, objects: bool) -> Store:
    """The store at `url`, behind it its place below `mirror` if there is one.

    Raises:
        UsageError: one of them names no store.
    """
    seconds = store_timeout_seconds()
    if not mirror:
        return RetryingStore(
            open_store(url),
            timeout_seconds=seconds,
            deadline_seconds=4 * seconds,
            landmark=terms.landmark,
        )

    places = url, place_of(mirror, url)
    first, copy = (patient(place, seconds, terms.landmark) for place in places)
    return MirroredStore(first, copy, terms, objects=objects)


def patient(
    url: str, timeout_seconds: float, landmark: str, on_failure: OnFailure = ignore
) -> RetryingStore:
    """A store beside which there is another to read from: one deadline is patience enough.

    Raises:
        UsageError: the URL names no store.
    """
    return RetryingStore(
        open_store(url),
        timeout_seconds=timeout_seconds,
        deadline_seconds=timeout_seconds,
        landmark=landmark,
        on_failure=on_failure,
    )


class MirroredStore(Store):
    """For readers: `first`, and where that fails its copy `mirror`. The puts of readers are holds,
    which go where is read, and from there when they are released.

    All of the mirror stands in for a first store that does not answer, or that has lost even its
    landmark. With `objects`, single objects do, too. A register is believed only of a mirror that
    is proven to be a copy at that moment; one that is proven to be none is not read at all. A first
    store that never answered contradicts nothing.
    """

    def __init__(self, first: Store, mirror: Store, terms: Terms, *, objects: bool = True) -> None:
        self.durable_on_return = first.durable_on_return and mirror.durable_on_return
        self.visibility_lag_seconds = max(
            first.visibility_lag_seconds, mirror.visibility_lag_seconds
        )
        self.exclusive = first.exclusive
        self.first, self.mirror = first, mirror
        self._terms = terms
        self._objects = objects
        self._again_at = {first: 0.0, mirror: 0.0}
        self._known = False
        self._same: bool | None = None
        self._placed: dict[str, set[Store]] = {}

    @property
    def url(self) -> str:
        """As `Store.url`, of the first."""
        return self.first.url

    def healed(self, key: str, why: str) -> None:
        """An object was read from the mirror."""
        self._terms.read(key, why)

    async def heals(self, key: str) -> bool:
        """Whether an object may be read from the mirror now, though the first store answers."""
        if not (self._objects and self._answers(self.mirror)):
            return False
        hashed = key.startswith(_HASHED)
        if hashed and self._same:
            return True
        same = await self._compared()
        return same is True or (hashed and not self._refused())

    def _answers(self, store: Store) -> bool:
        return time.monotonic() >= self._again_at[store]

    def _silent(self, store: Store) -> None:
        self._again_at[store] = time.monotonic() + AGAIN_SECONDS

    def _refused(self) -> bool:
        return self._same is False

    async def _compared(self) -> bool | None:
        """Whether the mirror is a copy of the first store; None where they do not tell now."""
        try:
            same = await self._terms.same(self.first, self.mirror)
        except StoreError:
            return None
        if same is False and self._same is not False:
            self._terms.refused()
        self._same = same
        return same

    async def _stand_in(self, error: StoreUnreachableError) -> None:
        """Let the mirror stand in for a first store that did not answer.

        Raises:
            StoreUnreachableError: `error`, where the mirror is no copy.
        """
        await self._compared()  # whatever did not answer one question may answer another
        if self._refused():
            raise error
        self._silent(self.first)

    async def _stands(self) -> bool:
        """Whether the first store is to be asked: it answers, and is one, or there is no other."""
        if self._refused():
            return True
        if not self._answers(self.first):
            return False
        if self._known:
            return True
        try:
            await self.first.get(self._terms.landmark, length=0)
            self._known = True
        except StoreUnreachableError as error:
            self._silent(self.first)
            self._terms.read(self.first.url, error.message)
        except ObjectNotFoundError:
            try:
                await self.mirror.get(self._terms.landmark, length=0)
            except StoreError:
                return True  # neither is a store yet
            await self._compared()
            if self._refused():
                return True
            self._silent(self.first)
            self._terms.read(self.first.url, "is not a store any more")
        return self._answers(self.first)

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """As `Store.get`, of whichever has the object."""
        if not await self._stands():
            return await self.mirror.get(key, offset, length, into)
        try:
            return await self.first.get(key, offset, length, into)
        except StoreUnreachableError as error:
            await self._stand_in(error)
            return await self._from_mirror(error, key, offset, length, into)
        except StoreError as error:
            if not (key.startswith(_HEALED) and await self.heals(key)):
                raise
            return await self._from_mirror(error, key, offset, length, into)

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """As `Store.get_many`: all from the first, or each from whichever has it."""
        if await self._stands():
            with contextlib.suppress(StoreError):
                await self.first.get_many(wanted)
                return
        await super().get_many(wanted)

    async def _from_mirror(
        self,
        error: StoreError,
        key: str,
        offset: int,
        length: int | None,
        into: memoryview | None,
    ) -> memoryview:
        if not self._answers(self.mirror):
            raise error
        try:
            found = await self.mirror.get(key, offset, length, into)
        except StoreUnreachableError:
            self._silent(self.mirror)
            raise error from None
        except StoreError:
            raise error from None
        self._terms.read(key, error.message)
        return found

    async def list(self, prefix: str) -> list[str]:
        """As `Store.list`: what the first tells is the truth wherever it tells anything."""
        if await self._stands():
            try:
                return await self.first.list(prefix)
            except StoreUnreachableError as error:
                await self._stand_in(error)
                self._terms.read(self.first.url, error.message)
        return await self.mirror.list(prefix)

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """As `Store.put_new`, where is read."""
        places = self._placed.setdefault(key, set())
        if await self._stands():
            places.add(self.first)  # also one that does not answer may have taken it
            try:
                return await self.first.put_new(key, buffers)
            except (StoreFullError, StorePermissionError):
                raise
            except StoreUnreachableError as error:
                await self._stand_in(error)
        places.add(self.mirror)
        return await self.mirror.put_new(key, buffers)

    async def delete(self, key: str) -> None:
        """As `Store.delete`, wherever it was put; what was not put here, where is read."""
        places = self._placed.pop(key, None)
        if not places:
            places = {self.first if await self._stands() else self.mirror}
        deletes = (store.delete(key) for store in places)
        for result in await asyncio.gather(*deletes, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def uncache(self, key: str) -> None:
        """As `Store.uncache`, of the first."""
        await self.first.uncache(key)

    async def prune(self, prefix: str) -> None:
        """As `Store.prune`, where is read."""
        await (self.first if await self._stands() else self.mirror).prune(prefix)

    async def make_durable(self, key: str) -> None:
        """As `Store.make_durable`, where is read."""
        await (self.first if await self._stands() else self.mirror).make_durable(key)

    async def aclose(self) -> None:
        """As `Store.aclose`, of both."""
        try:
            await self.first.aclose()
        finally:
            await self.mirror.aclose()


async def from_either(store: Store, key: str, read: Callable[[Store], Awaitable[T]]) -> T:
    """What `read` makes of an object; where that does not hold, of a second reading of it, and then
    of its copy: a line may change a byte, and what is stored be whole.

    Raises:
        DamageError: none of them holds; it tells of the first store.
    """
    try:
        return await _read_twice(store, read)
    except DamageError as error:
        if not (isinstance(store, MirroredStore) and await store.heals(key)):
            raise
        try:
            found = await _read_twice(store.mirror, read)
        except (StoreError, DamageError):
            raise error from None
        store.healed(key, error.message)
        return found


async def _read_twice(store: Store, read: Callable[[Store], Awaitable[T]]) -> T:
    try:
        return await read(store)
    except MissingObjectError:
        raise
    except DamageError as error:
        came_damaged(store, error)
    return await read(store)


def came_damaged(store: Store, error: DamageError) -> None:
    """Tell of bytes that did not hold and are read again, as of any try that failed."""
    if isinstance(store, MirroredStore):
        store = store.first
    if isinstance(store, RetryingStore):
        store.came_damaged(error)
