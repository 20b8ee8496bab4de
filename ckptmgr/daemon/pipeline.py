"""One snapshot into the store: chunk -> codec -> pack -> put, a few packs at a time, then manifest.

The only place in the daemon where work runs in parallel. Memory is bounded by the buffer pool;
with codec `none` a pack is written straight from the slot and needs no buffer at all.
"""

from __future__ import annotations

import asyncio
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptmgr.config import PACK_BYTES
from ckptmgr.errors import ObjectNotFoundError, RegisterConflictError, TornSnapshotError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.chunk import Chunk, Cut, cut, hash_of
from ckptmgr.repository.codec import AutoCodec, Codec, best_for, encode
from ckptmgr.repository.manifest import (
    Manifest,
    SealedManifest,
    read_manifest,
    seal_manifest,
)
from ckptmgr.repository.pack import pack_header, padded
from ckptmgr.staging.hostbuffer import HostBuffer, Table
from ckptmgr.staging.layout import decode_layout
from ckptmgr.store.base import PutResult, Store
from ckptmgr.types import PAGE_BYTES, Snapshot, StepId

PACKS_IN_FLIGHT = 2
"""One pack is hashed or compressed while another is written; more gains nothing on two cores."""


@dataclass(frozen=True, slots=True)
class Source:
    """A sealed snapshot and the store it goes to."""

    buffer: HostBuffer
    snapshot: Snapshot
    store: Store
    host: str


@dataclass(frozen=True, slots=True)
class _Pack:
    """A pack ready to be put: its buffers, and its chunks with pack index still 0."""

    key: str
    buffers: list[memoryview]
    chunks: list[Chunk]
    nbytes: int


def packs_of(cuts: list[Cut], pack_bytes: int = PACK_BYTES) -> Iterator[list[Cut]]:
    """Group consecutive cuts so that the raw bytes of each group do not exceed `pack_bytes`."""
    group: list[Cut] = []
    size = 0
    for one in cuts:
        if group and size + one.nbytes > pack_bytes:
            yield group
            group, size = [], 0
        group.append(one)
        size += one.nbytes
    if group:
        yield group


class Pipeline:
    """Writes snapshots; keeps what it learns about store and codec speed per store URL."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._auto: dict[str, AutoCodec] = {}

    async def write(
        self, source: Source, codec: str, stored: Callable[[int, int], None]
    ) -> SealedManifest:
        """Put all packs of a snapshot, then its manifest; everything durable when it returns.

        `stored` is told (raw bytes, stored bytes) of every finished pack.

        Raises:
            TornSnapshotError: the slot was reused meanwhile; what was put is garbage.
            RegisterConflictError: another incarnation holds this manifest's key.
            StoreError: the store failed for longer than its deadline.
        """
        snapshot = source.snapshot
        adopted = await adopt_manifest(source.store, snapshot.id, snapshot.rank, snapshot.nonce)
        if adopted is not None:
            return adopted
        table = await in_thread(source.buffer.table, source.snapshot)
        layout = decode_layout(table.layout, subject=str(source.buffer.path))
        groups = list(packs_of(cut(layout.groups)))
        gate = asyncio.Semaphore(PACKS_IN_FLIGHT)
        done: dict[int, _Pack] = {}

        async def one(index: int, cuts: list[Cut]) -> None:
            async with gate:
                done[index] = pack = await self._write_pack(source, cuts, codec)
                stored(sum(c.raw_bytes for c in pack.chunks), pack.nbytes)

        try:
            async with asyncio.TaskGroup() as tasks:
                for index, cuts in enumerate(groups):
                    tasks.create_task(one(index, cuts))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        manifest = _manifest(source, table, [done[i] for i in range(len(groups))])
        _check_unchanged(source)
        if await source.store.put_new(manifest.key, [memoryview(manifest.record)]) is PutResult.OK:
            return manifest
        raise RegisterConflictError("is held by another writer", subject=manifest.key)

    async def _write_pack(self, source: Source, cuts: list[Cut], codec: str) -> _Pack:
        auto = self._auto.setdefault(source.store.url, AutoCodec())
        compress = auto.compress_next() if codec == "auto" else codec != "none"
        if not compress:
            pack = await in_thread(_raw_pack, source, cuts)
            return await self._put(source, pack, auto)
        async with self._pool.lease() as lease:
            start = time.monotonic()
            pack = await in_thread(_compressed_pack, source, cuts, codec, lease)
            raw = sum(c.raw_bytes for c in pack.chunks)
            auto.saw_codec(raw, pack.nbytes, time.monotonic() - start)
            return await self._put(source, pack, auto)

    async def _put(self, source: Source, pack: _Pack, auto: AutoCodec) -> _Pack:
        _check_unchanged(source)
        start = time.monotonic()
        if await source.store.put_new(pack.key, pack.buffers) is not PutResult.OK:
            raise RegisterConflictError("80 random bits met twice", subject=pack.key)
        auto.saw_store(pack.nbytes, time.monotonic() - start)
        return pack


def _check_unchanged(source: Source) -> None:
    if not source.buffer.unchanged(source.snapshot):
        raise TornSnapshotError(
            f"slot of step {source.snapshot.id} was reused", subject=str(source.buffer.path)
        )


def _raw_pack(source: Source, cuts: list[Cut]) -> _Pack:
    """Hash the chunks where they are; the pack's buffers are the slot itself."""
    data = source.buffer.data(source.snapshot.slot)
    key = keys.new_pack(source.snapshot.id, source.snapshot.rank)
    header = pack_header(key, source.snapshot.id, source.snapshot.rank, source.snapshot.nonce)
    buffers, chunks, at = [_aligned(header)], [], PAGE_BYTES
    for one in cuts:
        raw = data[one.offset : one.offset + one.nbytes]
        chunks.append(
            Chunk(0, at, one.nbytes, one.offset, one.nbytes, Codec.NONE, hash_of(raw), b"")
        )
        at += one.nbytes
    # The cuts of a pack are one run of the slot: a single buffer, page-aligned, no copy.
    run = data[cuts[0].offset : cuts[-1].offset + cuts[-1].nbytes]
    return _Pack(key, [*buffers, run], chunks, at)


