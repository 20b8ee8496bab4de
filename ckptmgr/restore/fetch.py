"""Carry a plan out: read, verify and place chunks, a few at a time, within the memory budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from ckptmgr.config import CHUNK_BYTES, MIB
from ckptmgr.errors import (
    ChunkDamagedError,
    MissingObjectError,
    ObjectNotFoundError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.codec import Codec
from ckptmgr.restore.plan import Plan, Read
from ckptmgr.restore.verify import check_stored, subject_of, unpack
from ckptmgr.store.base import Store

LANES = 6
"""Chunks in flight: each needs room for a stored and a raw chunk, together below one pack."""

_LANE_BYTES = 2 * CHUNK_BYTES + MIB


async def fetch(
    store: Store,
    plan: Plan,
    target: memoryview,
    pool: BufferPool,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill `target` (at least `plan.target_bytes` long) with verified bytes.

    When it raises, some of `target` may have been written; nothing in it is to be used.

    Raises:
        DamageError: a chunk is missing, cut or does not have its hash.
        StoreUnreachableError: the store can not be read now.
    """
    reads = iter(plan.reads)
    async with pool.lease() as lease:
        try:
            async with asyncio.TaskGroup() as group:
                for lane in range(min(LANES, len(plan.reads))):
                    room = lease[lane * _LANE_BYTES : (lane + 1) * _LANE_BYTES]
                    group.create_task(_lane(store, reads, target, room, progress))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


async def _lane(
    store: Store,
    reads: Iterator[Read],
    target: memoryview,
    room: memoryview,
    progress: Callable[[int], None],
) -> None:
    for read in reads:
        try:
            await _one(store, read, target, room)
        except ObjectNotFoundError as error:
            raise MissingObjectError("is gone", subject=read.key) from error
        except StoreUnreachableError:
            raise
        except StoreError as error:
            raise ChunkDamagedError(error.message, subject=read.key) from error
        progress(read.chunk.raw_bytes)


async def _one(store: Store, read: Read, target: memoryview, room: memoryview) -> None:
    chunk, subject = read.chunk, subject_of(read.key, read.chunk)
    if not 0 < chunk.stored_bytes <= len(room) - CHUNK_BYTES:
        raise ChunkDamagedError(f"has {chunk.stored_bytes} stored bytes", subject=subject)
    if read.direct and chunk.codec == Codec.NONE:
        start = read.moves[0].target
        into = target[start : start + chunk.raw_bytes]
        if chunk.stored_bytes != chunk.raw_bytes:
            raise ChunkDamagedError("has another length than its chunk", subject=subject)
        await store.get(read.key, chunk.pack_offset, into=into)
        await asyncio.to_thread(check_stored, chunk, into, subject=subject)
        return
    raw_room, stored_room = room[:CHUNK_BYTES], room[CHUNK_BYTES:]
    stored = await store.get(read.key, chunk.pack_offset, into=stored_room[: chunk.stored_bytes])
    await asyncio.to_thread(_place, read, stored, raw_room[: chunk.raw_bytes], target, subject)


def _place(
    read: Read, stored: memoryview, raw: memoryview, target: memoryview, subject: str
) -> None:
    if read.direct:
        start = read.moves[0].target
        unpack(read.chunk, stored, target[start : start + len(raw)], subject=subject)
        return
    unpack(read.chunk, stored, raw, subject=subject)
    for move in read.moves:
        piece = raw[move.source : move.source + move.nbytes]
        target[move.target : move.target + move.nbytes] = piece
