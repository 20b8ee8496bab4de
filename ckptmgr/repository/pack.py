"""Packs: immutable objects of many chunks, written straight from host memory where possible."""

from __future__ import annotations

import msgspec

from ckptmgr.errors import ChunkDamagedError
from ckptmgr.repository.record import HEADER_BYTES, Kind, declared_bytes, seal, unseal
from ckptmgr.types import PAGE_BYTES, StepId

_ZEROS = bytes(PAGE_BYTES)


class PackHeader(msgspec.Struct, frozen=True):
    """Whose pack it is."""

    attempt: int
    step: int
    rank: int
    nonce: str


def pack_header(key: str, step: StepId, rank: int, nonce: str) -> bytes:
    """The first page of a pack: a record that says whose it is. Equal inputs, equal bytes."""
    record = seal(Kind.PACK, key, PackHeader(step.attempt, step.step, rank, nonce))
    return record + bytes(PAGE_BYTES - len(record))


def check_pack_header(key: str, page: memoryview) -> None:
    """Refuse a first page that no writer gave to a pack of this name.

    Raises:
        DamageError: it is of another pack, or of none.
    """
    end = declared_bytes(Kind.PACK, key, page[:HEADER_BYTES])
    unseal(Kind.PACK, key, page[:end], PackHeader)
    check_padding(page[end:], subject=key)


def padded(length: int) -> int:
    """Bytes that a stored chunk takes in a pack: whole pages, so that O_DIRECT always works."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def check_padding(view: memoryview, *, subject: str) -> None:
    """Refuse padding that is not zero: a flipped bit is found wherever it is."""
    if view != _ZEROS[: len(view)]:
        raise ChunkDamagedError("has padding that is not zero", subject=subject)
