"""Carry a plan out: read, verify and place chunks, a few at a time, within the memory budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ckptmgr.config import CHUNK_BYTES, MIB
from ckptmgr.errors import (
    ChunkDamagedError,
    CkptmgrError,
    MissingObjectError,
    ObjectNotFoundError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.codec import Codec
from ckptmgr.restore.plan import Plan, Read
from ckptmgr.restore.verify import check_stored, subject_of, unpack
from ckptmgr.store.base import Store
from ckptmgr.store.mirrored import from_either

LANES = 6
"""Chunks in flight: each needs room for a stored and a raw chunk, together below one pack."""

_LANE_BYTES = 2 * CHUNK_BYTES + MIB


async def fetch(
    store: Store,
    plan: Plan,
    target: memoryview,
    pool: BufferPool,
    progress: Callable[[int], None] = lambda _: None,
    populate: Callable[[int, int], None] | None = None,
) -> None:
    """Fill `target` (at least `plan.target_bytes` long) with verified bytes.

    `populate` makes a range (start, end) of `target` present in memory before a chunk is read into
    it: one call instead of a page fault every 4 KiB, which would take longer than the read.
    When it raises, some of `target` may have been written; nothing in it is to be used.

    Raises:
        DamageError: a chunk is missing, cut or does not have its hash.
        StoreUnreachableError: the store can not be read now.
    """
    reads = iter(plan.reads)
    failures: list[CkptmgrError] = []

    async def lane(room: memoryview) -> None:
        for read in reads:
            try:
                if populate is not None and read.direct:
                    start = read.moves[0].target
                    await in_thread(populate, start, start + read.chunk.raw_bytes)
                await _one(store, read, target, room)
            except CkptmgrError as error:
                # Not raised here: that would cancel the other lanes amid a chunk, and the memory
                # that they read into is handed back as soon as this function ends.
                failures.append(error)
            if failures:
                return
            progress(read.chunk.raw_bytes)

    async with pool.lease() as lease, asyncio.TaskGroup() as group:
        for at in range(min(LANES, len(plan.reads))):
            group.create_task(lane(lease[at * _LANE_BYTES : (at + 1) * _LANE_BYTES]))
    if failures:
        raise failures[0]


async def _one(store: Store, read: Read, target: memoryview, room: memoryview) -> None:
    """Bring one chunk to its places in `target`, and leave no view of it behind."""
    if read.direct:
        start = read.moves[0].target
        with target[start : start + read.chunk.raw_bytes] as raw:
            await _bring(store, read, raw, room[CHUNK_BYTES:])
        return
    raw = room[: read.chunk.raw_bytes]
    await _bring(store, read, raw, room[CHUNK_BYTES:])
    await in_thread(_spread, read, raw, target)


async def _bring(store: Store, read: Read, raw: memoryview, room: memoryview) -> None:
    await from_either(store, read.key, lambda one: _bring_from(one, read, raw, room))


async def _bring_from(store: Store, read: Read, raw: memoryview, room: memoryview) -> None:
    """Fill `raw` with the verified bytes of a chunk; `room` is for the stored ones."""
    chunk, subject = read.chunk, subject_of(read.key, read.chunk)
    plain = chunk.codec == Codec.NONE
    if not 0 < chunk.stored_bytes <= len(room) or (plain and chunk.stored_bytes != len(raw)):
        raise ChunkDamagedError(f"has {chunk.stored_bytes} stored bytes", subject=subject)
    into = raw if plain else room[: chunk.stored_bytes]
    try:
        await store.get(read.key, chunk.pack_offset, into=into)
    except ObjectNotFoundError as error:
        raise MissingObjectError("is gone", subject=read.key) from error
    except StoreUnreachableError:
        raise
    except StoreError as error:
        raise ChunkDamagedError(error.message, subject=read.key) from error
    if plain:
        await in_thread(check_stored, chunk, raw, subject=subject)
    else:
        await in_thread(unpack, chunk, into, raw, subject=subject)


def _spread(read: Read, raw: memoryview, target: memoryview) -> None:
    for move in read.moves:
        piece = raw[move.source : move.source + move.nbytes]
        target[move.target : move.target + move.nbytes] = piece
