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
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec
import numpy as np  # noqa: F401 - here, and not when the first snapshot is waited for

from ckptmgr.config import PACK_BYTES
from ckptmgr.daemon.flow import flow
from ckptmgr.daemon.route import PROBE_CHUNKS, Route, spread
from ckptmgr.errors import (
    ObjectNotFoundError,
    RegisterConflictError,
    StoreError,
    TornSnapshotError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.chunk import Chunk, Cut, cut, hash_of
from ckptmgr.repository.codec import Codec, choose_codec, encode
from ckptmgr.repository.commit import stored_manifest
from ckptmgr.repository.envelope import DataKey, Part, seal_chunk
from ckptmgr.repository.keyring import NO_KEYS, Keyring
from ckptmgr.repository.manifest import (
    Manifest,
    SealedManifest,
    seal_manifest,
)
from ckptmgr.repository.opening import (
    close_manifest,
    digest_of_chunk,
    signed_manifest,
    with_digests,
)
from ckptmgr.repository.pack import pack_header, padded
from ckptmgr.staging.hostbuffer import HostBuffer, Table
from ckptmgr.staging.layout import decode_layout
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.lanes import together
from ckptmgr.types import PAGE_BYTES, Snapshot, StepId

CORES_PER_ENCODER = 8
"""One core of eight compresses, at least ENCODERS_MIN: the others are for training."""

ENCODERS_MIN = 2


class Origin(Protocol):
    """What a snapshot is read from, and the store that it goes to."""

    @property
    def in_place(self) -> bool:
        """Whether what `raw` gave stays as it is until `check_unchanged`, so that it can be put
        from where it is.
        """

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot; its slot and generation are the origin's business."""

    @property
    def store(self) -> Store:
        """Where it goes."""

    @property
    def host(self) -> str:
        """The host's name, for people."""

    @property
    def keyring(self) -> Keyring:
        """The keys that it is encrypted and signed with."""

    @property
    def subject(self) -> str:
        """How errors name the origin."""

    def table(self) -> Table:
        """The layout, values and tags; called first. Tags may be added until `check_unchanged`."""

    def raw(self, cut: Cut) -> memoryview:
        """The bytes of a cut; called in a thread."""

    def check_unchanged(self) -> None:
        """Raise TornSnapshotError if what was read is not the snapshot any more."""


@dataclass(frozen=True, slots=True)
class Source:
    """A sealed snapshot in a host buffer, the store it goes to, and the keys for it."""

    buffer: HostBuffer
    snapshot: Snapshot
    store: Store
    host: str
    keyring: Keyring = NO_KEYS

    in_place = True

    @property
    def subject(self) -> str:
        """As `Origin.subject`."""
        return str(self.buffer.path)

    def table(self) -> Table:
        """As `Origin.table`."""
        return self.buffer.table(self.snapshot)

    def raw(self, cut: Cut) -> memoryview:
        """As `Origin.raw`: the slot itself."""
        return self.buffer.data(self.snapshot.slot)[cut.offset : cut.offset + cut.nbytes]

    def check_unchanged(self) -> None:
        """As `Origin.check_unchanged`."""
        if not self.buffer.unchanged(self.snapshot):
            raise TornSnapshotError(
                f"slot of step {self.snapshot.id} was reused", subject=self.subject
            )


@dataclass(frozen=True, slots=True)
class _Pack:
    """A pack ready to be put: its buffers, and its chunks with pack index still 0.

    `proofs` are what the manifest says of each chunk beside its hashes: the tag of an encrypted
    one, or the digest of one whose commit will be signed.
    """

    key: str
    buffers: list[memoryview]
    chunks: list[Chunk]
    nbytes: int
    proofs: list[bytes]


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
        self, source: Origin, codec: str, stored: Callable[[int, int], None]
    ) -> SealedManifest:
        """Put all packs of a snapshot, then its manifest; everything durable when it returns.

        `stored` is told (raw bytes, stored bytes) of every finished pack.

        Raises:
            TornSnapshotError: the slot was reused meanwhile; what was put is garbage.
            RegisterConflictError: this manifest's key is held by another incarnation, or for
                another snapshot of the step.
            StoreError: the store failed for longer than its deadline.
        """
        adopted = await _adopted(source)
        if adopted is not None:
            return adopted
        table = await in_thread(source.table)
        layout = decode_layout(table.layout, subject=source.subject)
        route = self.route(source.store.url)
        data_key = DataKey.fresh() if source.keyring.encrypting else None
        async with together() as ahead:
            packs = _Packs(
                source, codec, cut(layout.groups), self._pool, route, stored, ahead, data_key
            )
            copied = data_key is not None or not source.in_place
            await flow(route, packs.sizes, codec, packs, copied=copied)
        await in_thread(source.check_unchanged)
        manifest = _manifest(source, table, packs.in_order(), data_key)
        if await source.store.put_new(manifest.key, [memoryview(manifest.record)]) is PutResult.OK:
            return manifest
        # One that an earlier try has sent may have arrived all the same, of the same bits.
        late = await _adopted(source)
        if late is None:  # the step was given up, and its manifests deleted, at this moment
            raise StoreError("was there and is gone again", subject=manifest.key)
        return late


