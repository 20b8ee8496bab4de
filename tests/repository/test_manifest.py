"""A manifest is believed only where everything in it that a reader relies on holds together."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.config import CHUNK_BYTES
from ckptmgr.errors import DamageError, RecordDamagedError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import LEASE_BYTES
from ckptmgr.repository.chunk import Chunk
from ckptmgr.repository.manifest import Manifest, read_manifest, seal_manifest
from ckptmgr.staging.layout import encode_layout
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf, StepId
from small_step import made_in_memory, save_steps

STEP = StepId(1, 20)
KEY = keys.manifest(STEP, 0)
GOOD = read_manifest(STEP, 0, made_in_memory(save_steps)[1][KEY]).manifest


def reread(manifest: Manifest) -> Manifest:
    """Seal it as it is, with a right digest, and read it as what lies under KEY."""
    sealed = seal_manifest(manifest)
    assert sealed.key == KEY or manifest.id != STEP or manifest.rank
    return read_manifest(STEP, 0, sealed.record).manifest


def test_a_manifest_comes_back_as_it_was() -> None:
    assert reread(GOOD) == GOOD
    sealed = seal_manifest(GOOD)
    again = read_manifest(STEP, 0, memoryview(sealed.record))
    assert (again.key, again.record, again.digest) == (sealed.key, sealed.record, sealed.digest)
    assert seal_manifest(GOOD).record == sealed.record


@pytest.mark.parametrize("changes", [{"step": 21}, {"attempt": 2}, {"rank": 1}], ids=str)
def test_the_manifest_of_another_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(RecordDamagedError):
        reread(msgspec.structs.replace(GOOD, **changes))


def with_chunk(at: int, **changes: Any) -> Manifest:
    chunks = list(GOOD.chunks)
    chunks[at] = msgspec.structs.replace(chunks[at], **changes)
    return msgspec.structs.replace(GOOD, chunks=tuple(chunks))


CHUNK_CHANGES: list[dict[str, Any]] = [
    {"pack": 1},
    {"pack": -1},
    {"pack_offset": 0},
    {"pack_offset": 8192 * 16},
    {"pack_offset": -4096},
    {"stored_bytes": 0},
    {"stored_bytes": -1},
    {"stored_bytes": 1 << 40},
    {"stored_bytes": PAGE_BYTES * 64},
    {"raw_bytes": 0},
    {"raw_bytes": CHUNK_BYTES + 1},
    {"raw_offset": -4096},
    {"raw_offset": 1 << 60},
]


@pytest.mark.parametrize("changes", CHUNK_CHANGES, ids=str)
def test_a_chunk_table_that_does_not_hold_is_refused(changes: dict[str, Any]) -> None:
    for at in range(len(GOOD.chunks)):
        with pytest.raises(RecordDamagedError, match=KEY):
            reread(with_chunk(at, **changes))


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_number_of_the_chunk_table_may_be_another(data: st.DataObject) -> None:
    """Every offset and length that places bytes; only the codec and the hashes say nothing here."""
    at = data.draw(st.integers(0, len(GOOD.chunks) - 1))
    name = data.draw(st.sampled_from(["pack", "pack_offset", "raw_offset", "raw_bytes"]))
    value = data.draw(st.integers(-(1 << 63), (1 << 63) - 1))
    if value == getattr(GOOD.chunks[at], name):
        return
    with pytest.raises(RecordDamagedError):
        reread(with_chunk(at, **{name: value}))


PACKS: list[Any] = [
    (),
    (("", 4096),),
    ((GOOD.packs[0][0], GOOD.packs[0][1] - 4096),),
    ((GOOD.packs[0][0], GOOD.packs[0][1] + 4096),),
    ((GOOD.packs[0][0], -1),),
    ((GOOD.packs[0][0], 1 << 62),),
    (*GOOD.packs, ("data/00000001/000000000020/000000/x.pack", 4097)),
]


@pytest.mark.parametrize("packs", PACKS, ids=range(len(PACKS)))
def test_a_pack_table_that_does_not_hold_is_refused(packs: Any) -> None:
    with pytest.raises(RecordDamagedError):
        reread(msgspec.structs.replace(GOOD, packs=packs))


def test_a_pack_that_no_buffer_holds_is_refused() -> None:
    """17 chunks of 4 MiB in one pack add up, but the memory budget has no room for it."""
    count = LEASE_BYTES // CHUNK_BYTES + 1
    one = Chunk(0, 0, CHUNK_BYTES, 0, CHUNK_BYTES, 0, b"", b"")
    chunks = tuple(
        msgspec.structs.replace(
            one, pack_offset=PAGE_BYTES + at * CHUNK_BYTES, raw_offset=at * CHUNK_BYTES
        )
        for at in range(count)
    )
    nbytes = count * CHUNK_BYTES
    layout = encode_layout(Layout((), (Group(0, nbytes, 1, False),), nbytes, b"\xc0"))
    packs = ((GOOD.packs[0][0], nbytes + PAGE_BYTES),)
    with pytest.raises(RecordDamagedError, match="another length"):
        reread(msgspec.structs.replace(GOOD, chunks=chunks, layout=layout, packs=packs))


LAYOUTS: list[bytes] = [
    b"",
    b"\xc0",
    b"\x94\x90\x90\x00",
    encode_layout(Layout((), (), 4096, b"\xc0")),
    encode_layout(Layout((), (Group(4096, 4096, 1, False),), 8192, b"\xc0")),
    encode_layout(Layout((), (Group(0, 100, 1, False),), 100, b"\xc0")),
    encode_layout(Layout((), (Group(0, 4096, 0, False),), 4096, b"\xc0")),
    encode_layout(
        Layout((Leaf("x", "int8", (1,), 4096, 1),), (Group(0, 4096, 1, False),), 4096, b"\xc0")
    ),
    encode_layout(
        Layout((Leaf("x", "int8", (1,), -1, 1),), (Group(0, 4096, 1, False),), 4096, b"\xc0")
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_a_layout_that_does_not_hold_is_damage_of_the_manifest(layout: bytes) -> None:
    with pytest.raises(DamageError, match=KEY):
        reread(msgspec.structs.replace(GOOD, layout=layout))
