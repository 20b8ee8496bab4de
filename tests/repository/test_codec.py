"""Codecs give every bit back, take no more room than the raw bytes, and refuse what is no frame."""

from __future__ import annotations

import os
import random
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import ChunkDamagedError, UsageError
from ckptmgr.repository.chunk import Cut
from ckptmgr.repository.codec import (
    GAIN_MIN,
    Codec,
    best_for,
    check_name,
    choose_codec,
    decode,
    encode,
)

DTYPES = [
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"),
]
ITEMSIZES = st.sampled_from([1, 2, 4, 8, 16])


def frame_of(codec: Codec, raw: bytes, itemsize: int) -> bytes | None:
    """The frame, or None where it does not pay."""
    room = bytearray(b"\xaa" * (len(raw) + 64))
    cut = Cut(0, len(raw), itemsize, True)
    length = encode(codec, memoryview(raw), cut, memoryview(room)[: len(raw)])
    assert length <= int(len(raw) * GAIN_MIN)
    assert room[len(raw) :] == b"\xaa" * 64
    return bytes(room[:length]) if length else None


def back(codec: int, frame: bytes, length: int) -> bytes:
    raw = bytearray(length)
    decode(codec, memoryview(frame), memoryview(raw), subject="test")
    return bytes(raw)


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.PLANES])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_encoded_comes_back(codec: Codec, data: st.DataObject) -> None:
    itemsize = data.draw(ITEMSIZES if codec is Codec.ZSTD else st.sampled_from([2, 4, 8]))
    count = data.draw(st.integers(1, 3000))
    seed = data.draw(st.binary(min_size=1, max_size=400))
    raw = (seed * (count * itemsize // len(seed) + 1))[: count * itemsize]
    frame = frame_of(codec, raw, itemsize)
    if frame is not None:
        assert back(codec, frame, len(raw)) == raw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 1023, 65536])
def test_every_dtype_comes_back_by_its_own_codec(dtype: str, count: int) -> None:
    rng = np.random.default_rng(count)
    kind = np.dtype(dtype)
    array = (rng.standard_normal(count) * 0.02).astype(kind)
    if kind.kind in "iu":
        array = rng.integers(0, 100, count).astype(kind)
    raw, is_float = array.tobytes(), kind.kind in "fc"
    itemsize = kind.itemsize // (2 if kind.kind == "c" else 1)  # as rank/tensors.py has it
    codec = best_for(Cut(0, len(raw), itemsize, is_float))
    assert codec is (Codec.PLANES if is_float else Codec.ZSTD)
    frame = frame_of(codec, raw, itemsize)
    assert frame is None or back(codec, frame, len(raw)) == raw
    if count == 65536:
        assert frame is not None, "trained-looking values do not shrink"


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.PLANES])
@pytest.mark.parametrize("size", [4, 4096, 1 << 20])
def test_what_does_not_shrink_is_left_raw(codec: Codec, size: int) -> None:
    assert frame_of(codec, os.urandom(size), 4) is None


def test_none_never_makes_a_frame() -> None:
    assert frame_of(Codec.NONE, bytes(4096), 4) is None


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("lowest", [-1.0, 0.0])
def test_planes_of_many_tiles_come_back_and_beat_zstd(dtype: str, lowest: float) -> None:
    """Negative values are turned, so that their sign does not hide the exponent; others are not."""
    values = np.abs(np.random.default_rng(5).standard_normal(200_003)) * 0.02
    values[::2] *= lowest or 1.0
    raw = values.astype(dtype).tobytes()
    frame = frame_of(Codec.PLANES, raw, np.dtype(dtype).itemsize)
    assert frame is not None
    assert frame[1] == (lowest < 0)
    assert back(Codec.PLANES, frame, len(raw)) == raw
    assert len(frame) < len(frame_of(Codec.ZSTD, raw, 4) or raw)


@pytest.mark.parametrize("head", [(0, 0), (3, 0), (16, 0), (4, 2)])
def test_planes_that_no_writer_makes_are_refused(head: tuple[int, int]) -> None:
    frame = bytearray(FRAMES[Codec.PLANES] or b"")
    frame[:2] = head
    with pytest.raises(ChunkDamagedError, match="has planes of"):
        back(Codec.PLANES, bytes(frame), 16384)


