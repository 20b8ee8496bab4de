"""What the storm's trainer saves: bytes that are a pure function of (attempt, step).

Every 4 KiB block names its attempt, its step and its place, and every word of it depends on both
numbers: a block that is torn, stale or moved, and a state mixed of two, can not pass for another.
"""

from __future__ import annotations

from functools import cache

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from ckptmgr.staging.layout import encode_layout
from ckptmgr.staging.values import LEAF, VALUE
from ckptmgr.types import Group, Layout, Leaf

BLOCK_BYTES = 4096
WORDS = BLOCK_BYTES // 8
MARK = 0x5EED_B10C_5EED_B10C
DICT = 9
VALUES_BYTES = 256 << 10
"""Long enough that sealing takes a moment in which a kill can land."""

Words = npt.NDArray[np.uint64]


@cache
def _noise(blocks: int) -> Words:
    """Random words that do not depend on the step; half of each block is compressible."""
    words = np.random.default_rng(blocks).integers(0, 1 << 63, (blocks, WORDS), dtype=np.uint64)
    words[:, WORDS // 2 :] = np.arange(blocks, dtype=np.uint64)[:, None]
    words.flags.writeable = False
    return words


def _mix(attempt: int, step: int) -> np.uint64:
    digest = xxhash.xxh3_64_intdigest(f"{attempt}.{step}".encode())
    return np.uint64(digest)


def content(attempt: int, step: int, nbytes: int) -> Words:
    """The state of a step: `nbytes` (a multiple of BLOCK_BYTES) as rows of one block each."""
    blocks = nbytes // BLOCK_BYTES
    words = _noise(blocks) ^ _mix(attempt, step)
    words[:, 0] = MARK
    words[:, 1] = attempt
    words[:, 2] = step
    words[:, 3] = np.arange(blocks, dtype=np.uint64)
    return words


def values_of(attempt: int, step: int) -> bytes:
    """The plain values of a step, which travel beside its data: one long byte string."""
    return msgspec.msgpack.encode([content(attempt, step, VALUES_BYTES).tobytes()])


def fault_in(found: memoryview | bytes, attempt: int, step: int, nbytes: int) -> str:
    """Say how `found` differs from the state of (attempt, step); empty if it does not."""
    if len(found) != nbytes:
        return f"has {len(found)} bytes, not {nbytes}"
    words = np.frombuffer(found, np.uint64).reshape(-1, WORDS)
    wrong = np.flatnonzero((words != content(attempt, step, nbytes)).any(axis=1))
    if not len(wrong):
        return ""
    claims = {(int(a), int(s)) for a, s in words[wrong][:, 1:3].tolist()}
    shown = sorted(claims)[:4]
    return f"{len(wrong)} of {len(words)} blocks are not {attempt}.{step}; they say {shown}"


@cache
def layout_of(nbytes: int) -> tuple[bytes, bytes]:
    """The encoded layout of `nbytes` (a multiple of 2 BLOCK_BYTES), and its hash.

    Two groups of different kinds, so that a codec that is chosen by kind takes both its ways.
    """
    half = nbytes // 2
    leaves = (
        Leaf("words", "uint64", (half // 8,), 0, half),
        Leaf("floats", "float32", (half // 4,), half, half),
    )
    groups = (Group(0, half, 8, False), Group(half, half, 4, True))
    places = ["words", [LEAF, 0, 0], "floats", [LEAF, 1, 0], "values", [VALUE, 0]]
    tree = msgspec.msgpack.encode([DICT, *places])
    encoded = encode_layout(Layout(leaves, groups, nbytes, tree))
    return encoded, xxhash.xxh3_128_digest(encoded)
