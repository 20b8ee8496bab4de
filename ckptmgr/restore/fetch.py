"""Carry a plan out: read, verify and place chunks, in batches, within the memory budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from ckptmgr.config import CHUNK_BYTES, MIB
from ckptmgr.errors import (
    ChunkDamagedError,
    CkptmgrError,
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository.budget import LEASE_BYTES, BufferPool, in_thread
from ckptmgr.repository.codec import Codec
from ckptmgr.restore.plan import Plan, Read
from ckptmgr.restore.verify import check_plain, subject_of, unpack
from ckptmgr.store.base import Store, Wanted
from ckptmgr.store.mirrored import came_damaged, from_either
from ckptmgr.types import PAGE_BYTES

LANES = 4
"""Batches under way: while one or two are verified and decoded, the others are read. A disk gives a
few percent more to four than to three, and no more to six."""

BATCH_READS_MAX = 8
"""Chunks of a batch: with LANES up to 128 MiB on their way, 1.2 GiB/s of a store that takes 0.1 s
to answer. A local store reads a batch in one thread: with 6 it gave 6 % less, with 4 a sixth."""

_LANE_BYTES = LEASE_BYTES // LANES // PAGE_BYTES * PAGE_BYTES

_STORED_BYTES_MAX = CHUNK_BYTES + MIB
"""More than a frame of a whole chunk needs; a chunk table that says more is damaged."""


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
    batches = _batches(plan.reads)
    failures: list[CkptmgrError] = []

    async def lane(room: memoryview) -> None:
        for batch in batches:
            try:
                if populate is not None:
                    await in_thread(_populate, populate, batch)
                await _bring(store, batch, target, room)
            except CkptmgrError as error:
                # Not raised here: that would cancel the other lanes amid a chunk, and the memory
                # that they read into is handed back as soon as this function ends.
                failures.append(error)
            if failures:
                return
            progress(sum(read.chunk.raw_bytes for read in batch))

    async with pool.lease() as lease, asyncio.TaskGroup() as group:
        for at in range(min(LANES, len(plan.reads))):
            group.create_task(lane(lease[at * _LANE_BYTES : (at + 1) * _LANE_BYTES]))
    if failures:
        raise failures[0]


def _batches(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """Neighbours together, as many as have room in a lane and as keep all lanes busy."""
    most = min(BATCH_READS_MAX, max(1, -(-len(reads) // LANES)))
    batch: list[Read] = []
    size = 0
    for read in reads:
        needed = _room_bytes(read)
        if batch and (len(batch) == most or size + needed > _LANE_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(read)
        size += needed
    if batch:
        yield batch


def _room_bytes(read: Read) -> int:
    """What a chunk needs beside its target: nothing where its stored bytes are the raw ones."""
    stored = (
        0 if read.chunk.codec == Codec.NONE else min(read.chunk.stored_bytes, _STORED_BYTES_MAX)
    )
    return stored + (0 if read.direct else read.chunk.raw_bytes)


def _populate(populate: Callable[[int, int], None], batch: list[Read]) -> None:
    for read in batch:
        if read.direct:
            start = read.moves[0].target
            populate(start, start + read.chunk.raw_bytes)


@dataclass(frozen=True, slots=True)
class _Part:
    """One chunk of a batch: where its stored bytes are read to, and where its raw ones go."""

    read: Read
    stored: memoryview
    raw: memoryview

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.read.key, self.read.chunk.pack_offset, self.stored)


async def _bring(store: Store, batch: list[Read], target: memoryview, room: memoryview) -> None:
    """Bring chunks to their places in `target`, and leave no view of it behind."""
    with ExitStack() as views:
        parts, at = [], 0
        for read in batch:
            chunk, plain = read.chunk, read.chunk.codec == Codec.NONE
            if (plain and chunk.stored_bytes != chunk.raw_bytes) or not (
                0 < chunk.stored_bytes <= _STORED_BYTES_MAX
            ):
                subject = subject_of(read.key, chunk)
                raise ChunkDamagedError(f"has {chunk.stored_bytes} stored bytes", subject=subject)
            if read.direct:
                start = read.moves[0].target
                raw = views.enter_context(target[start : start + chunk.raw_bytes])
            else:
                raw, at = room[at : at + chunk.raw_bytes], at + chunk.raw_bytes
            stored = raw if plain else room[at : at + chunk.stored_bytes]
            at += 0 if plain else chunk.stored_bytes
            parts.append(_Part(read, stored, raw))
        try:
            await store.get_many([part.wanted for part in parts])
            await in_thread(_finish, parts, target)
        except StoreUnreachableError:
            raise
        except (StoreError, DamageError) as error:
            if isinstance(error, DamageError):
                came_damaged(store, error)
            # Of one object: which it is, and whether a mirror has it whole, tells one after the
            # other.
            for part in parts:
                await from_either(store, part.read.key, partial(_bring_one, part, target))


async def _bring_one(part: _Part, target: memoryview, store: Store) -> None:
    """Bring one chunk from one store."""
    try:
        await store.get(part.read.key, part.read.chunk.pack_offset, into=part.stored)
    except ObjectNotFoundError as error:
        raise MissingObjectError("is gone", subject=part.read.key) from error
    except StoreUnreachableError:
        raise
    except StoreError as error:
        raise ChunkDamagedError(error.message, subject=part.read.key) from error
    await in_thread(_finish, [part], target)


def _finish(parts: list[_Part], target: memoryview) -> None:
    """Verify, decode, and copy what does not lie at its place yet."""
    for part in parts:
        chunk, subject = part.read.chunk, subject_of(part.read.key, part.read.chunk)
        if chunk.codec == Codec.NONE:
            check_plain(chunk, part.raw, part.read.check, subject=subject)
        else:
            unpack(chunk, part.stored, part.raw, part.read.check, subject=subject)
        if not part.read.direct:
            _spread(part.read, part.raw, target)


def _spread(read: Read, raw: memoryview, target: memoryview) -> None:
    for move in read.moves:
        piece = raw[move.source : move.source + move.nbytes]
        target[move.target : move.target + move.nbytes] = piece
