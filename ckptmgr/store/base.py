"""The store contract: six methods over named, immutable objects, and three declared constants.

Nothing is ever overwritten, and no method takes a lock or reads a clock. Every implementation
passes `ckptmgr.testing.StoreSuite`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum

from ckptmgr.errors import StoreError, UsageError
from ckptmgr.store.finding import Finding
from ckptmgr.store.lanes import in_lanes

Buffers = Sequence[memoryview]
"""Contiguous byte views that are written one after the other."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bytes of one object that `get_many` brings: len(into) of them, from `offset` on."""

    key: str
    offset: int
    into: memoryview


class PutResult(Enum):
    """What `put_new` did."""

    OK = "ok"
    CONFLICT = "conflict"


_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")


def check_key(key: str) -> str:
    """Return `key` if it is safe on every store: segments of [A-Za-z0-9._-], joined by '/'.

    Raises:
        UsageError: an empty segment, '..', a leading dot, another character, or too long.
    """
    if len(key) > 512 or not _KEY.fullmatch(key):
        raise UsageError("is not a valid key", subject=repr(key))
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if `list` takes it: '' or a valid key followed by one '/'.

    Raises:
        UsageError: anything else.
    """
    if prefix and not prefix.endswith("/"):
        raise UsageError("is not a prefix: it must be '' or end with '/'", subject=repr(prefix))
    if prefix:
        check_key(prefix[:-1])
    return prefix


def range_length(
    key: str, size: int, offset: int, length: int | None, into: memoryview | None
) -> int:
    """Bytes that `get` returns from an object of `size` bytes.

    Raises:
        UsageError: a negative offset or length.
        StoreError: the object "is too short".
    """
    wanted = len(into) if into is not None else length
    if offset < 0 or (wanted is not None and wanted < 0):
        raise UsageError("can not be read at a negative offset or length", subject=key)
    if wanted is None:
        wanted = max(size - offset, 0)
    if offset + wanted > size:
        raise StoreError(
            f"is too short: {size} bytes, bytes {offset} to {offset + wanted} are wanted",
            subject=key,
        )
    return wanted


def range_of(
    key: str, blob: memoryview, offset: int, length: int | None, into: memoryview | None
) -> memoryview:
    """What `get` returns of an object whose bytes are in memory; errors as `range_length`."""
    found = blob[offset : offset + range_length(key, len(blob), offset, length, into)]
    if into is None:
        return found
    into[:] = found
    return into


class Store(ABC):
    """Named, immutable objects: six methods to write. `get_many`, `uncache`, `prune`, and `share`
    with `unshare`, are for a store that can be faster, or read closer to its medium, with them;
    `list_pages` is for one that is asked for keys page by page, `examine` for one that can be
    misconfigured.

    Errors of every method: `StoreUnreachableError` (or a subclass) where a retry may help, of which
    `MediumError` may be a fault of this one object; `StoreError` where it will not; `UsageError`
    for a bad key or prefix. Cancelling a call leaves its outcome unknown, but once a call has ended
    in any way `into` is not written any more, and bytes that `buffers` get afterwards never become
    part of an object. A call that returned keeps no view of `buffers` or `into`.
    """

    durable_on_return: bool = True
    """Whether an object that `get` or `list` shows is already on stable storage, whoever wrote
    it. Where False, `make_durable` must be called before relying on another writer's object."""

    visibility_lag_seconds: float = 0.0
    """Longest time after `put_new` returned during which `get` or `list` may not show it."""

    exclusive: bool | None = True
    """Whether of concurrent `put_new` of one key exactly one gets OK. None where that is the
    server's business and not known: it is proved by a race before a decision rests on it."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL it was opened with, without credentials."""

    @abstractmethod
    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """Create `key` with the concatenation of `buffers`, or do nothing and say CONFLICT.

        Exclusive and atomic: of any number of concurrent callers exactly one gets OK, and no
        reader ever sees a part. Returns OK only when object and name are on stable storage.
        After an error the object may or may not exist; if it exists it is whole.
        """

    @abstractmethod
    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """Read `length` bytes from `offset` (to the end if None).

        With `into`, reads exactly len(into) bytes into it and returns it; `length` is ignored.

        Raises:
            ObjectNotFoundError: no such key.
            StoreError: the object ends before the range does (message "is too short").
        """

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """Fill every `into`, in any order; a store that serves many ranges at once overrides it.

        Errors are those of `get`, for one of the objects; the others may be filled or not.
        """
        get = self.get
        await in_lanes(lambda one: get(one.key, one.offset, into=one.into), wanted, len(wanted))

    def share(self, memory: memoryview, path: str) -> None:  # noqa: B027 - most need do nothing
        """Say that `memory` maps the whole file `path`, from its first byte on.

        A store that can hand a file's pages to its server overrides it: buffers of `put_new` that
        lie in shared memory then need not be copied. It changes nothing else. `memory` stays
        mapped until `unshare`, because a view of it is kept. Returns at once, and never fails:
        what can not be used is not.
        """

    def unshare(self, memory: memoryview) -> None:  # noqa: B027 - most need do nothing
        """End a `share` and let go of `memory`; what was never shared is no error."""

    async def uncache(self, key: str) -> None:  # noqa: B027 - most have nothing to drop
        """Drop what this host's page cache holds of `key`, so that the next `get` reads the medium.

        A store on this host's file systems overrides it. It changes nothing else, and what can not
        be dropped is not; a key that does not exist is no error.
        """

    async def prune(self, prefix: str) -> None:  # noqa: B027 - most keep nothing but objects
        """Let go of what is kept for `prefix` beside objects, such as directories that are empty.

        `prefix` ends with "/", and nobody needs to find what is put there from now on: it belongs
        to a step that was given up. Objects stay, also those that are put meanwhile, and nothing
        else can be seen to change. What can not be let go of is kept.
        """

    async def examine(
        self,
        key: str,  # noqa: ARG002 - most know nothing of their own
        put_between: tuple[float, float],  # noqa: ARG002
    ) -> Sequence[Finding]:
        """What only this kind of store can find out about itself, for `ckptmgr doctor`.

        `key` is an object of `doctor` that was put between the two Unix times. Nothing is changed.
        """
        return ()

    @abstractmethod
    async def list(self, prefix: str) -> list[str]:
        """Every key that starts with `prefix`, sorted; `prefix` is '' or ends with '/'."""

    async def list_pages(self, prefix: str) -> AsyncIterator[Sequence[str]]:
        """What `list` returns, in pieces as they come, in any order.

        A store of which a long listing takes many requests overrides it: whoever waits then knows
        that it goes on, and gives it time for as long as it does.
        """
        yield await self.list(prefix)

    @abstractmethod
    async def delete(self, key: str) -> None:
        """Delete `key`; a key that does not exist is no error."""

    @abstractmethod
    async def make_durable(self, key: str) -> None:
        """Return only when the existing object `key` and its name are on stable storage.

        Raises:
            ObjectNotFoundError: no such key.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release what the store holds; no other method is called afterwards."""
