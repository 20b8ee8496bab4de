"""One bucket, or a path in it, as a store: conditional puts, ranged reads, no copies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError

from ckptmgr.config import CHUNK_BYTES, MIB
from ckptmgr.errors import (
    ObjectNotFoundError,
    StoreUnreachableError,
    UsageError,
)
from ckptmgr.store.base import (
    Buffers,
    PutResult,
    Store,
    Wanted,
    check_key,
    check_prefix,
    range_length,
)
from ckptmgr.store.finding import Finding, clock_finding
from ckptmgr.store.lanes import in_lanes
from ckptmgr.store.retry import BYTES_PER_SECOND_MIN
from ckptmgr_objectstore.failures import RangeRefusedError, no_place, typed

if TYPE_CHECKING:
    from obstore import BytesStream, GetResult, OffsetRange
    from obstore.store import AzureStore, GCSStore, S3Store

SINGLE_PUT_BYTES_MAX = 4 << 30
"""Longest object that one request carries: S3 takes 5 GiB in one, Azure 5,000 MiB, GCS 5 TiB."""

PART_BYTES = 64 * MIB
PARTS_MAX = 10_000
"""An object of more parts gets longer ones: S3 takes no more of them."""
PARTS_IN_FLIGHT = 4

GETS_IN_FLIGHT = 8
"""Ranges that `get_many` reads at once, each over a connection of its own."""

PAGE_KEYS = 1000
"""Keys of one request for a listing; S3 answers with no more of them."""

AT_ONCE_BYTES_MAX = 2 * CHUNK_BYTES
"""Longest range that the client collects before we have a byte of it: a chunk, for speed; not an
object, for memory (measured: docs/decisions/0011)."""

STREAM_BYTES = 1 * MIB
"""Pieces in which a longer body arrives: each costs a turn of the event loop."""

STALL_SECONDS = 60.0
"""A body of which nothing has come for so long is given up; a slow one is not. One that is
collected gets a second more for each BYTES_PER_SECOND_MIN."""

RELEASE_SECONDS = 0.001
"""Between two looks whether the client still holds a buffer. After a cancelled put that takes
1 ms, or up to 50 ms while it hashes; after any other, none."""


class ObjectStore(Store):
    """The objects of `client`, which has a prefix of its own.

    `put_new` is one conditional PUT, so it decides as the server decides (`exclusive`). Only above
    `single_put_bytes_max` it is a look and a multipart upload, which is atomic, but not exclusive:
    for keys that only one writer can know, as those of packs are.
    """

    durable_on_return = True
    visibility_lag_seconds = 0.0

    def __init__(
        self,
        url: str,
        client: S3Store | GCSStore | AzureStore,
        *,
        exclusive: bool | None,
        single_put_bytes_max: int = SINGLE_PUT_BYTES_MAX,
        part_bytes: int = PART_BYTES,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.exclusive = exclusive
        self._url = url
        self._client = client
        self._single_put_bytes_max = single_put_bytes_max
        self._part_bytes = part_bytes
        self._stall_seconds = stall_seconds

    @property
    def url(self) -> str:
        """As `Store.url`."""
        return self._url

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """As `Store.put_new`; above `single_put_bytes_max` without its exclusion."""
        check_key(key)
        nbytes = sum(map(len, buffers))
        # Views of our own, because they tell when the client has let go of them.
        views = [memoryview(buffer) for buffer in buffers]
        try:
            with typed(key):
                if nbytes <= self._single_put_bytes_max:
                    return await self._put_at_once(key, views)
                return await self._put_in_parts(key, views, nbytes)
        except ObjectNotFoundError:
            raise no_place(key) from None
        finally:
            await _let_go(views)

    async def _put_at_once(self, key: str, views: list[memoryview]) -> PutResult:
        try:
            await obstore.put_async(self._client, key, views, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # 409 too is told by this name, and S3 answers it while another's put is under way.
            return await self._conflict(key)
        return PutResult.OK

    async def _conflict(self, key: str) -> PutResult:
        try:
            await self._size(key)
        except ObjectNotFoundError:
            raise StoreUnreachableError(
                "is refused as taken, but does not exist", subject=key
            ) from None
        return PutResult.CONFLICT

    async def _put_in_parts(self, key: str, views: list[memoryview], nbytes: int) -> PutResult:
        try:
            await self._size(key)
        except ObjectNotFoundError:
            part_bytes = max(self._part_bytes, -(-nbytes // PARTS_MAX))
            await obstore.put_async(
                self._client,
                key,
                views,
                use_multipart=True,
                chunk_size=part_bytes,
                max_concurrency=PARTS_IN_FLIGHT,
            )
            return PutResult.OK
        return PutResult.CONFLICT

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """As `Store.get`."""
        check_key(key)
        wanted = len(into) if into is not None else length
        if offset < 0 or (wanted is not None and wanted < 0):
            raise UsageError("can not be read at a negative offset or length", subject=key)
        if wanted and wanted <= AT_ONCE_BYTES_MAX:
            body = await self._collected(key, offset, wanted)
            if len(body) == wanted:
                if into is None:
                    return body
                into[:] = body
                return into
        # What is wrong with the range, the head of an answer tells.
        try:
            found = await self._open(key, offset, wanted) if wanted != 0 else None
        except RangeRefusedError:
            found = None
        if found is None:
            # No byte of the range is there, or none is wanted: what that means, the size tells.
            count = range_length(key, await self._size(key), offset, length, into)
            if count:
                raise StoreUnreachableError("has bytes that are not given out", subject=key)
            return into if into is not None else memoryview(b"")
        count = range_length(key, found.meta["size"], offset, length, into)
        room = into if into is not None else memoryview(bytearray(count))
        await self._fill(key, found, room)
        return room

    async def _collected(self, key: str, offset: int, wanted: int) -> memoryview:
        """A range in memory of the client; what is short of it is not there or was cut."""
        try:
            with typed(key):
                async with self._patience(key, wanted / BYTES_PER_SECOND_MIN):
                    return memoryview(
                        await obstore.get_range_async(
                            self._client, key, start=offset, length=wanted
                        )
                    )
        except RangeRefusedError:
            return memoryview(b"")

    async def _open(self, key: str, offset: int, wanted: int | None) -> GetResult:
        """The answer to a GET, its body still to be read: always of a range, because the answer
        then says how long the object is, whatever becomes of the body.
        """
        wide: OffsetRange = {"offset": offset}
        with typed(key):
            async with self._patience(key):
                return await obstore.get_async(
                    self._client,
                    key,
                    options={"range": wide if wanted is None else (offset, offset + wanted)},
                )

    async def _fill(self, key: str, found: GetResult, room: memoryview) -> None:
        """Read a body into `room`, which only this coroutine writes: all of it, or an error."""
        stream = found.stream(min_chunk_size=STREAM_BYTES)
        filled = 0
        while (piece := await self._next(key, stream)) is not None:
            end = filled + len(piece)
            if end > len(room):
                raise StoreUnreachableError("came with more bytes than asked for", subject=key)
            room[filled:end] = piece
            filled = end
        if filled < len(room):
            raise StoreUnreachableError(f"came cut: {filled} of {len(room)} bytes", subject=key)

    async def _next(self, key: str, stream: BytesStream) -> bytes | None:
        with typed(key):
            async with self._patience(key):
                try:
                    return await anext(stream)
                except StopAsyncIteration:
                    return None

    @asynccontextmanager
    async def _patience(self, key: str, more_seconds: float = 0.0) -> AsyncIterator[None]:
        seconds = self._stall_seconds + more_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            what = "it has not all come after" if more_seconds else "nothing came for"
            raise StoreUnreachableError(f"{what} {seconds:g} s", subject=key) from None

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """As `Store.get_many`: GETS_IN_FLIGHT at once."""
        get = self.get
        await in_lanes(lambda one: get(one.key, one.offset, into=one.into), wanted, GETS_IN_FLIGHT)

    async def list(self, prefix: str) -> list[str]:
        """As `Store.list`; what no key can name is passed over."""
        return sorted([key async for page in self.list_pages(prefix) for key in page])

    async def list_pages(self, prefix: str) -> AsyncIterator[Sequence[str]]:
        """As `Store.list_pages`: each is one request."""
        check_prefix(prefix)
        with typed(prefix or self._url):
            # The client matches whole segments, so that "a" does not list "ab/c".
            async for page in obstore.list(self._client, prefix[:-1] or None, chunk_size=PAGE_KEYS):
                yield [found["path"] for found in page if _is_key(found["path"])]

    async def delete(self, key: str) -> None:
        """As `Store.delete`."""
        check_key(key)
        with suppress(ObjectNotFoundError), typed(key):
            await obstore.delete_async(self._client, key)

    async def make_durable(self, key: str) -> None:
        """As `Store.make_durable`: what exists here is durable."""
        await self._size(check_key(key))

    async def examine(self, key: str, put_between: tuple[float, float]) -> Sequence[Finding]:
        """As `Store.examine`: the server dates its objects."""
        with typed(check_key(key)):
            found = await obstore.head_async(self._client, key)
        return [clock_finding(found["last_modified"].timestamp(), *put_between)]

    async def aclose(self) -> None:
        """Nothing to release: idle connections end by themselves."""

    async def _size(self, key: str) -> int:
        with typed(key):
            return (await obstore.head_async(self._client, key))["size"]


async def _let_go(views: list[memoryview]) -> None:
    """Return when the client holds no view any more: then nothing sends from it, either.

    A cancelled put goes on in the client's threads until they see it, and a connection may be
    reading a buffer at that moment. While they hold it, it can not be released.
    """
    cancelled: asyncio.CancelledError | None = None
    for view in views:
        while not _released(view):
            try:
                await asyncio.sleep(RELEASE_SECONDS)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled


def _is_key(path: str) -> bool:
    """Whether the object has a name that `put_new` takes."""
    try:
        check_key(path)
    except UsageError:
        return False
    return True


def _released(view: memoryview) -> bool:
    try:
        view.release()
    except BufferError:
        return False
    return True
