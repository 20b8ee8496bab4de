"""Cutting a snapshot's data region into chunks, and what is recorded of each."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import xxhash

from ckptmgr.config import CHUNK_BYTES
from ckptmgr.errors import RecordDamagedError
from ckptmgr.types import Group


@dataclass(frozen=True, slots=True)
class Cut:
    """A run of the data region that becomes one chunk, with what a codec must know of it."""

    offset: int
    nbytes: int
    itemsize: int
    is_float: bool


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """One stored chunk: `stored_hash` is empty where the stored bytes are the raw bytes."""

    pack: int
    pack_offset: int
    stored_bytes: int
    raw_offset: int
    raw_bytes: int
    codec: int
    raw_hash: bytes
    stored_hash: bytes

    @property
    def end(self) -> int:
        """First byte of the data region behind the chunk."""
        return self.raw_offset + self.raw_bytes


def cut(groups: tuple[Group, ...], chunk_bytes: int = CHUNK_BYTES) -> list[Cut]:
    """Cut the groups of a layout into chunks, in order; none crosses a group."""
    return [
        Cut(at, min(chunk_bytes, group.offset + group.nbytes - at), group.itemsize, group.is_float)
        for group in groups
        for at in range(group.offset, group.offset + group.nbytes, chunk_bytes)
    ]


def hash_of(view: bytes | memoryview) -> bytes:
    """XXH3 with 128 bits: 23 GiB/s here, against 1.6 of SHA-256; it finds damage, not forgery."""
    return xxhash.xxh3_128_digest(view)


def check_cover(chunks: tuple[Chunk, ...], data_bytes: int, *, subject: str) -> None:
    """Refuse a chunk table that does not cover the data region exactly, in order.

    Raises:
        RecordDamagedError: a gap, an overlap, or a chunk larger than the format allows.
    """
    end = 0
    for chunk in chunks:
        if chunk.raw_offset != end or not 0 < chunk.raw_bytes <= CHUNK_BYTES:
            raise RecordDamagedError(f"has no chunk at {end}", subject=subject)
        end += chunk.raw_bytes
    if end != data_bytes:
        raise RecordDamagedError(f"covers {end} of {data_bytes} bytes", subject=subject)
