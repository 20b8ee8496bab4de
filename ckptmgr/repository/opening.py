"""Manifests and tags of encrypted parts: closed by who writes them, opened by who has the key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import msgspec
import zstandard
from msgspec import UNSET

from ckptmgr.errors import ChunkDamagedError, RecordDamagedError, UntrustedError
from ckptmgr.repository.chunk import Chunk
from ckptmgr.repository.envelope import (
    TAG_BYTES,
    ChunkLock,
    DataKey,
    Envelope,
    Key,
    Part,
    What,
    open_bytes,
    seal_bytes,
)
from ckptmgr.repository.keyring import CLEAR, CLEAR_HINT, Keyring
from ckptmgr.repository.manifest import (
    ChunkCheck,
    Manifest,
    OpenedManifest,
    SealedManifest,
    check_layout,
)
from ckptmgr.repository.record import PAYLOAD_BYTES_MAX
from ckptmgr.repository.signature import MANIFEST, Signer, is_signed
from ckptmgr.types import MALFORMED, Tags

HASH_BYTES = 16
DIGEST_BYTES = 32
_ZSTD_LEVEL = 1  # as of manifests: names and shapes repeat


class Secrets(msgspec.Struct, frozen=True, array_like=True):
    """What an envelope of a manifest holds; hashes and tags end to end, in the order of chunks."""

    layout: bytes
    values: bytes
    tags: Tags
    raw_hashes: bytes
    chunk_tags: bytes


def part_of(manifest: Manifest) -> Part:
    """Whose manifest it is."""
    m = manifest
    return Part(m.attempt, m.step, m.nonce, m.rank, m.world)


# -- close ----------------------------------------------------------------------------------------


def close_manifest(
    manifest: Manifest, data_key: DataKey, chunk_tags: Sequence[bytes], key: Key
) -> Manifest:
    """The manifest as it is stored: what names and describes tensors is in an envelope."""
    hashes = b"".join(chunk.raw_hash for chunk in manifest.chunks)
    secrets = Secrets(manifest.layout, manifest.values, manifest.tags, hashes, b"".join(chunk_tags))
    changes: dict[str, Any] = {"layout": b"", "values": b"", "tags": {}}
    if manifest.rank == 0:
        changes["sealed_tags"] = seal_tags(manifest, key)
    chunks = tuple(msgspec.structs.replace(chunk, raw_hash=b"") for chunk in manifest.chunks)
    envelope = Envelope(key.id, data_key.wrap(key), b"")
    closed = msgspec.structs.replace(manifest, **changes, chunks=chunks, envelope=envelope)
    plain = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(msgspec.msgpack.encode(secrets))
    sealed = seal_bytes(data_key, What.SECRETS, ["manifest", closed], plain)
    envelope = msgspec.structs.replace(envelope, sealed=sealed)
    return msgspec.structs.replace(closed, envelope=envelope)


def seal_tags(manifest: Manifest, key: Key) -> Envelope:
    """The tags of a step, readable without any manifest."""
    data_key = DataKey.fresh()
    context = ["tags", manifest.attempt, manifest.step, manifest.nonce]
    sealed = seal_bytes(data_key, What.TAGS, context, msgspec.msgpack.encode(manifest.tags))
    return Envelope(key.id, data_key.wrap(key), sealed)


# -- open -----------------------------------------------------------------------------------------


def open_manifest(sealed: SealedManifest, keyring: Keyring) -> SealedManifest:
    """A manifest of which everything can be read, and whose chunks are checked as they must be.

    Raises:
        LockedError: it is encrypted with a key that the keyring does not have.
        UntrustedError: the keyring asks for more than it has.
        DamageError: its secrets, its layout or its chunk table do not hold.
    """
    manifest, subject = sealed.manifest, sealed.key
    if isinstance(manifest.envelope, Envelope):
        opened = _opened(manifest, manifest.envelope, keyring, subject)
        return SealedManifest(subject, opened, sealed.record, sealed.digest)
    if keyring.refuses_clear:
        raise UntrustedError(CLEAR, subject=subject, hint=CLEAR_HINT)
    if keyring.trusted is None:
        return sealed
    fields = {name: getattr(manifest, name) for name in Manifest.__struct_fields__}
    checked = OpenedManifest(**fields, check=_digests_of(manifest, subject))
    return SealedManifest(subject, checked, sealed.record, sealed.digest)


def _opened(
    manifest: Manifest, envelope: Envelope, keyring: Keyring, subject: str
) -> OpenedManifest:
    key = keyring.key_of(envelope, subject=subject)
    data_key = DataKey.unwrap(key, envelope.wrapped, subject=subject)
    empty = msgspec.structs.replace(envelope, sealed=b"")
    closed = msgspec.structs.replace(manifest, envelope=empty, signer=UNSET, signature=UNSET)
    context = ["manifest", closed]
    plain = open_bytes(data_key, What.SECRETS, context, envelope.sealed, subject=subject)
    secrets = _secrets_of(plain, len(manifest.chunks), subject)
    hashes = _pieces(secrets.raw_hashes, HASH_BYTES)
    tags = _pieces(secrets.chunk_tags, TAG_BYTES)
    chunks = tuple(
        msgspec.structs.replace(chunk, raw_hash=raw_hash)
        for chunk, raw_hash in zip(manifest.chunks, hashes, strict=True)
    )
    by_offset = {chunk.raw_offset: tag for chunk, tag in zip(chunks, tags, strict=True)}
    fields = {name: getattr(manifest, name) for name in Manifest.__struct_fields__}
    fields |= {"layout": secrets.layout, "values": secrets.values, "tags": secrets.tags}
    check = ChunkLock(data_key, part_of(manifest), by_offset)
    opened = OpenedManifest(**{**fields, "chunks": chunks}, check=check)
    check_layout(opened, subject)
    return opened


def _secrets_of(plain: bytes, chunks: int, subject: str) -> Secrets:
    """What was sealed; who has the key made it, but memory is bounded all the same."""
    try:
        if not 0 <= zstandard.get_frame_parameters(plain).content_size <= PAYLOAD_BYTES_MAX:
            raise RecordDamagedError("declares secrets that are too long", subject=subject)
        encoded = zstandard.ZstdDecompressor().decompress(plain)
        secrets = msgspec.msgpack.decode(encoded, type=Secrets)
    except (zstandard.ZstdError, *MALFORMED) as error:
        raise RecordDamagedError(f"has malformed secrets: {error}", subject=subject) from error
    lengths = len(secrets.raw_hashes), len(secrets.chunk_tags)
    if lengths != (chunks * HASH_BYTES, chunks * TAG_BYTES):
        raise RecordDamagedError("does not have a hash and a tag per chunk", subject=subject)
    return secrets


def _pieces(joined: bytes, length: int) -> list[bytes]:
    return [joined[at : at + length] for at in range(0, len(joined), length)]


def open_tags(envelope: Envelope, step: tuple[int, int, str], keyring: Keyring, key: str) -> Tags:
    """The tags that a COMMIT of (attempt, step, nonce) holds; none, if the keyring lacks the key.

    Raises:
        RecordDamagedError: they are not what was sealed there.
    """
    found = keyring.known.get(envelope.key)
    if found is None:
        return {}
    data_key = DataKey.unwrap(found, envelope.wrapped, subject=key)
    plain = open_bytes(data_key, What.TAGS, ["tags", *step], envelope.sealed, subject=key)
    try:
        return msgspec.msgpack.decode(plain, type=Tags)
    except MALFORMED as error:
        raise RecordDamagedError(f"has malformed tags: {error}", subject=key) from error


# -- signed ---------------------------------------------------------------------------------------


def signed_manifest(manifest: Manifest, signer: Signer) -> Manifest:
    """A manifest, as it is stored, that says who wrote it."""
    named = msgspec.structs.replace(manifest, signer=signer.id, signature=UNSET)
    signature = signer.sign(MANIFEST, msgspec.msgpack.encode(named))
    return msgspec.structs.replace(named, signature=signature)


def check_vouched(sealed: SealedManifest, keyring: Keyring) -> None:
    """Refuse a manifest that no commit names yet, unless a daemon that is trusted wrote it: until
    then whoever can write the store can exchange it, and one that is encrypted is not opened.

    Raises:
        UntrustedError: none of the keys that the keyring asks for has signed it.
    """
    manifest, keys = sealed.manifest, keyring.vouching
    if keys is None:
        return
    signer, signature = manifest.signer, manifest.signature
    if not (isinstance(signer, str) and isinstance(signature, str)):
        raise UntrustedError("is not signed", subject=sealed.key)
    payload = msgspec.msgpack.encode(msgspec.structs.replace(manifest, signature=UNSET))
    if not is_signed(keys, signer, signature, MANIFEST, payload):
        why = f"is not signed by any of the keys {', '.join(keys)}"
        raise UntrustedError(f"{why}; it names {signer[:16]}", subject=sealed.key)


# -- signed, not encrypted ------------------------------------------------------------------------


def digest_of_chunk(stored: memoryview) -> bytes:
    """SHA-256, which the processor has an instruction for: the hashes of chunks (XXH3) find
    damage, and a signature of them would sign nothing.
    """
    return sha256(stored).digest()


@dataclass(frozen=True, slots=True)
class ChunkDigests:
    """Checks the chunks of a part whose commit is signed; `digests` by raw offset."""

    digests: dict[int, bytes]

    def __call__(self, chunk: Chunk, stored: memoryview, *, subject: str) -> None:
        """Compare the digest of stored bytes.

        Raises:
            ChunkDamagedError: they are not what was signed.
        """
        if digest_of_chunk(stored) != self.digests[chunk.raw_offset]:
            raise ChunkDamagedError("is not what was signed", subject=subject)


def _digests_of(manifest: Manifest, subject: str) -> ChunkCheck:
    digests = manifest.chunk_digests
    if not isinstance(digests, bytes):
        raise UntrustedError(
            "has no digests of its chunks, so that its commit vouches for nothing", subject=subject
        )
    if len(digests) != len(manifest.chunks) * DIGEST_BYTES:
        raise RecordDamagedError("does not have a digest per chunk", subject=subject)
    pieces = _pieces(digests, DIGEST_BYTES)
    chunks = zip(manifest.chunks, pieces, strict=True)
    return ChunkDigests({chunk.raw_offset: digest for chunk, digest in chunks})


def with_digests(manifest: Manifest, digests: Sequence[bytes]) -> Manifest:
    """A manifest for a commit that will be signed."""
    return msgspec.structs.replace(manifest, chunk_digests=b"".join(digests))
