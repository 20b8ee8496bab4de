"""Bytes to frame and back: none, zstd, and planes of floats with zstd on the exponents only."""

from __future__ import annotations

import threading
from enum import IntEnum
from functools import partial

import zstandard

from ckptmgr.config import CHUNK_BYTES
from ckptmgr.errors import ChunkDamagedError, UsageError
from ckptmgr.repository.chunk import Cut
from ckptmgr.repository.planes import ITEMSIZES, decode_planes, encode_planes

NAMES = ("auto", "none", "zstd", "planes")

GAIN_MIN = 0.97
"""A chunk that does not shrink below this share is stored raw: it reads back without a codec."""

SAMPLE_BYTES = 64 * 1024
"""From the middle of a chunk: 1/64 of the work of compressing it, with each of two codecs."""


class _Compressors(threading.local):
    """Those of one thread: they must not be shared, and take time to make."""

    def __init__(self) -> None:
        self.whole = zstandard.ZstdCompressor(level=1)
        # Exponents are alike in number and not in order: with a small table few matches are
        # found, of which each costs more than it saves, and the zeros where there are any.
        # Trained weights are 1.5 % smaller than by level 1, in half of the time.
        parameters = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=7)
        self.exponents = zstandard.ZstdCompressor(compression_params=parameters)


class _Decompressor(threading.local):
    """That of one thread."""

    def __init__(self) -> None:
        # What a frame may make zstd take for itself, where its length is a lie.
        self.frames = zstandard.ZstdDecompressor(max_window_size=CHUNK_BYTES)


_compressors = _Compressors()
_decompressor = _Decompressor()


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

    All gain on trained floats is in the exponent; integers, bytes and 8-bit floats have no byte of
    their own for it.
    """
    return Codec.PLANES if cut.is_float and cut.itemsize in ITEMSIZES else Codec.ZSTD


def choose_codec(name: str, raw: memoryview, cut: Cut) -> Codec:
    """The codec of one chunk that is not sent as it is."""
    if name in ("none", "zstd"):
        return Codec[name.upper()]
    return _smallest(raw, cut) if name == "auto" else best_for(cut)


def _smallest(raw: memoryview, cut: Cut) -> Codec:
    """What makes a sample of the chunk smallest: zeros and repetition shrink best as a whole, and
    what does not shrink is not worth the time.
    """
    start = (len(raw) - SAMPLE_BYTES) // 2 // cut.itemsize * cut.itemsize
    sample = raw if start <= 0 else raw[start : start + SAMPLE_BYTES]
    room = memoryview(bytearray(len(sample)))
    lengths = {}
    for codec in {best_for(cut), Codec.ZSTD}:
        lengths[codec] = encode(codec, sample, cut, room) or len(sample)
    best = min(sorted(lengths, reverse=True), key=lambda codec: lengths[codec])
    return best if lengths[best] < len(sample) else Codec.NONE


def encode(codec: Codec, raw: memoryview, cut: Cut, out: memoryview) -> int:
    """Write the frame of `raw` into `out`; returns its length, or 0 where it does not pay.

    `out` is at least as long as `raw`; what lies behind the frame is scratch. `Codec.NONE` always
    gives 0: the raw bytes are stored.
    """
    limit = int(len(raw) * GAIN_MIN)
    if codec is Codec.ZSTD:
        frame = _compressors.whole.compress(raw)
        if len(frame) > limit:
            return 0
        out[: len(frame)] = frame
        return len(frame)
    if codec is Codec.PLANES:
        return encode_planes(raw, cut.itemsize, out, limit, _compressors.exponents.compress)
    return 0


def decode(codec: int, stored: memoryview, raw: memoryview, *, subject: str) -> None:
    """Fill `raw` from a stored frame; no more memory than the chunk's own length is taken.

    Raises:
        ChunkDamagedError: not a frame of exactly this content, or an unknown codec.
    """
    try:
        if codec == Codec.ZSTD:
            _decompress(stored, raw, subject)
        elif codec == Codec.PLANES:
            decode_planes(stored, raw, partial(_decompress, subject=subject), subject=subject)
        else:
            raise ChunkDamagedError(f"has the unknown codec {codec}", subject=subject)
    except zstandard.ZstdError as error:
        raise ChunkDamagedError(f"can not be decompressed: {error}", subject=subject) from error


def _decompress(frame: memoryview, plain: memoryview, subject: str) -> None:
    """Fill `plain` at once: with room for all of it zstd takes no memory of its own."""
    if zstandard.get_frame_parameters(frame).content_size != len(plain):
        raise ChunkDamagedError("declares another length than its chunk", subject=subject)
    reader = _decompressor.frames.stream_reader(frame)
    try:
        length = reader.readinto(plain)
    finally:
        del reader  # an error would keep it, and with it the frame's memory, alive
    if length != len(plain):
        raise ChunkDamagedError("has another length than its chunk", subject=subject)
