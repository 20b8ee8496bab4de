"""Bytes against hashes: of one chunk on the way back, and of a whole step for `verify`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from ckptmgr.errors import (
    ChunkDamagedError,
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.chunk import Chunk, hash_of
from ckptmgr.repository.codec import Codec, decode
from ckptmgr.repository.commit import Decision
from ckptmgr.repository.manifest import ChunkCheck, Manifest
from ckptmgr.repository.pack import check_padding, pack_header, padded
from ckptmgr.store.base import Store
from ckptmgr.store.lanes import in_lanes
from ckptmgr.store.mirrored import came_damaged
from ckptmgr.types import PAGE_BYTES

RANKS_AT_ONCE = 8
"""Ranks of a step read back at a time; the memory budget bounds the packs that are held."""


Pace = Callable[[int], Awaitable[None]]
"""Awaited before so many bytes are read back; waits as long as other work should go first."""


async def at_once(_nbytes: int) -> None:
    """The pace of somebody who waits for the answer."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One place where a step does not hold: the object, the offset in it, and what is wrong."""

    key: str
    offset: int
    what: str


def subject_of(key: str, chunk: Chunk) -> str:
    """How an error names a chunk."""
    return f"{key} chunk at {chunk.pack_offset}"


def check_stored(chunk: Chunk, stored: memoryview, *, subject: str) -> None:
    """Refuse stored bytes before they reach a decompressor."""
    if hash_of(stored) != (chunk.stored_hash or chunk.raw_hash):
        raise ChunkDamagedError("does not have the recorded hash", subject=subject)


def check_raw(chunk: Chunk, raw: memoryview, *, subject: str) -> None:
    """Refuse raw bytes that are not the bytes that were saved."""
    if hash_of(raw) != chunk.raw_hash:
        raise ChunkDamagedError("does not decode to the recorded hash", subject=subject)


def check_plain(
    chunk: Chunk, stored: memoryview, check: ChunkCheck | None = None, *, subject: str
) -> None:
    """Check stored bytes that no codec has made, where they lie: they are the raw ones then."""
    check_stored(chunk, stored, subject=subject)
    if check is not None:
        check(chunk, stored, subject=subject)
        check_raw(chunk, stored, subject=subject)


def unpack(
    chunk: Chunk,
    stored: memoryview,
    raw: memoryview,
    check: ChunkCheck | None = None,
    *,
    subject: str,
) -> None:
    """Check `stored`, decode it into `raw` (of the chunk's raw length) and check that too.

    With a `check` that decrypts, `stored` is decrypted where it lies.
    """
    if chunk.codec == Codec.NONE:
        if len(stored) != len(raw):
            raise ChunkDamagedError("has another length than its chunk", subject=subject)
        check_plain(chunk, stored, check, subject=subject)
        raw[:] = stored
        return
    check_stored(chunk, stored, subject=subject)
    if check is not None:
        check(chunk, stored, subject=subject)
    decode(chunk.codec, stored, raw, subject=subject)
    check_raw(chunk, raw, subject=subject)


async def verify_step(
    catalog: Catalog,
    decision: Decision,
    pool: BufferPool,
    *,
    quick: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    pace: Pace = at_once,
) -> list[Damage]:
    """Read a committed step back and list everything in it that does not hold.

    `quick` looks at existence and lengths only. `progress` is told the bytes read, `pace` awaited
    before each pack. What the page cache has of a pack is dropped first, where the store is on this
    host's disks, so that the medium is read; and after that, so that nothing else has to make room.

    Of an encrypted step, who has no key checks the hashes of what is stored, and nothing that is
    in it.

    Raises:
        StoreUnreachableError: the store can not be read now; this is not damage.
        WrongKeyError: it is encrypted, and the keys that are given are others.
    """
    closed = not catalog.keyring.known

    async def of_rank(rank: int) -> list[Damage]:
        try:
            manifest = (await catalog.manifest(decision, rank, closed=closed)).manifest
        except DamageError as error:
            return [Damage(error.subject, 0, error.message)]
        found: list[Damage] = []
        for index in range(len(manifest.packs)):
            await pace(0 if quick else manifest.packs[index][1])
            found += await _verify_pack(catalog.store, manifest, index, pool, quick, progress)
        return found

    found = await in_lanes(of_rank, range(decision.world), RANKS_AT_ONCE)
    return [damage for of_one in found for damage in of_one]


async def _verify_pack(
    store: Store,
    manifest: Manifest,
    index: int,
    pool: BufferPool,
    quick: bool,
    progress: Callable[[int], None],
) -> list[Damage]:
    found = await seen_twice(store, partial(_look_at_pack, store, manifest, index, pool, quick))
    progress(0 if quick else manifest.packs[index][1])
    return found


async def seen_twice(store: Store, look: Callable[[], Awaitable[list[Damage]]]) -> list[Damage]:
    """What `look` finds wrong, if anything then by a second look: a line may change a byte."""
    found = await look()
    if not found:
        return []
    came_damaged(store, DamageError(found[0].what, subject=found[0].key))
    return await look()


async def _look_at_pack(
    store: Store, manifest: Manifest, index: int, pool: BufferPool, quick: bool
) -> list[Damage]:
    key, nbytes = manifest.packs[index]
    async with pool.lease() as lease:
        try:
            if quick:
                await store.get(key, nbytes - 1, into=lease[:1])
                return await verify_end(store, key, nbytes)
            await store.uncache(key)
            await store.get(key, into=lease[:nbytes])
            await store.uncache(key)
            damage = await verify_end(store, key, nbytes)
        except (ObjectNotFoundError, MissingObjectError):
            return [Damage(key, 0, "is gone")]
        except StoreUnreachableError:
            raise
        except StoreError as error:
            return [Damage(key, 0, error.message)]
        return damage + await in_thread(_check_pack, manifest, index, lease[:nbytes])


async def verify_end(store: Store, key: str, nbytes: int) -> list[Damage]:
    """Whether an object ends where it was written to end."""
    try:
        await store.get(key, nbytes, length=1)
    except (StoreUnreachableError, ObjectUnreadableError):
        raise
    except StoreError:
        return []
    return [Damage(key, nbytes, "is longer than it was written")]


def _check_pack(manifest: Manifest, index: int, view: memoryview) -> list[Damage]:
    key, _ = manifest.packs[index]
    found = []
    if view[:PAGE_BYTES] != pack_header(key, manifest.id, manifest.rank, manifest.nonce):
        found.append(Damage(key, 0, "does not have the header it was written with"))
    check = None if manifest.closed else manifest.chunk_check
    raw = memoryview(bytearray(max((c.raw_bytes for c in manifest.chunks), default=0)))
    for chunk in manifest.chunks:
        if chunk.pack != index:
            continue
        stored_end = chunk.pack_offset + chunk.stored_bytes
        page_end = chunk.pack_offset + padded(chunk.stored_bytes)
        subject = subject_of(key, chunk)
        try:
            stored = view[chunk.pack_offset : stored_end]
            if manifest.closed:
                check_stored(chunk, stored, subject=subject)
            else:
                unpack(chunk, stored, raw[: chunk.raw_bytes], check, subject=subject)
            check_padding(view[stored_end:page_end], subject=subject)
        except DamageError as error:
            found.append(Damage(key, chunk.pack_offset, error.message))
    return found
