"""Bytes to frame and back: none, zstd, and byte planes with zstd on the exponent plane only."""

from __future__ import annotations

import struct
import threading
from enum import IntEnum

import numpy as np
import zstandard

from ckptmgr.errors import ChunkDamagedError, UsageError
from ckptmgr.repository.chunk import Cut

NAMES = ("auto", "none", "zstd", "planes")

ZSTD_LEVEL = 1
"""Level 1 beats 3 on exponent bytes in ratio and speed (1.188 against 1.170 on trained fp32)."""

GAIN_MIN = 0.97
"""A chunk that does not shrink below this share is stored raw: it reads back without a codec."""

_PLANES_HEAD = struct.Struct("<B7xQ")
_local = threading.local()


class Codec(IntEnum):
    """Codec of one chunk, as recorded in the chunk table."""

    NONE = 0
    ZSTD = 1
    PLANES = 2


def check_name(name: str) -> str:
    """Return a codec name that a user may choose, or raise UsageError."""
    if name not in NAMES:
        raise UsageError(
            f"{name!r} is not a codec", subject="codec", hint=f"Choose one of {', '.join(NAMES)}."
        )
    return name


def best_for(cut: Cut) -> Codec:
    """The codec that pays for elements of this kind.

    All gain on trained floats is in the sign and exponent byte; integers, bytes and 8-bit floats
    have no such plane.
    """
    return Codec.PLANES if cut.is_float and cut.itemsize >= 2 else Codec.ZSTD


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    found: zstandard.ZstdCompressor = _local.compressor
    return found


def encode(codec: Codec, raw: memoryview, cut: Cut, out: memoryview) -> int:
    """Write the frame of `raw` into `out`; returns its length, or 0 where it does not pay.

    `out` is at least as long as `raw`. `Codec.NONE` always gives 0: the raw bytes are stored.
    """
    limit = int(len(raw) * GAIN_MIN)
    if codec is Codec.ZSTD:
        frame = _compressor().compress(raw)
        if len(frame) > limit:
            return 0
        out[: len(frame)] = frame
        return len(frame)
    if codec is Codec.PLANES:
        return _encode_planes(raw, cut.itemsize, out, limit)
    return 0


def _encode_planes(raw: memoryview, itemsize: int, out: memoryview, limit: int) -> int:
    elements = np.frombuffer(raw, np.uint8).reshape(-1, itemsize)
    frame = _compressor().compress(np.ascontiguousarray(elements[:, -1]).data)
    rest = elements.shape[0] * (itemsize - 1)
    length = _PLANES_HEAD.size + len(frame) + rest
    if length > limit:
        return 0
    _PLANES_HEAD.pack_into(out, 0, itemsize, len(frame))
    rest_at = _PLANES_HEAD.size + len(frame)
    out[_PLANES_HEAD.size : rest_at] = frame
    target = np.frombuffer(out[rest_at:length], np.uint8).reshape(-1, itemsize - 1)
    target[:] = elements[:, :-1]
    return length


def decode(codec: int, stored: memoryview, raw: memoryview, *, subject: str) -> None:
    """Fill `raw` from a stored frame; no more memory than the chunk's own length is taken.

    Raises:
        ChunkDamagedError: not a frame of exactly this content, or an unknown codec.
    """
    try:
        if codec == Codec.ZSTD:
            raw[:] = _decompress(stored, len(raw), subject)
        elif codec == Codec.PLANES:
            _decode_planes(stored, raw, subject)
        else:
            raise ChunkDamagedError(f"has the unknown codec {codec}", subject=subject)
    except zstandard.ZstdError as error:
        raise ChunkDamagedError(f"can not be decompressed: {error}", subject=subject) from error


def _decompress(frame: memoryview, length: int, subject: str) -> bytes:
    # A frame without content size, or with another one, is refused before memory is taken.
    if zstandard.get_frame_parameters(frame).content_size != length:
        raise ChunkDamagedError("declares another length than its chunk", subject=subject)
    plain = zstandard.ZstdDecompressor().decompress(frame)
    if len(plain) != length:
        raise ChunkDamagedError("has another length than its chunk", subject=subject)
    return plain


def _decode_planes(stored: memoryview, raw: memoryview, subject: str) -> None:
    if len(stored) < _PLANES_HEAD.size:
        raise ChunkDamagedError("is too short for byte planes", subject=subject)
    itemsize, length = _PLANES_HEAD.unpack_from(stored)
    rest_at = _PLANES_HEAD.size + length
    count = len(raw) // max(itemsize, 1)
    if itemsize < 2 or count * itemsize != len(raw):
        raise ChunkDamagedError(f"has byte planes of {itemsize} bytes", subject=subject)
    if rest_at + count * (itemsize - 1) != len(stored):
        raise ChunkDamagedError("has byte planes of another length", subject=subject)
    top = _decompress(stored[_PLANES_HEAD.size : rest_at], count, subject)
    # From here on nothing fails: an error would keep these arrays, and so the memory, alive.
    elements = np.frombuffer(raw, np.uint8).reshape(-1, itemsize)
    elements[:, -1] = np.frombuffer(top, np.uint8)
    elements[:, :-1] = np.frombuffer(stored[rest_at:], np.uint8).reshape(-1, itemsize - 1)


class AutoCodec:
    """Decides per pack whether compression finishes sooner, from what was measured so far.

    `store_rate` and `codec_rate` are bytes per second (of stored bytes and of raw bytes), `ratio`
    is raw/stored; each a moving average. Every `PROBE_EVERY` packs one is compressed whatever
    the decision, so that the measurement stays fresh.
    """

    PROBE_EVERY = 16
    _KEEP = 0.7  # weight of the past in the moving averages

    def __init__(self) -> None:
        self.store_rate = 0.0
        self.codec_rate = 0.0
        self.ratio = 0.0
        self._packs = 0

    def saw_store(self, stored_bytes: int, seconds: float) -> None:
        """Learn from a finished put."""
        self.store_rate = self._mix(self.store_rate, stored_bytes / max(seconds, 1e-6))

    def saw_codec(self, raw_bytes: int, stored_bytes: int, seconds: float) -> None:
        """Learn from a compressed pack."""
        self.codec_rate = self._mix(self.codec_rate, raw_bytes / max(seconds, 1e-6))
        self.ratio = self._mix(self.ratio, raw_bytes / max(stored_bytes, 1))

    def _mix(self, old: float, new: float) -> float:
        return new if old == 0 else self._KEEP * old + (1 - self._KEEP) * new

    def compress_next(self) -> bool:
        """Whether the next pack is compressed."""
        self._packs += 1
        if self.store_rate == 0:
            return False  # the first pack measures the store
        if self.codec_rate == 0 or self._packs % self.PROBE_EVERY == 0:
            return True
        return compression_pays(self.store_rate, self.codec_rate, self.ratio)


def compression_pays(store_rate: float, codec_rate: float, ratio: float) -> bool:
    """Whether codec and store, overlapped, finish clearly (5 %) before the store alone."""
    return max(1 / codec_rate, 1 / (store_rate * ratio)) < 0.95 / store_rate
