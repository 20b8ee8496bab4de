"""One snapshot into the store: chunk -> codec -> pack -> put, a few packs at a time, then manifest.

`route.py` decides what is sent next, `flow.py` starts it. Memory is bounded by the buffer pool; a
raw pack is written straight from the slot and needs no buffer at all.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ckptmgr.config import PACK_BYTES
from ckptmgr.daemon.flow import flow
from ckptmgr.daemon.route import PROBE_CHUNKS, Route, spread
from ckptmgr.errors import ObjectNotFoundError, RegisterConflictError, TornSnapshotError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.chunk import Chunk, Cut, cut, hash_of
from ckptmgr.repository.codec import Codec, choose_codec, encode
from ckptmgr.repository.commit import stored_manifest
from ckptmgr.repository.manifest import (
    Manifest,
    SealedManifest,
    seal_manifest,
)
from ckptmgr.repository.pack import pack_header, padded
from ckptmgr.staging.hostbuffer import HostBuffer, Table
from ckptmgr.staging.layout import decode_layout
from ckptmgr.store.base import PutResult, Store
from ckptmgr.types import PAGE_BYTES, Snapshot, StepId

CORES_PER_ENCODER = 8
"""One core of eight compresses, at least ENCODERS_MIN: the others are for training."""

ENCODERS_MIN = 2


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
        self._routes: dict[str, Route] = {}

    def route(self, url: str) -> Route:
        """The way to a store."""
        if url not in self._routes:
            cores = (os.cpu_count() or 1) // CORES_PER_ENCODER
            self._routes[url] = Route(min(max(ENCODERS_MIN, cores), self._pool.count))
        return self._routes[url]

    def state(self, url: str) -> dict[str, float | None]:
        """What was measured on the way to a store, for `ckptmgr status`."""
        route = self.route(url)
        seen = route.seen
        return {
            "store_bytes_per_second": seen.store or None,
            "codec_bytes_per_second": seen.codec or None,
            "ratio": seen.ratio or None,
            "packs_at_once": route.width.now,
        }

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
        route = self.route(source.store.url)
        packs = _Packs(source, codec, cut(layout.groups), self._pool, route, stored)
        await flow(route, packs.sizes, codec, packs)
        manifest = _manifest(source, table, packs.in_order())
        _check_unchanged(source)
        if await source.store.put_new(manifest.key, [memoryview(manifest.record)]) is PutResult.OK:
            return manifest
        raise RegisterConflictError("is held by another writer", subject=manifest.key)


class _Packs:
    """The packs of one snapshot, as `flow` has them written."""

    def __init__(
        self,
        source: Source,
        codec: str,
        cuts: list[Cut],
        pool: BufferPool,
        route: Route,
        stored: Callable[[int, int], None],
    ) -> None:
        self._source, self._codec, self._cuts = source, codec, cuts
        self._groups = list(packs_of(cuts))
        self._pool, self._route, self._stored = pool, route, stored
        self._done: dict[int, _Pack] = {}
        self.sizes = [sum(one.nbytes for one in group) for group in self._groups]

    def in_order(self) -> list[_Pack]:
        """All packs, when they are done."""
        return [self._done[index] for index in range(len(self._groups))]

    def spare(self) -> bool:
        """As `Packs.spare`."""
        return self._pool.has_free

    async def raw(self, index: int) -> None:
        """As `Packs.raw`."""
        pack = await in_thread(_raw_pack, self._source, self._groups[index])
        await self._put(index, pack)

    async def compressed(self, index: int, encoded: Callable[[], None]) -> None:
        """As `Packs.compressed`."""
        async with self._pool.lease() as lease:
            pack = await self._encode(self._groups[index], lease)
            encoded()
            async with self._route.place(pack.nbytes):
                await self._put(index, pack)

    async def probe(self) -> None:
        """As `Packs.probe`: with one encoder, and with all of them, which share the cores."""
        some = [self._cuts[at] for at in spread(len(self._cuts), PROBE_CHUNKS)]
        await self._probe(some)
        if self._route.encoders > 1:
            await asyncio.gather(*(self._probe([one]) for one in some[: self._route.encoders]))

    async def _probe(self, cuts: list[Cut]) -> None:
        if self._pool.has_free:  # it gives way to everything else that wants a buffer
            async with self._pool.lease() as lease:
                await self._encode(cuts, lease)

    async def _encode(self, cuts: list[Cut], lease: memoryview) -> _Pack:
        begun = self._route.begin()
        try:
            pack = await in_thread(_compressed_pack, self._source, cuts, self._codec, lease)
        except BaseException:
            self._route.codec.drop()
            raise
        self._route.encoded(begun, sum(one.nbytes for one in cuts), pack.nbytes)
        return pack

    async def _put(self, index: int, pack: _Pack) -> None:
        _check_unchanged(self._source)
        async with self._route.putting(pack.nbytes):
            result = await self._source.store.put_new(pack.key, pack.buffers)
        if result is not PutResult.OK:
            raise RegisterConflictError("80 random bits met twice", subject=pack.key)
        self._done[index] = pack
        self._stored(self.sizes[index], pack.nbytes)


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
        kind = choose_codec(codec, raw, one)
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
            stall_seconds=snapshot.stall_seconds,
            written_at=time.time(),
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
        sealed = await stored_manifest(store, step, rank)
    except ObjectNotFoundError:
        return None
    if sealed.manifest.nonce != nonce:
        raise RegisterConflictError("belongs to another incarnation", subject=key)
    return sealed
