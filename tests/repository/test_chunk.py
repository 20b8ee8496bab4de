"""Cuts cover every group exactly, and a table that covers anything else is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.config import CHUNK_BYTES
from ckptmgr.daemon.pipeline import packs_of
from ckptmgr.errors import RecordDamagedError
from ckptmgr.repository.chunk import Chunk, check_cover, cut, hash_of
from ckptmgr.types import PAGE_BYTES, Group

sizes = st.lists(st.integers(1, 40).map(lambda pages: pages * PAGE_BYTES), max_size=8)


def groups_of(lengths: list[int]) -> tuple[Group, ...]:
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    return tuple(
        Group(start, length, 1 << (at % 4), at % 2 == 0)
        for at, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )


@given(lengths=sizes, pages=st.integers(1, 16))
def test_cuts_are_whole_ordered_and_within_groups(lengths: list[int], pages: int) -> None:
    groups = groups_of(lengths)
    cuts = cut(groups, pages * PAGE_BYTES)
    end = 0
    for one in cuts:
        assert one.offset == end
        assert 0 < one.nbytes <= pages * PAGE_BYTES
        end += one.nbytes
        (home,) = [g for g in groups if g.offset <= one.offset < g.offset + g.nbytes]
        assert one.offset + one.nbytes <= home.offset + home.nbytes, "crosses a group"
        assert (one.itemsize, one.is_float) == (home.itemsize, home.is_float)
        assert one.nbytes % one.itemsize == 0
    assert end == sum(lengths)


@given(lengths=sizes, pages=st.integers(1, 64))
def test_packs_take_all_cuts_in_order_and_no_more_than_fits(lengths: list[int], pages: int) -> None:
    cuts = cut(groups_of(lengths), 4 * PAGE_BYTES)
    packs = list(packs_of(cuts, pages * PAGE_BYTES))
    assert [one for pack in packs for one in pack] == cuts
    assert all(pack for pack in packs)
    for pack in packs:
        assert len(pack) == 1 or sum(one.nbytes for one in pack) <= pages * PAGE_BYTES


def table(lengths: list[int]) -> list[Chunk]:
    starts = [sum(lengths[:at]) for at in range(len(lengths))]
    return [
        Chunk(0, 0, length, start, length, 0, b"", b"")
        for start, length in zip(starts, lengths, strict=True)
    ]


@given(lengths=st.lists(st.integers(1, 100), max_size=6), data=st.data())
def test_only_an_exact_cover_is_accepted(lengths: list[int], data: st.DataObject) -> None:
    total = sum(lengths)
    chunks = table(lengths)
    check_cover(tuple(chunks), total, subject="man/x")
    with pytest.raises(RecordDamagedError, match="man/x"):
        check_cover(tuple(chunks), total + 1, subject="man/x")
    if not chunks:
        return
    at = data.draw(st.integers(0, len(chunks) - 1))
    field = data.draw(st.sampled_from(["raw_offset", "raw_bytes"]))
    by = data.draw(st.integers(-300, 300).filter(bool))
    chunks[at] = msgspec.structs.replace(chunks[at], **{field: getattr(chunks[at], field) + by})
    with pytest.raises(RecordDamagedError):
        check_cover(tuple(chunks), total, subject="man/x")


@pytest.mark.parametrize("length", [0, -1, CHUNK_BYTES + 1])
def test_a_chunk_of_no_or_too_many_bytes_is_refused(length: int) -> None:
    with pytest.raises(RecordDamagedError):
        check_cover(tuple(table([length])), length, subject="man/x")


def test_the_hash_is_the_one_of_the_format() -> None:
    """XXH3 with 128 bits, canonical form: a known answer, so that it never changes unseen."""
    assert hash_of(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert hash_of(memoryview(b"abc")) == hash_of(b"abc") != hash_of(b"abd")
