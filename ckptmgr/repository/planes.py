"""Floats as planes: their exponents, which shrink, apart from all the bits that are noise.

Trained floats are alike in sign and exponent only. Turned left by one bit, a float of 16 or 32 bits
has its whole exponent in the top byte, and the sign, which is noise too, at the bottom. Values of
which none is negative are not turned: their sign shrinks with seven bits of the exponent.

Shifts and narrowing copies of whole tiles run at memory speed; to copy every fourth byte does not.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptmgr.errors import ChunkDamagedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ITEMSIZES = (2, 4, 8)

_HEAD = struct.Struct("<BB6x")  # itemsize, whether turned

_TILE = 1 << 16
"""Elements that are worked on at once: they and what is made of them stay in a core's cache, and
the calls do not count."""


class _Room(threading.local):
    """What one thread decodes in. Made anew for each chunk it would go back to the system and be
    faulted in again, which was a third of the work.
    """

    def __init__(self) -> None:
        self._exponents = bytearray()

    def exponents(self, count: int) -> memoryview:
        """Room for so many bytes; good until the next call."""
        if len(self._exponents) < count:
            self._exponents = bytearray(count)
        return memoryview(self._exponents)[:count]

    @cached_property
    def tiles(self) -> dict[int, NDArray[np.unsignedinteger[Any]]]:
        """Two tiles of words of each length in bytes."""
        import numpy as np

        return {size: np.empty((2, _TILE), f"<u{size}") for size in ITEMSIZES}


_room = _Room()


def encode_planes(
    raw: memoryview, itemsize: int, out: memoryview, limit: int, compress: Callable[[Any], bytes]
) -> int:
    """Write the frame of `raw` into `out`; its length, or 0 where it would be longer than `limit`.

    `out` is at least as long as `raw`; what lies behind the frame is scratch.
    """
    import numpy as np  # as in store/posix.py

    words = np.frombuffer(raw, f"<u{itemsize}")
    frame_at = _frame_at(itemsize, len(words))
    if frame_at >= limit:
        return 0
    turned = bool(words.view(f"<i{itemsize}").min() < 0)
    exponents = np.empty(len(words), np.uint8)
    planes = [*_planes(out, itemsize, len(words)), (8 * itemsize - 8, exponents)]
    for at in range(0, len(words), _TILE):
        tile = words[at : at + _TILE]
        if turned:
            tile = tile << 1 | tile >> (8 * itemsize - 1)
        for shift, plane in planes:
            plane[at : at + _TILE] = tile >> shift if shift else tile
    frame = compress(exponents.data)
    length = frame_at + len(frame)
    if length > limit:
        return 0
    _HEAD.pack_into(out, 0, itemsize, turned)
    out[frame_at:length] = frame
    return length


def decode_planes(
    stored: memoryview,
    raw: memoryview,
    decompress: Callable[[memoryview, memoryview], None],
    *,
    subject: str,
) -> None:
    """Fill `raw` from a frame.

    Raises:
        ChunkDamagedError: it is no frame of this length; `raw` is as it was.
    """
    import numpy as np

    if len(stored) < _HEAD.size:
        raise ChunkDamagedError("is too short for planes", subject=subject)
    itemsize, turned = _HEAD.unpack_from(stored)
    if itemsize not in ITEMSIZES or turned > 1 or len(raw) % itemsize:
        raise ChunkDamagedError(f"has planes of {itemsize} bytes", subject=subject)
    count = len(raw) // itemsize
    frame_at = _frame_at(itemsize, count)
    if len(stored) <= frame_at:
        raise ChunkDamagedError("has planes of another length", subject=subject)
    room = _room.exponents(count)
    decompress(stored[frame_at:], room)
    # From here on nothing fails: an error would keep these arrays, and so the memory, alive.
    words = np.frombuffer(raw, f"<u{itemsize}")
    exponents = np.frombuffer(room, np.uint8)
    narrow_first = [plane for _, plane in _planes(stored, itemsize, count)][::-1]
    for at in range(0, count, _TILE):
        end = min(at + _TILE, count)
        tile: NDArray[np.unsignedinteger[Any]] = exponents[at:end]
        for plane in narrow_first:
            wide = _room.tiles[2 * plane.itemsize][0, : end - at]
            wide[:] = tile
            wide <<= 8 * plane.itemsize
            wide |= plane[at:end]
            tile = wide
        if turned:
            lowest = np.left_shift(tile, 8 * itemsize - 1, out=_room.tiles[itemsize][1, : end - at])
            tile >>= 1
            np.bitwise_or(tile, lowest, out=words[at:end])
        else:
            words[at:end] = tile


def _frame_at(itemsize: int, count: int) -> int:
    """Where the exponents' frame begins: behind the planes of what is below them."""
    return _HEAD.size + count * (itemsize - 1)


def _planes(
    frame: memoryview, itemsize: int, count: int
) -> Iterator[tuple[int, NDArray[np.unsignedinteger[Any]]]]:
    """The planes below the exponents, each with the bits below it in a word: of half a word first,
    then of half of what is left, down to a byte.
    """
    import numpy as np

    at, shift, width = _HEAD.size, 0, itemsize // 2
    while width:
        yield shift, np.frombuffer(frame, f"<u{width}", count, at)
        at, shift, width = at + count * width, shift + 8 * width, width // 2
