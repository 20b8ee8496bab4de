"""Packs: immutable objects of many chunks, written straight from host memory where possible."""

from __future__ import annotations

from ckptmgr.errors import ChunkDamagedError
from ckptmgr.repository.record import Kind, seal
from ckptmgr.types import PAGE_BYTES, StepId

_ZEROS = bytes(PAGE_BYTES)


def pack_header(key: str, step: StepId, rank: int, nonce: str) -> bytes:
    """The first page of a pack: a record that says whose it is. Equal inputs, equal bytes."""
    payload = {"attempt": step.attempt, "step": step.step, "rank": rank, "nonce": nonce}
    record = seal(Kind.PACK, key, payload)
    return record + bytes(PAGE_BYTES - len(record))


def padded(length: int) -> int:
    """Bytes that a stored chunk takes in a pack: whole pages, so that O_DIRECT always works."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def check_padding(view: memoryview, *, subject: str) -> None:
    """Refuse padding that is not zero: a flipped bit is found wherever it is."""
    if view != _ZEROS[: len(view)]:
        raise ChunkDamagedError("has padding that is not zero", subject=subject)
