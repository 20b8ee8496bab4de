"""A record comes back only as what it was, from where it was put, whole."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import DamageError, RecordDamagedError, UnsupportedFormatError
from ckptmgr.repository.commit import Decision, Format
from ckptmgr.repository.record import (
    _HEAD,
    HEADER_BYTES,
    JSON_BYTES_MAX,
    MAGIC,
    PAYLOAD_BYTES_MAX,
    Kind,
    _digest,
    declared_bytes,
    digest_of,
    seal,
    unseal,
)

KEY = "commit/00000001/000000000001"
COMMIT = Decision("COMMIT", 1, 1, "00" * 16, 1, (0, 0), ("11" * 32,), tags={"loss": 0.5})


class Any_(msgspec.Struct, frozen=True):  # noqa: N801 - a payload of anything
    """What a test puts into a record."""

    value: Any


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=10,
)


@given(value=json_values, kind=st.sampled_from(Kind))
@settings(deadline=None)
def test_what_is_sealed_is_unsealed(value: Any, kind: Kind) -> None:
    record = seal(kind, KEY, Any_(value))
    assert unseal(kind, KEY, record, Any_).value == value
    assert unseal(kind, KEY, memoryview(record), Any_).value == value
    assert seal(kind, KEY, Any_(value)) == record, "equal inputs, other bytes"
    assert declared_bytes(kind, KEY, record[:HEADER_BYTES]) == len(record)
    assert record[32:64] == digest_of(record)


@pytest.mark.parametrize("kind", [Kind.COMMIT, Kind.MANIFEST])
def test_every_changed_byte_is_found(kind: Kind) -> None:
    record = seal(kind, KEY, COMMIT)
    for at in range(len(record)):
        for value in random.sample([v for v in range(256) if v != record[at]], 8):
            damaged = record[:at] + bytes([value]) + record[at + 1 :]
            with pytest.raises(DamageError, match=KEY):
                unseal(kind, KEY, damaged, Decision)


@pytest.mark.parametrize("kind", [Kind.COMMIT, Kind.MANIFEST])
def test_every_cut_and_every_tail_is_found(kind: Kind) -> None:
    record = seal(kind, KEY, COMMIT)
    for length in range(len(record)):
        with pytest.raises(RecordDamagedError):
            unseal(kind, KEY, record[:length], Decision)
    for tail in (b"\0", record, bytes(4096)):
        with pytest.raises(RecordDamagedError):
            unseal(kind, KEY, record + tail, Decision)


def test_a_record_is_worth_nothing_under_another_key_or_as_another_kind() -> None:
    record = seal(Kind.COMMIT, KEY, COMMIT)
    with pytest.raises(RecordDamagedError, match="digest"):
        unseal(Kind.COMMIT, KEY[:-1] + "2", record, Decision)
    for kind in Kind:
        if kind is not Kind.COMMIT:
            with pytest.raises(RecordDamagedError):
                unseal(kind, KEY, record, Decision)


def forged(
    *, version: int = 1, flags: int = 0, zero: int = 0, kind: int = 7, raw: bytes = b"{}", **n: int
) -> bytes:
    """A record with a right digest over whatever it says."""
    lengths = n.get("raw_length", len(raw)), n.get("length", len(raw))
    head = _HEAD.pack(MAGIC, kind, version, flags, zero, *lengths)
    return head + _digest(head, KEY, raw) + raw


@pytest.mark.parametrize(
    "fields", [{"version": 2}, {"version": 0}, {"flags": 2}, {"flags": 0x8000}, {"zero": 1}]
)
def test_what_a_newer_version_may_have_written_is_said_so(fields: dict[str, int]) -> None:
    with pytest.raises(UnsupportedFormatError) as refused:
        unseal(Kind.COMMIT, KEY, forged(**fields), Decision)
    assert "version" in str(refused.value)
    assert refused.value.exit_status == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"length": 1},
        {"length": 1 << 63},
        {"raw_length": JSON_BYTES_MAX + 1},
        {"raw_length": 1 << 63},
        {"flags": 1},
        {"kind": 99},
        {"kind": 6},
        {"raw": b""},
        {"raw": b"nonsense"},
        {"raw": b"[]"},
        {"raw": b'{"decision": "PERHAPS", "attempt": 1, "step": 1}'},
        {"raw": b'{"decision": "COMMIT", "attempt": "1", "step": 1}'},
        {"raw": b'{"decision": "COMMIT", "step": 1}'},
        {"raw": b'{"decision": "COMMIT", "attempt": 1e400, "step": 1}'},
        {"raw": b"\xff\xfe"},
        {"raw": b"[" * 100_000},
    ],
    ids=str,
)
def test_what_no_writer_writes_is_damage(fields: dict[str, Any]) -> None:
    with pytest.raises(RecordDamagedError, match=KEY):
        unseal(Kind.COMMIT, KEY, forged(**fields), Decision)


@pytest.mark.parametrize(
    ("stored", "raw_length"),
    [
        (b"", 0),
        (b"nonsense", 8),
        (zstandard.ZstdCompressor().compress(b"\x80"), 2),
        (zstandard.ZstdCompressor().compress(b"\x80"), PAYLOAD_BYTES_MAX + 1),
        (zstandard.ZstdCompressor(write_content_size=False).compress(b"\x80"), 1),
        (zstandard.ZstdCompressor().compress(b"\x91" * 100_000), 100_000),
        (zstandard.ZstdCompressor().compress(b"\xc1"), 1),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", 0),  # a skippable frame
    ],
)
def test_a_packed_payload_must_be_one_honest_frame(stored: bytes, raw_length: int) -> None:
    head = _HEAD.pack(MAGIC, Kind.MANIFEST, 1, 1, 0, raw_length, len(stored))
    with pytest.raises(RecordDamagedError):
        unseal(Kind.MANIFEST, KEY, head + _digest(head, KEY, stored) + stored, Decision)


def test_a_header_that_declares_too_much_is_refused_before_the_rest_is_read() -> None:
    for kind, bound in ((Kind.COMMIT, JSON_BYTES_MAX), (Kind.MANIFEST, PAYLOAD_BYTES_MAX)):
        head = _HEAD.pack(MAGIC, kind, 1, 0, 0, 0, bound) + bytes(32)
        assert declared_bytes(kind, KEY, head) == HEADER_BYTES + bound
        head = _HEAD.pack(MAGIC, kind, 1, 0, 0, 0, bound + 1) + bytes(32)
        with pytest.raises(RecordDamagedError):
            declared_bytes(kind, KEY, head)
    with pytest.raises(RecordDamagedError, match="magic"):
        declared_bytes(Kind.COMMIT, KEY, bytes(64))


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.MANIFEST}))
def test_what_says_that_it_is_a_manifest_gets_no_more_memory_for_that(kind: Kind) -> None:
    head = _HEAD.pack(MAGIC, Kind.MANIFEST, 1, 1, 0, 0, JSON_BYTES_MAX + 1) + bytes(32)
    with pytest.raises(RecordDamagedError, match="declares a payload of"):
        declared_bytes(kind, KEY, head)


@given(junk=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_junk_is_refused(junk: bytes) -> None:
    for kind in (Kind.FORMAT, Kind.MANIFEST):
        with pytest.raises(RecordDamagedError):
            unseal(kind, KEY, junk, Format)
