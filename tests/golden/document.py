"""A chunk as section 4 of docs/format.md has it, read without ckptmgr."""

from __future__ import annotations

import struct

import numpy as np
import zstandard


def chunk_of(stored: bytes, codec: int, length: int) -> bytes:
    """The raw bytes."""
    if codec == 0:
        return stored
    if codec == 1:
        return zstandard.ZstdDecompressor().decompress(stored)
    itemsize, turned = struct.unpack_from("<BB6x", stored)
    count, bits = length // itemsize, 8 * itemsize
    at, shift, width = 8, 0, itemsize // 2
    words = np.zeros(count, "<u8")
    while width:
        plane = np.frombuffer(stored[at : at + count * width], f"<u{width}")
        words += plane.astype("<u8") << np.uint64(shift)
        at, shift, width = at + count * width, shift + 8 * width, width // 2
    top = np.frombuffer(zstandard.ZstdDecompressor().decompress(stored[at:]), "<u1")
    words += top.astype("<u8") << np.uint64(bits - 8)
    if turned:
        words = words >> np.uint64(1) | (words & np.uint64(1)) << np.uint64(bits - 1)
    return words.astype(f"<u{itemsize}").tobytes()
