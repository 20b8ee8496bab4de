"""The frame of every small object: magic, kind, version, lengths, and a digest over its key too."""

from __future__ import annotations

import struct
from enum import IntEnum
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec
import zstandard

from ckptmgr.errors import RecordDamagedError, UnsupportedFormatError
from ckptmgr.types import MALFORMED

MAGIC = b"\x89CKPT\r\n\x1a"
VERSION = 1
ENCRYPTED_VERSION = 2
"""Of a manifest whose secrets are encrypted: who knows version 1 alone refuses it as newer."""

PAYLOAD_BYTES_MAX = 256 << 20
"""Bound of a payload before any memory is taken for it; a manifest of 1 M leaves is 100 MiB."""

JSON_BYTES_MAX = 16 << 20
"""Bound of every payload but a manifest's; the commit of 100,000 ranks is 7 MiB."""

_HEAD = struct.Struct("<8sBBHIQQ")
_DIGEST_BYTES = 32
HEADER_BYTES = _HEAD.size + _DIGEST_BYTES
_VERSION_AT = 9
_FLAG_ZSTD = 1
_ZSTD_LEVEL = 1  # manifests are hashes and offsets: higher levels gain nothing

T = TypeVar("T")


class Kind(IntEnum):
    """What a record is."""

    FORMAT = 1
    CLAIM = 2
    ACTIVE = 3
    HAVE = 4
    RESUME = 5
    MANIFEST = 6
    COMMIT = 7
    RETIRED = 8
    HOLD = 9
    VERIFIED = 10
    TAGS = 11
    PACK = 12
    SPOOL = 13


def _digest(head: bytes, key: str, stored: bytes | memoryview) -> bytes:
    state = blake2b(head, digest_size=_DIGEST_BYTES)
    state.update(key.encode())
    state.update(stored)
    return state.digest()


def seal(kind: Kind, key: str, payload: Any, version: int = VERSION) -> bytes:
    """The bytes of a record under `key`; equal inputs give equal bytes."""
    packed = kind is Kind.MANIFEST
    raw = msgspec.msgpack.encode(payload) if packed else msgspec.json.encode(payload)
    stored = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(raw) if packed else raw
    flags = _FLAG_ZSTD if packed else 0
    head = _HEAD.pack(MAGIC, kind, version, flags, 0, len(raw), len(stored))
    return head + _digest(head, key, stored) + stored


def declared_bytes(kind: Kind, key: str, header: bytes | memoryview) -> int:
    """Length of the whole record, from its first HEADER_BYTES; nothing else is believed of them,
    so that the bound is that of the `kind` which is expected, whatever kind they say.

    Raises:
        RecordDamagedError: not a record, or longer than any of this kind is.
    """
    magic, _kind, _version, _flags, _zero, _raw_length, length = _HEAD.unpack_from(header)
    if magic != MAGIC:
        raise RecordDamagedError("does not start with the magic of a record", subject=key)
    if length > _bound(kind):
        raise RecordDamagedError(f"declares a payload of {length} bytes", subject=key)
    return HEADER_BYTES + int(length)


def _versions(kind: Kind) -> tuple[int, ...]:
    return (VERSION, ENCRYPTED_VERSION) if kind is Kind.MANIFEST else (VERSION,)


def version_of(record: bytes | memoryview) -> int:
    """The version of a record that was unsealed."""
    return record[_VERSION_AT]


def _bound(kind: Kind) -> int:
    return PAYLOAD_BYTES_MAX if kind is Kind.MANIFEST else JSON_BYTES_MAX


def digest_of(record: bytes | memoryview) -> bytes:
    """The digest in the header of a record."""
    return bytes(record[_HEAD.size : HEADER_BYTES])


def unseal(kind: Kind, key: str, record: bytes | memoryview, type_: type[T]) -> T:
    """Check a record that was read from `key` and decode its payload as `type_`.

    Raises:
        UnsupportedFormatError: not a record of ours, or of a newer version.
        RecordDamagedError: wrong kind, length, digest or payload.
    """
    if len(record) < HEADER_BYTES:
        raise RecordDamagedError(f"is cut off at {len(record)} bytes", subject=key)
    magic, found, version, flags, zero, raw_length, length = _HEAD.unpack_from(record)
    if magic != MAGIC:
        raise RecordDamagedError("does not start with the magic of a record", subject=key)
    stored = memoryview(record)[HEADER_BYTES:]
    if _digest(bytes(record[: _HEAD.size]), key, stored) != digest_of(record):
        raise RecordDamagedError("does not have the recorded digest", subject=key)
    if version not in _versions(kind) or zero or flags & ~_FLAG_ZSTD:
        raise UnsupportedFormatError(f"has version {version}, not {VERSION}", subject=key)
    packed = bool(flags)
    if found != kind or length != len(stored) or packed is not (kind is Kind.MANIFEST):
        raise RecordDamagedError(f"is not a {kind.name.lower()} record", subject=key)
    if raw_length > _bound(kind):
        raise RecordDamagedError(f"declares a payload of {raw_length} bytes", subject=key)
    raw = _unpack(key, stored, raw_length) if packed else stored
    return _decode(key, raw, type_, packed=packed)


def _unpack(key: str, stored: memoryview, raw_length: int) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != raw_length:
            raise RecordDamagedError("declares another size than its frame", subject=key)
        # content_size was checked above, so the output is bounded by PAYLOAD_BYTES_MAX.
        return zstandard.ZstdDecompressor().decompress(stored)
    except zstandard.ZstdError as error:
        raise RecordDamagedError(f"can not be decompressed: {error}", subject=key) from error


def _decode(key: str, raw: bytes | memoryview, type_: type[T], *, packed: bool) -> T:
    try:
        if packed:
            return msgspec.msgpack.decode(raw, type=type_)
        return msgspec.json.decode(raw, type=type_)
    except MALFORMED as error:
        raise RecordDamagedError(f"has a malformed payload: {error}", subject=key) from error