class _Packs:
    """The packs of one snapshot, as `flow` has them written."""

    def __init__(
        self,
        source: Origin,
        codec: str,
        cuts: list[Cut],
        pool: BufferPool,
        route: Route,
        stored: Callable[[int, int], None],
        ahead: asyncio.TaskGroup,
        data_key: DataKey | None = None,
    ) -> None:
        self._source, self._codec, self._cuts = source, codec, cuts
        self._data_key = data_key
        self._groups = list(packs_of(cuts))
        self._pool, self._route, self._stored = pool, route, stored
        self._ahead = ahead
        self._hashes: dict[int, asyncio.Task[_Pack]] = {}
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
        self._hash(index)
        pack = await self._hashes[index]
        # Meanwhile the one that is to have this place next: the store need not wait for its hash.
        self._hash(index + self._route.width.now)
        await self._put(index, pack)

    def _hash(self, index: int) -> None:
        """Begin with a raw pack, if there is one and it was not begun with before."""
        if index < len(self._groups) and index not in self._hashes:
            work = in_thread(_raw_pack, self._source, self._groups[index])
            self._hashes[index] = self._ahead.create_task(work)

    async def compressed(self, index: int, encoded: Callable[[], None]) -> None:
        """As `Packs.compressed`."""
        async with self._pool.lease() as lease:
            pack = await self._encode(self._groups[index], lease, self._data_key)
            encoded()
            async with self._route.place(pack.nbytes):
                await self._put(index, pack)

    async def copied(self, index: int, encoded: Callable[[], None]) -> None:
        """As `Packs.copied`."""
        async with self._pool.lease() as lease:
            what = self._source, self._groups[index], "none", lease, self._data_key
            pack = await in_thread(_copied_pack, *what)
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
                await self._encode(cuts, lease, None)  # a data key seals a chunk once

    async def _encode(self, cuts: list[Cut], lease: memoryview, data_key: DataKey | None) -> _Pack:
        begun = self._route.begin()
        try:
            what = self._source, cuts, self._codec, lease, data_key
            pack = await in_thread(_copied_pack, *what)
        except BaseException:
            self._route.codec.drop()
            raise
        self._route.encoded(begun, sum(one.nbytes for one in cuts), pack.nbytes)
        return pack

    async def _put(self, index: int, pack: _Pack) -> None:
        if self._source.in_place:
            self._source.check_unchanged()
        async with self._route.putting(pack.nbytes):
            result = await self._source.store.put_new(pack.key, pack.buffers)
        if result is not PutResult.OK:
            if self._source.in_place:  # what is there may be of the slot as it was at the first try
                self._source.check_unchanged()
            raise RegisterConflictError("80 random bits met twice", subject=pack.key)
        self._done[index] = pack
        self._stored(self.sizes[index], pack.nbytes)


def _raw_pack(source: Origin, cuts: list[Cut]) -> _Pack:
    """Hash the chunks where they are; the pack's buffers are the origin itself."""
    key = keys.new_pack(source.snapshot.id, source.snapshot.rank)
    header = pack_header(key, source.snapshot.id, source.snapshot.rank, source.snapshot.nonce)
    buffers, chunks, at = [_aligned(header)], [], PAGE_BYTES
    digests: list[bytes] = []
    for one in cuts:
        raw = source.raw(one)
        chunks.append(
            Chunk(0, at, one.nbytes, one.offset, one.nbytes, Codec.NONE, hash_of(raw), b"")
        )
        if source.keyring.signer is not None:
            digests.append(digest_of_chunk(raw))
        at += one.nbytes
    # The cuts of a pack are one run of the slot: a single buffer, page-aligned, no copy.
    end = cuts[-1].offset + cuts[-1].nbytes
    run = source.raw(replace(cuts[0], nbytes=end - cuts[0].offset))
    return _Pack(key, [*buffers, run], chunks, at, digests)


