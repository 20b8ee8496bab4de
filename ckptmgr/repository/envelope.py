"""Encryption of what is stored: data keys, each wrapped by a key, and what they seal.

AES-256-GCM under a data key of its own for each part (docs/decisions/0032); the nonces are the
places of what is sealed, and a place is sealed once.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from ckptmgr.errors import ChunkDamagedError, RecordDamagedError, UsageError
from ckptmgr.repository.chunk import Chunk

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import AEADDecryptionContext, AEADEncryptionContext

KEY_BYTES = 32
TAG_BYTES = 16
_NONCE = struct.Struct("<IQ")


class What(IntEnum):
    """What a data key seals: the first word of the nonce, so that no two kinds share one."""

    CHUNK = 0
    SECRETS = 1
    TAGS = 2


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Sealed bytes, their data key wrapped by the key with this id."""

    key: str
    wrapped: bytes
    sealed: bytes


@dataclass(frozen=True, slots=True)
class Key:
    """A key that wraps data keys. Its secret is in no text that is made of it."""

    id: str
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> Key:
        """The key with these bytes; its id says nothing about them."""
        assert len(secret) == KEY_BYTES
        return cls(blake2b(b"ckptmgr key id", key=secret, digest_size=8).hexdigest(), secret)


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of which incarnation something belongs to."""

    attempt: int
    step: int
    nonce: str
    rank: int
    world: int


class DataKey:
    """A key for the bytes of one write of one part."""

    def __init__(self, secret: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.algorithms import AES256

        self._secret = secret
        self._algorithm = AES256(secret)

    @classmethod
    def fresh(cls) -> DataKey:
        """A new one."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def unwrap(cls, key: Key, wrapped: bytes, *, subject: str) -> DataKey:
        """The one that `key` has wrapped.

        Raises:
            RecordDamagedError: it was not this key, though it has its id.
        """
        from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

        try:
            found = aes_key_unwrap(key.secret, wrapped)
        except InvalidUnwrap:
            raise RecordDamagedError(f"has no data key of key {key.id}", subject=subject) from None
        if len(found) != KEY_BYTES:
            raise RecordDamagedError("has a data key of another length", subject=subject)
        return cls(found)

    def wrap(self, key: Key) -> bytes:
        """The data key, to be kept beside what it seals."""
        from cryptography.hazmat.primitives.keywrap import aes_key_wrap

        return aes_key_wrap(key.secret, self._secret)

    def seal(
        self, what: What, number: int, context: list[Any], plain: memoryview, out: memoryview
    ) -> bytes:
        """Encrypt `plain` into `out`, which has its length and may be the same; returns the tag.

        Nothing else may ever be sealed under this data key with the same `what` and `number`.
        """
        work = self._encryptor(what, number, context)
        work.update_into(plain, out)
        work.finalize()
        return work.tag

    def open(
        self, what: What, number: int, context: list[Any], stored: memoryview, tag: bytes
    ) -> bool:
        """Decrypt in place; False if it is not what was sealed: then nothing of it may be used."""
        from cryptography.exceptions import InvalidTag

        work = self._decryptor(what, number, context)
        work.update_into(stored, stored)
        try:
            work.finalize_with_tag(tag)
        except InvalidTag:
            return False
        return True

    def _encryptor(self, what: What, number: int, context: list[Any]) -> AEADEncryptionContext:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        work = Cipher(self._algorithm, GCM(_NONCE.pack(what, number))).encryptor()
        work.authenticate_additional_data(msgspec.msgpack.encode(context))
        return work

    def _decryptor(self, what: What, number: int, context: list[Any]) -> AEADDecryptionContext:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.modes import GCM

        work = Cipher(self._algorithm, GCM(_NONCE.pack(what, number))).decryptor()
        work.authenticate_additional_data(msgspec.msgpack.encode(context))
        return work


def check_library() -> None:
    """Refuse keys where nothing can be done with them.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        import cryptography  # noqa: F401 - only whether it is there
    except ImportError:
        raise UsageError(
            "needs the package `cryptography`",
            subject="encryption",
            hint="Run `pip install 'ckptmgr[encryption]'`.",
        ) from None


def chunk_context(part: Part, offset: int, nbytes: int, codec: int) -> list[Any]:
    """What a chunk is, so that no other passes for it."""
    p = part
    place = [p.attempt, p.step, p.nonce, p.rank, p.world]
    return ["chunk", *place, offset, nbytes, codec]


def seal_chunk(
    data_key: DataKey, part: Part, chunk: Chunk, plain: memoryview, out: memoryview
) -> bytes:
    """Encrypt what a codec made of a chunk; returns its tag."""
    context = chunk_context(part, chunk.raw_offset, chunk.raw_bytes, chunk.codec)
    return data_key.seal(What.CHUNK, chunk.raw_offset, context, plain, out)


@dataclass(frozen=True, slots=True)
class ChunkLock:
    """Opens the chunks of one part in place; `tags` are theirs by raw offset."""

    data_key: DataKey
    part: Part
    tags: dict[int, bytes]

    def __call__(self, chunk: Chunk, stored: memoryview, *, subject: str) -> None:
        """Decrypt the stored bytes of a chunk.

        Raises:
            ChunkDamagedError: they are not what was sealed as this chunk.
        """
        at, nbytes, codec = chunk.raw_offset, chunk.raw_bytes, chunk.codec
        context = chunk_context(self.part, at, nbytes, codec)
        if not self.data_key.open(What.CHUNK, at, context, stored, self.tags[at]):
            raise ChunkDamagedError("is not what was encrypted as this chunk", subject=subject)


def seal_bytes(data_key: DataKey, what: What, context: list[Any], plain: bytes) -> bytes:
    """Encrypt a small thing; the tag is behind it."""
    out = bytearray(len(plain))
    tag = data_key.seal(what, 0, context, memoryview(plain), memoryview(out))
    return bytes(out) + tag


def open_bytes(
    data_key: DataKey, what: What, context: list[Any], sealed: bytes, *, subject: str
) -> bytes:
    """Decrypt a small thing.

    Raises:
        RecordDamagedError: it is not what was sealed.
    """
    plain, tag = bytearray(sealed[:-TAG_BYTES]), sealed[-TAG_BYTES:]
    if len(tag) < TAG_BYTES or not data_key.open(what, 0, context, memoryview(plain), tag):
        raise RecordDamagedError("is not what was encrypted there", subject=subject)
    return bytes(plain)