def test_special_floats_keep_their_bits() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)  # every float16, every NaN among them
    raw = patterns.tobytes() * 4
    frame = frame_of(Codec.PLANES, raw, 2)
    assert frame is not None
    assert back(Codec.PLANES, frame, len(raw)) == raw


FRAMES = {
    codec: frame_of(codec, (np.arange(4096, dtype=np.float32) * 1e-3).tobytes(), 4)
    for codec in (Codec.ZSTD, Codec.PLANES)
}


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.PLANES])
def test_no_damaged_frame_escapes_as_another_error(codec: Codec) -> None:
    """Its hash refuses it first; here the decoder stands alone, and any bytes may come out."""
    whole = FRAMES[codec]
    assert whole is not None
    for _ in range(3000):
        frame = bytearray(whole)
        for _ in range(random.randrange(1, 4)):
            frame[random.randrange(min(len(frame), 64))] = random.randrange(256)
        del frame[random.randrange(len(frame) + 1) if random.random() < 0.3 else len(frame) :]
        with suppress(ChunkDamagedError):
            back(codec, bytes(frame), 16384)


@given(junk=st.binary(max_size=200), codec=st.integers(0, 255), length=st.integers(1, 4096))
@settings(max_examples=300, deadline=None)
def test_junk_is_refused(junk: bytes, codec: int, length: int) -> None:
    with pytest.raises(ChunkDamagedError):
        back(codec, junk, length)


def test_a_frame_must_say_its_length_and_keep_it() -> None:
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096))
    with pytest.raises(ChunkDamagedError, match="declares another length"):
        back(Codec.ZSTD, silent, 4096)
    honest = zstandard.ZstdCompressor().compress(bytes(4096))
    for length in (4095, 4097):
        with pytest.raises(ChunkDamagedError, match="declares another length"):
            back(Codec.ZSTD, honest, length)


def test_names() -> None:
    assert [check_name(name) for name in ("auto", "none", "zstd", "planes")]
    with pytest.raises(UsageError):
        check_name("lzma")


def chunk_of(kind: str) -> tuple[bytes, Cut]:
    rng, count = np.random.default_rng(3), 1 << 18
    raw, is_float, itemsize = {
        "weights": ((rng.standard_normal(count) * 0.02).astype(np.float32).tobytes(), True, 4),
        "bfloat16": (
            (rng.standard_normal(count) * 0.02).astype(np.float32).view(np.uint16)[1::2].tobytes(),
            True,
            2,
        ),
        "zeros": (bytes(4 * count), True, 4),
        "repeated": (os.urandom(4096) * 256, True, 4),
        "noise": (os.urandom(4 * count), True, 4),
        "counters": (np.arange(count, dtype=np.int64).tobytes(), False, 8),
    }[kind]
    return raw, Cut(0, len(raw), itemsize, is_float)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("weights", Codec.PLANES),
        ("bfloat16", Codec.PLANES),
        ("zeros", Codec.ZSTD),
        ("repeated", Codec.ZSTD),
        ("noise", Codec.NONE),
        ("counters", Codec.ZSTD),
    ],
)
def test_auto_takes_what_makes_a_sample_smallest(kind: str, expected: Codec) -> None:
    raw, cut = chunk_of(kind)
    assert choose_codec("auto", memoryview(raw), cut) is expected
    whole = {
        codec: frame_of(codec, raw, cut.itemsize) or raw for codec in {best_for(cut), Codec.ZSTD}
    }
    chosen = raw if expected is Codec.NONE else whole[expected]
    assert len(chosen) == min(map(len, whole.values())), "the sample misled"


@pytest.mark.parametrize("name", ["zstd", "planes", "auto"])
@given(count=st.integers(1, 70_000), itemsize=ITEMSIZES, is_float=st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_chunk_has_a_codec_that_can_take_it(
    name: str, count: int, itemsize: int, is_float: bool
) -> None:
    raw = np.arange(count * itemsize, dtype=np.uint32).astype(np.uint8).tobytes()
    cut = Cut(0, len(raw), itemsize, is_float)
    codec = choose_codec(name, memoryview(raw), cut)
    assert codec is not Codec.PLANES or (is_float and itemsize in (2, 4, 8))
    frame = frame_of(codec, raw, itemsize)
    assert frame is None or back(codec, frame, len(raw)) == raw
