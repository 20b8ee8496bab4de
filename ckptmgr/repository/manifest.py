"""Manifest: all that one rank wrote for one step; written after its packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from ckptmgr.errors import HostBufferDamagedError, LockedError, RecordDamagedError, UsageError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import LEASE_BYTES
from ckptmgr.repository.chunk import Chunk, check_cover
from ckptmgr.repository.envelope import Envelope
from ckptmgr.repository.pack import padded
from ckptmgr.repository.record import (
    ENCRYPTED_VERSION,
    VERSION,
    Kind,
    digest_of,
    seal,
    unseal,
    version_of,
)
from ckptmgr.staging.boxes import box_of, gap, whole_shape
from ckptmgr.staging.layout import decode_layout
from ckptmgr.store.base import check_key
from ckptmgr.types import PAGE_BYTES, Layout, Leaf, StepId, Tags

CHUNKS_MAX = 1 << 20
"""Chunks (and packs) of one manifest: 4 TiB per rank. An array that declares more is refused
before it is read: 10 bytes of hostile payload would become a hundred of objects."""

_Packs = Annotated[tuple[tuple[str, int], ...], msgspec.Meta(max_length=CHUNKS_MAX)]
_Chunks = Annotated[tuple[Chunk, ...], msgspec.Meta(max_length=CHUNKS_MAX)]
_Tags = Annotated[Tags, msgspec.Meta(max_length=1 << 16)]


class ChunkCheck(Protocol):
    """Proves that stored bytes are those of a chunk, and decrypts them where they lie."""

    def __call__(self, chunk: Chunk, stored: memoryview, *, subject: str) -> None:
        """Raises ChunkDamagedError where they are not: then nothing of them is to be used."""


class Manifest(msgspec.Struct, frozen=True):
    """The payload of a manifest record; `layout` and `values` are as in the slot.

    With an `envelope` the part is encrypted, and the manifest *closed*: layout, values, tags and
    raw hashes are in the envelope. `opening.open_manifest` opens it. `chunk_digests` are there
    where the commit is signed and the part is not encrypted; `signer` and `signature` where the
    daemon that wrote the part signs, for who reads it before a commit names it.
    `stall_seconds` is how long training waited for the snapshot, `written_at` the Unix time when
    its packs were durable; 0 where nobody knows. For people only: nothing is decided by them.
    """

    attempt: int
    step: int
    nonce: str
    rank: int
    world: int
    host: str
    layout: bytes
    values: bytes
    packs: _Packs
    chunks: _Chunks
    raw_bytes: int
    stored_bytes: int
    sealed_at: float
    tags: _Tags = {}
    stall_seconds: float = 0.0
    written_at: float = 0.0
    envelope: Envelope | UnsetType = UNSET
    sealed_tags: Envelope | UnsetType = UNSET
    chunk_digests: bytes | UnsetType = UNSET
    signer: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET

    @property
    def id(self) -> StepId:
        """The (attempt, step) it belongs to."""
        return StepId(self.attempt, self.step)

    @property
    def closed(self) -> bool:
        """Whether it is encrypted, and was not opened."""
        return self.envelope is not UNSET

    @property
    def chunk_check(self) -> ChunkCheck | None:
        """What every chunk has to pass beside its hashes.

        Raises:
            LockedError: it is closed.
        """
        self._needs_key()
        return None

    def _needs_key(self) -> None:
        if self.closed and isinstance(self.envelope, Envelope):
            subject = keys.manifest(self.id, self.rank)
            raise LockedError(f"is encrypted with key {self.envelope.key}", subject=subject)

    def read_layout(self) -> Layout:
        """The decoded layout; `read_manifest` has checked that it holds.

        Raises:
            LockedError: it is closed.
        """
        self._needs_key()
        return decode_layout(self.layout, subject=keys.manifest(self.id, self.rank))


class OpenedManifest(Manifest, frozen=True, kw_only=True):
    """A manifest with a check for its chunks. It can not be encoded: it never goes to a store."""

    check: ChunkCheck

    @property
    def closed(self) -> bool:
        """Never."""
        return False

    @property
    def chunk_check(self) -> ChunkCheck | None:
        """As `Manifest.chunk_check`."""
        return self.check


@dataclass(frozen=True, slots=True)
class SealedManifest:
    """A manifest with its key, record bytes and digest."""

    key: str
    manifest: Manifest
    record: bytes
    digest: bytes


def seal_manifest(manifest: Manifest) -> SealedManifest:
    """The record of a manifest."""
    key = keys.manifest(manifest.id, manifest.rank)
    version = ENCRYPTED_VERSION if manifest.closed else VERSION
    record = seal(Kind.MANIFEST, key, manifest, version)
    return SealedManifest(key, manifest, record, digest_of(record))


def read_manifest(step: StepId, rank: int, record: bytes | memoryview) -> SealedManifest:
    """Check a manifest record, and everything in it that a reader relies on. One that is encrypted
    stays closed: its layout is checked by who opens it.

    Raises:
        DamageError: the record, its identity, its layout or its chunk table does not hold.
    """
    key = keys.manifest(step, rank)
    manifest = unseal(Kind.MANIFEST, key, record, Manifest)
    if (manifest.id, manifest.rank) != (step, rank):
        raise RecordDamagedError("belongs to another step or rank", subject=key)
    if manifest.closed is not (version_of(record) == ENCRYPTED_VERSION):
        raise RecordDamagedError("is not of the version that it declares", subject=key)
    if manifest.closed:
        check_cover(manifest.chunks, sum(c.raw_bytes for c in manifest.chunks), subject=key)
    else:
        check_layout(manifest, key)
    _check_packs(manifest, key)
    return SealedManifest(key, manifest, bytes(record), digest_of(record))


def check_layout(manifest: Manifest, key: str) -> None:
    """Refuse a layout that does not hold, or that the chunks do not cover.

    Raises:
        RecordDamagedError: it is so.
    """
    try:
        layout = manifest.read_layout()
    except HostBufferDamagedError as error:
        raise RecordDamagedError(error.message, subject=key) from error
    check_cover(manifest.chunks, layout.data_bytes, subject=key)


def uncovered(manifests: Sequence[Manifest]) -> str:
    """What the ranks' parts together do not hold of a tensor that they share, or nothing.

    A step is restored from the parts of all ranks, into any number of them: whoever commits makes
    sure that they fit together, and that nobody left out what everybody took for another's.
    """
    parts: dict[str, list[tuple[int, Leaf]]] = {}
    for manifest in manifests:
        for leaf in manifest.read_layout().leaves:
            if leaf.global_shape is not None:
                parts.setdefault(leaf.path, []).append((manifest.rank, leaf))
    for path, found in parts.items():
        (first, one), *others = found
        for rank, leaf in others:
            if (leaf.dtype, leaf.global_shape) != (one.dtype, one.global_shape):
                return (
                    f"{path} is {one.dtype}{list(whole_shape(one))} on rank {first}, "
                    f"but {leaf.dtype}{list(whole_shape(leaf))} on rank {rank}"
                )
        missing = gap(whole_shape(one), (box_of(leaf) for _, leaf in found))
        if missing is not None:
            return f"no rank saved {list(missing.shape)} at {list(missing.offset)} of {path}"
    return ""


def _check_packs(manifest: Manifest, key: str) -> None:
    # Every byte of every pack belongs to exactly one chunk, its padding, or the header page.
    ends = [PAGE_BYTES] * len(manifest.packs)
    for chunk in manifest.chunks:
        if not 0 <= chunk.pack < len(ends) or chunk.pack_offset != ends[chunk.pack]:
            raise RecordDamagedError("has chunks that overlap in a pack", subject=key)
        if not 0 < chunk.stored_bytes <= chunk.raw_bytes:
            raise RecordDamagedError(f"has {chunk.stored_bytes} stored bytes", subject=key)
        ends[chunk.pack] += padded(chunk.stored_bytes)
    prefix = keys.packs(manifest.id, manifest.rank)
    for end, (name, nbytes) in zip(ends, manifest.packs, strict=True):
        if end != nbytes or nbytes > LEASE_BYTES:
            raise RecordDamagedError("has a pack of another length", subject=key)
        if not name.startswith(prefix) or not _is_key(name):
            raise RecordDamagedError("names a pack of another step", subject=key)


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except UsageError:
        return False
    return True