def _copied_pack(
    source: Origin, cuts: list[Cut], codec: str, lease: memoryview, data_key: DataKey | None
) -> _Pack:
    """Compress or encrypt, or both, chunk after chunk into the lease; one that does not shrink is
    copied, and with the codec "none" each is.
    """
    key = keys.new_pack(source.snapshot.id, source.snapshot.rank)
    lease[:PAGE_BYTES] = pack_header(
        key, source.snapshot.id, source.snapshot.rank, source.snapshot.nonce
    )
    chunks, proofs, at = [], [], PAGE_BYTES
    for one in cuts:
        chunk, proof = _stored_chunk(source, codec, one, source.raw(one), lease[at:], data_key)
        chunks.append(msgspec.structs.replace(chunk, pack_offset=at))
        proofs.append(proof)
        length = chunk.stored_bytes
        end = at + padded(length)
        lease[at + length : end] = bytes(end - at - length)
        at = end
    return _Pack(key, [lease[:at]], chunks, at, proofs)


def _stored_chunk(
    source: Origin,
    codec: str,
    one: Cut,
    raw: memoryview,
    out: memoryview,
    data_key: DataKey | None,
) -> tuple[Chunk, bytes]:
    """Bring a chunk into `out` as it is stored: the chunk, at offset 0 of a pack, and its proof."""
    raw_hash = hash_of(raw)
    kind = choose_codec(codec, raw, one)
    length = encode(kind, raw, one, out[: one.nbytes])
    plain = out[:length]
    if not length:
        kind, length, plain = Codec.NONE, one.nbytes, raw
    stored, proof = out[:length], b""
    chunk = Chunk(0, 0, length, one.offset, one.nbytes, kind, raw_hash, b"")
    if data_key is not None:
        proof = seal_chunk(data_key, _part_of(source.snapshot), chunk, plain, stored)
    elif kind is Codec.NONE:
        stored[:] = raw
    if data_key is not None or kind is not Codec.NONE:
        chunk = msgspec.structs.replace(chunk, stored_hash=hash_of(stored))
    if data_key is None and source.keyring.signer is not None:
        proof = digest_of_chunk(stored)
    return chunk, proof


def _part_of(snapshot: Snapshot) -> Part:
    s = snapshot
    return Part(s.attempt, s.step, s.nonce, s.rank, s.world)


def _aligned(header: bytes) -> memoryview:
    """The header in a page of its own, so that the whole pack can be written with O_DIRECT."""
    page = mmap.mmap(-1, PAGE_BYTES)
    page[:] = header
    return memoryview(page)


def _manifest(
    source: Origin, table: Table, packs: list[_Pack], data_key: DataKey | None
) -> SealedManifest:
    snapshot = source.snapshot
    chunks = tuple(
        Chunk(index, *(getattr(chunk, name) for name in Chunk.__struct_fields__[1:]))
        for index, pack in enumerate(packs)
        for chunk in pack.chunks
    )
    manifest = Manifest(
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
    proofs = [proof for pack in packs for proof in pack.proofs]
    signer = source.keyring.signer
    if data_key is not None and source.keyring.encrypting is not None:
        manifest = close_manifest(manifest, data_key, proofs, source.keyring.encrypting)
    elif signer is not None:
        manifest = with_digests(manifest, proofs)
    if signer is not None:
        manifest = signed_manifest(manifest, signer)
    return seal_manifest(manifest)


async def _adopted(source: Origin) -> SealedManifest | None:
    """The manifest of the very snapshot, if it is there already; errors as `Pipeline.write`."""
    snapshot = source.snapshot
    found = await adopt_manifest(source.store, snapshot.id, snapshot.rank, snapshot.nonce)
    if found is not None and found.manifest.sealed_at != snapshot.sealed_at:
        raise RegisterConflictError("is of another snapshot of this step", subject=found.key)
    return found


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
