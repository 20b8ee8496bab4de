"""How many arrays an encoding would become, found before any of them is built."""

from __future__ import annotations

import re

ARRAYS_MAX = 1 << 23
"""Most arrays in the values, or the tree, of a snapshot: twice as many as a layout has leaves. An
array of one byte becomes a list of 64, so that these take 0.6 GiB at most. Everything else that
the encoding has takes at most 20 times its length (a str of 2 characters, the worst, 59 bytes)."""

_NUMBERS = re.compile(
    rb"(?:[\x00-\x7f\xc0\xc2\xc3\xe0-\xff]|[\xcc\xd0].|[\xcd\xd1]..|[\xca\xce\xd2].{4}"
    rb"|[\xcb\xcf\xd3].{8})++",
    re.DOTALL,
)
_SINGLES = re.compile(rb"[\x00-\x7f\x90-\x9f\xc0\xc2\xc3\xe0-\xff]++")
"""Whole items of one byte each: small numbers, nil, booleans, and the heads of small arrays."""
_SMALL_ARRAYS = bytes(range(0x90, 0xA0))
_LARGE_ARRAYS = {0xDC: 3, 0xDD: 5}
_LENGTH_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Bytes of the length that follows the first byte of a bin or a str."""

_FOREIGN = {*range(0x80, 0x90), 0xC1, 0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9), 0xDE, 0xDF}
_GROWING = bytes({*range(0x90, 0xA0), *_LARGE_ARRAYS, *_FOREIGN})
"""First bytes of what becomes far larger than it is: arrays, maps and extensions."""


def too_much(encoded: bytes | memoryview) -> str:
    """Why MessagePack bytes of typed values must not be decoded; empty if they may be.

    Whether they are well-formed is left to the decoder. Nearly all are passed by their length, or
    by how often a byte that could start an array occurs in them; the others are scanned.
    """
    if len(encoded) <= ARRAYS_MAX:
        return ""
    raw = bytes(encoded)
    if len(raw) - len(raw.translate(None, _GROWING)) <= ARRAYS_MAX:
        return ""
    return _scan(raw)


def _small_arrays(singles: bytes) -> int:
    return len(singles) - len(singles.translate(None, _SMALL_ARRAYS))


def _scan(raw: bytes) -> str:
    at = arrays = 0
    while at < len(raw):
        if singles := _SINGLES.match(raw, at):
            arrays += _small_arrays(singles[0])
            at = singles.end()
        elif numbers := _NUMBERS.match(raw, at):
            at = numbers.end()
        elif (head := raw[at]) in _LARGE_ARRAYS:
            arrays += 1
            at += _LARGE_ARRAYS[head]
        elif 0xA0 <= head < 0xC0:
            at += 1 + head - 0xA0
        elif head in _LENGTH_BYTES:
            start = at + 1
            end = start + _LENGTH_BYTES[head]
            at = end + int.from_bytes(raw[start:end], "big")
        elif head in _FOREIGN:
            return "holds maps or extensions"
        else:
            break  # a number that is cut off
        if arrays > ARRAYS_MAX:
            return f"holds more than {ARRAYS_MAX} arrays"
    return ""