def _compressed_pack(source: Source, cuts: list[Cut], codec: str, lease: memoryview) -> _Pack:
    """Compress chunk after chunk into the lease; a chunk that does not shrink is copied."""
    data = source.buffer.data(source.snapshot.slot)
    key = keys.new_pack(source.snapshot.id, source.snapshot.rank)
    lease[:PAGE_BYTES] = pack_header(
        key, source.snapshot.id, source.snapshot.rank, source.snapshot.nonce
    )
    chunks, at = [], PAGE_BYTES
    for one in cuts:
        raw = data[one.offset : one.offset + one.nbytes]
        raw_hash = hash_of(raw)
        kind = Codec.ZSTD if codec == "zstd" else best_for(one)
        length = encode(kind, raw, one, lease[at : at + one.nbytes])
        if length:
            stored_hash = hash_of(lease[at : at + length])
        else:
            kind, length, stored_hash = Codec.NONE, one.nbytes, b""
            lease[at : at + length] = raw
        chunks.append(Chunk(0, at, length, one.offset, one.nbytes, kind, raw_hash, stored_hash))
        end = at + padded(length)
        lease[at + length : end] = bytes(end - at - length)
        at = end
    return _Pack(key, [lease[:at]], chunks, at)


def _aligned(header: bytes) -> memoryview:
    """The header in a page of its own, so that the whole pack can be written with O_DIRECT."""
    page = mmap.mmap(-1, PAGE_BYTES)
    page[:] = header
    return memoryview(page)


def _manifest(source: Source, table: Table, packs: list[_Pack]) -> SealedManifest:
    snapshot = source.snapshot
    chunks = tuple(
        Chunk(index, *(getattr(chunk, name) for name in Chunk.__struct_fields__[1:]))
        for index, pack in enumerate(packs)
        for chunk in pack.chunks
    )
    return seal_manifest(
        Manifest(
            attempt=snapshot.attempt,
            step=snapshot.step,
            nonce=snapshot.nonce,
            rank=snapshot.rank,
            world=snapshot.world,
            host=source.host,
            layout=table.layout,
            values=table.values,
            packs=tuple((pack.key, pack.nbytes) for pack in packs),
            chunks=chunks,
            raw_bytes=sum(chunk.raw_bytes for chunk in chunks),
            stored_bytes=sum(pack.nbytes for pack in packs),
            sealed_at=snapshot.sealed_at,
            tags=table.tags,
        )
    )


async def adopt_manifest(
    store: Store, step: StepId, rank: int, nonce: str
) -> SealedManifest | None:
    """The manifest that a daemon before this one put for the same snapshot, made durable.

    Its packs are durable: they were, before it was put.

    Raises:
        RegisterConflictError: it is of another incarnation.
        DamageError: it does not hold.
    """
    key = keys.manifest(step, rank)
    try:
        await store.make_durable(key)
        record = await store.get(key)
    except ObjectNotFoundError:
        return None
    sealed = read_manifest(step, rank, record)
    if sealed.manifest.nonce != nonce:
        raise RegisterConflictError("belongs to another incarnation", subject=key)
    return sealed
