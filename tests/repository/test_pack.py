"""The first page of a pack says whose it is, and padding is zero."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import ChunkDamagedError, DamageError, RecordDamagedError
from ckptmgr.repository.pack import check_pack_header, check_padding, pack_header, padded
from ckptmgr.types import PAGE_BYTES, StepId

STEP = StepId(3, 70)
KEY = "data/00000003/000000000070/000001/abc.pack"
PAGE = pack_header(KEY, STEP, 1, "ab" * 16)


@given(length=st.integers(0, 1 << 40))
def test_padded_is_the_next_whole_page(length: int) -> None:
    assert padded(length) % PAGE_BYTES == 0
    assert 0 <= padded(length) - length < PAGE_BYTES


def test_the_header_is_one_page_and_always_the_same() -> None:
    assert len(PAGE) == PAGE_BYTES
    assert pack_header(KEY, STEP, 1, "ab" * 16) == PAGE
    check_pack_header(KEY, memoryview(PAGE))


def test_every_changed_byte_of_the_header_page_is_found() -> None:
    for at in range(PAGE_BYTES):
        damaged = bytearray(PAGE)
        damaged[at] ^= 1 << random.randrange(8)
        with pytest.raises(DamageError):
            check_pack_header(KEY, memoryview(damaged))


def test_the_header_of_another_pack_is_found() -> None:
    with pytest.raises(RecordDamagedError):
        check_pack_header(KEY.replace("abc", "abd"), memoryview(PAGE))


@given(length=st.integers(0, PAGE_BYTES), data=st.data())
def test_padding_is_zero(length: int, data: st.DataObject) -> None:
    check_padding(memoryview(bytes(length)), subject="x")
    if length:
        at = data.draw(st.integers(0, length - 1))
        bad = bytes(at) + b"\x01" + bytes(length - at - 1)
        with pytest.raises(ChunkDamagedError):
            check_padding(memoryview(bad), subject="x")
