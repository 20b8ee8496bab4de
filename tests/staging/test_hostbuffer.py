"""Host buffers: slots that exist only when sealed, and refuse every damage and every race."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import HostBufferDamagedError, HostMemoryError, TornSnapshotError
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.types import PAGE_BYTES, STEP_MAX, Binding, Outcome, SlotState, Snapshot, Tags
from crash import peek
from processes import needs_root
from sealing import BINDING, CAPACITY, LAYOUT, LAYOUT_HASH, seal

SLOTS_AT = 2 * PAGE_BYTES
RECORD_AT, RECORD_END = 64, 200


@pytest.fixture
def buffer(runtime: Path) -> Iterator[HostBuffer]:
    found = HostBuffer.create(runtime, BINDING, CAPACITY)
    yield found
    found.close()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    fd = os.open(path, os.O_RDWR)
    byte = os.pread(fd, 1, offset)[0]
    os.pwrite(fd, bytes([byte ^ 1 << bit]), offset)
    os.close(fd)


# ---- slots ------------------------------------------------------------------


def test_a_new_buffer_holds_nothing(buffer: HostBuffer) -> None:
    assert buffer.snapshots() == []
    assert [buffer.state(k) for k in range(2)] == [(SlotState.EMPTY, 0)] * 2
    assert (buffer.progress_bytes, buffer.superseded_by) == (0, 0)


def test_a_sealed_slot_says_all_of_itself(buffer: HostBuffer) -> None:
    tags: Tags = {"loss": 0.5, "best": True, "name": "run"}
    sealed = seal(buffer, 1, 7, b"\x93\x01\x02\x03", tags)
    assert buffer.snapshots() == [sealed]
    assert sealed == Snapshot(
        slot=1,
        generation=1,
        attempt=3,
        nonce="ab" * 16,
        rank=0,
        world=1,
        step=7,
        layout_bytes=len(LAYOUT),
        values_bytes=sealed.values_bytes,
        data_bytes=CAPACITY.data_bytes,
        sealed_at=1e9,
        stall_seconds=0.5,
    )
    table = buffer.table(sealed)
    assert (table.layout, table.values, table.tags) == (LAYOUT, b"\x93\x01\x02\x03", tags)


def test_the_file_is_what_the_format_says(buffer: HostBuffer) -> None:
    seal(buffer, 0, 7)
    buffer.settle(0, 1, Outcome.COMMITTED)
    assert buffer.path.stat().st_mode & 0o777 == 0o600
    first, second = peek.slots_of(buffer.path)
    assert (first.state, first.generation, first.id) == (peek.SEALED, 1, (3, 7))
    assert (first.outcome, first.whole) == (peek.COMMITTED, True)
    assert (second.state, second.generation) == (0, 0)


def test_writing_a_slot_ends_what_it_held(buffer: HostBuffer) -> None:
    seal(buffer, 0, 1)
    seal(buffer, 1, 2)
    writer = buffer.begin(0)
    assert writer.generation == 3
    assert buffer.state(0) == (SlotState.WRITING, 3)
    assert buffer.snapshot(0) is None
    assert [s.step for s in buffer.snapshots()] == [2]


def test_a_write_that_was_cut_short_leaves_nothing(buffer: HostBuffer) -> None:
    """Every prefix of a seal is a slot that does not exist."""
    seal(buffer, 0, 1)
    writer = buffer.begin(0)
    writer._write_table(LAYOUT, LAYOUT_HASH, b"x" * 100)
    assert buffer.snapshot(0) is None
    assert seal(buffer, 0, 2).generation == 3


def test_generations_rise_over_all_slots_and_openings(buffer: HostBuffer) -> None:
    generations = [seal(buffer, slot, n).generation for n, slot in enumerate((0, 1, 1, 0))]
    with HostBuffer.open(buffer.path) as again:
        generations.append(seal(again, 0, 9).generation)
    assert generations == [1, 2, 3, 4, 5]


def test_a_snapshot_that_does_not_fit_is_not_sealed(buffer: HostBuffer) -> None:
    with pytest.raises(HostMemoryError, match="does not fit"):
        seal(buffer, 0, 1, values=bytes(CAPACITY.table_bytes))
    assert buffer.snapshot(0) is None


def test_a_step_without_a_name_is_refused(buffer: HostBuffer) -> None:
    assert seal(buffer, 0, STEP_MAX).step == STEP_MAX
    with pytest.raises(HostBufferDamagedError, match="slot 1 does not hold"):
        seal(buffer, 1, STEP_MAX + 1)


def test_a_reused_slot_is_noticed(buffer: HostBuffer) -> None:
    sealed = seal(buffer, 0, 1)
    assert buffer.unchanged(sealed)
    buffer.begin(0)
    assert not buffer.unchanged(sealed)
    with pytest.raises(TornSnapshotError):
        buffer.table(sealed)


def test_the_layout_is_written_again_when_another_was_there(buffer: HostBuffer) -> None:
    other = b"other!" * 100
    sealed = buffer.begin(0).seal(
        attempt=1,
        nonce="00" * 16,
        rank=0,
        world=1,
        step=1,
        layout=other,
        layout_hash=xxhash.xxh3_128_digest(other),
        values=b"",
        tags={},
        data_bytes=0,
        stall_seconds=0.0,
    )
    assert buffer.table(sealed).layout == other
    assert buffer.table(seal(buffer, 0, 2)).layout == LAYOUT


def test_the_layout_survives_a_write_that_died_in_the_middle_of_it(buffer: HostBuffer) -> None:
    """The record still names the old layout, whose bytes are gone: they are written again."""
    seal(buffer, 0, 1)
    writer = buffer.begin(0)
    writer._write_table(b"another layout" * 40, b"0" * 16, b"")
    assert buffer.table(seal(buffer, 0, 2)).layout == LAYOUT


# ---- damage -----------------------------------------------------------------


def test_every_damaged_bit_of_a_sealed_record_is_refused(buffer: HostBuffer) -> None:
    seal(buffer, 0, 1)
    for offset, bit in product(range(8, RECORD_END), range(8)):
        flip(buffer.path, SLOTS_AT + offset, bit)
        with pytest.raises(HostBufferDamagedError):
            buffer.snapshot(0)
        flip(buffer.path, SLOTS_AT + offset, bit)
    assert buffer.snapshot(0) is not None


def test_every_damaged_bit_of_the_state_word_is_refused(buffer: HostBuffer) -> None:
    seal(buffer, 0, 1)
    for offset, bit in product(range(8), range(8)):
        flip(buffer.path, SLOTS_AT + offset, bit)
        with suppress(HostBufferDamagedError):
            assert buffer.snapshot(0) is None
        flip(buffer.path, SLOTS_AT + offset, bit)
    assert buffer.snapshot(0) is not None


def test_every_damaged_byte_of_a_table_is_refused(buffer: HostBuffer) -> None:
    sealed = seal(buffer, 0, 1, values=b"v" * 200)
    values_at = -(-len(LAYOUT) // 64) * 64
    places = [*range(len(LAYOUT)), *range(values_at, values_at + sealed.values_bytes)]
    for place in places:
        flip(buffer.path, SLOTS_AT + PAGE_BYTES + place, place % 8)
        with pytest.raises(HostBufferDamagedError):
            buffer.table(sealed)
        flip(buffer.path, SLOTS_AT + PAGE_BYTES + place, place % 8)
    assert buffer.table(sealed).values == b"v" * 200


def test_values_that_are_no_message_are_refused(buffer: HostBuffer) -> None:
    """Hashes hold, so somebody sealed nonsense; it is damage all the same, and not a crash."""
    sealed = seal(buffer, 0, 1)
    at = SLOTS_AT + PAGE_BYTES + -(-len(LAYOUT) // 64) * 64
    fd = os.open(buffer.path, os.O_RDWR)
    os.pwrite(fd, b"\xc1" * sealed.values_bytes, at)
    os.pwrite(fd, xxhash.xxh3_128_digest(b"\xc1" * sealed.values_bytes), SLOTS_AT + 168)
    record = os.pread(fd, 120, SLOTS_AT + RECORD_AT)
    os.pwrite(fd, xxhash.xxh3_128_digest(record), SLOTS_AT + 184)
    os.close(fd)
    found = buffer.snapshot(0)
    assert found is not None
    with pytest.raises(HostBufferDamagedError, match="can not be read"):
        buffer.table(found)


@given(record=st.binary(min_size=120, max_size=120))
@settings(max_examples=200, deadline=None)
def test_no_record_makes_a_reader_leave_the_slot(record: bytes) -> None:
    """Whatever a record says, with a hash that holds: inside its slot, or refused."""
    with HostBuffer.create(Path("/dev/shm"), BINDING, CAPACITY) as buffer:
        try:
            word = struct.unpack_from("<Q", record)[0] % (1 << 61)
            fd = os.open(buffer.path, os.O_RDWR)
            fixed = struct.pack("<Q", word) + record[8:]
            os.pwrite(fd, struct.pack("<Q", word << 2 | SlotState.SEALED), SLOTS_AT)
            os.pwrite(fd, fixed + xxhash.xxh3_128_digest(fixed), SLOTS_AT + RECORD_AT)
            os.close(fd)
            found = buffer.snapshot(0)
            assert found is not None
            assert found.data_bytes <= CAPACITY.data_bytes
            assert found.layout_bytes + found.values_bytes <= CAPACITY.table_bytes
            with pytest.raises(HostBufferDamagedError):
                buffer.table(found)
        except HostBufferDamagedError:
            pass
        finally:
            buffer.unlink()


def test_every_damaged_byte_of_the_header_is_refused(buffer: HostBuffer) -> None:
    length = struct.unpack_from("<I", buffer.path.read_bytes()[:64], 48)[0]
    for offset in range(128 + length):
        flip(buffer.path, offset, offset % 8)
        with pytest.raises(HostBufferDamagedError):
            HostBuffer.open(buffer.path)
        flip(buffer.path, offset, offset % 8)
    HostBuffer.open(buffer.path).close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8192, CAPACITY.file_bytes - 1])
def test_a_cut_file_is_refused(buffer: HostBuffer, size: int) -> None:
    os.truncate(buffer.path, size)
    with pytest.raises(HostBufferDamagedError):
        HostBuffer.open(buffer.path)


def test_a_longer_file_is_refused(buffer: HostBuffer) -> None:
    os.truncate(buffer.path, CAPACITY.file_bytes + 1)
    with pytest.raises(HostBufferDamagedError, match="wrong size"):
        HostBuffer.open(buffer.path)


def test_a_newer_version_is_refused_by_name(buffer: HostBuffer) -> None:
    page = bytearray(buffer.path.read_bytes()[:PAGE_BYTES])
    struct.pack_into("<I", page, 8, 2)
    length = struct.unpack_from("<I", page, 48)[0]
    page[64:80] = xxhash.xxh3_128_digest(bytes(page[:64] + page[128 : 128 + length]))
    with buffer.path.open("r+b") as file:
        file.write(page)
    with pytest.raises(HostBufferDamagedError, match="has version 2, not 1"):
        HostBuffer.open(buffer.path)


def test_links_and_other_peoples_files_are_refused(buffer: HostBuffer) -> None:
    link = buffer.path.with_suffix(".link")
    link.symlink_to(buffer.path)
    with pytest.raises(HostMemoryError, match="can not be opened"):
        HostBuffer.open(link)
    with pytest.raises(HostMemoryError, match="can not be opened"):
        HostBuffer.open(buffer.path.with_suffix(".gone"))
    needs_root()
    os.chown(buffer.path, 12345, -1)
    with pytest.raises(HostMemoryError, match="belongs to another user"):
        HostBuffer.open(buffer.path)


@pytest.mark.parametrize("slots", [0, 4])
def test_only_one_to_three_slots_are_made(runtime: Path, slots: int) -> None:
    with pytest.raises(HostMemoryError, match="1 to 3 slots"):
        HostBuffer.create(runtime, BINDING, Capacity(slots, PAGE_BYTES, PAGE_BYTES))
    assert not list(runtime.iterdir())


def test_a_url_that_does_not_fit_into_the_header_is_refused(runtime: Path) -> None:
    with pytest.raises(HostMemoryError, match="URL is too long"):
        HostBuffer.create(runtime, Binding("file:///" + "x" * 5000, 0, 1), CAPACITY)


# ---- the daemon's words -----------------------------------------------------


def test_an_outcome_belongs_to_one_generation(buffer: HostBuffer) -> None:
    old = seal(buffer, 0, 1)
    assert buffer.outcome(old) is Outcome.UNDECIDED
    buffer.settle(0, old.generation, Outcome.ABORTED)
    assert buffer.outcome(old) is Outcome.ABORTED
    new = seal(buffer, 0, 2)
    assert buffer.outcome(new) is Outcome.UNDECIDED
    assert buffer.outcome(old) is Outcome.ABORTED


def test_progress_adds_up_and_supersession_stays(buffer: HostBuffer) -> None:
    buffer.add_progress(5)
    buffer.add_progress(6)
    buffer.supersede(9)
    with HostBuffer.open(buffer.path) as again:
        assert (again.progress_bytes, again.superseded_by) == (11, 9)


# ---- memory -----------------------------------------------------------------


def test_populate_makes_pages_present_and_keeps_their_bytes(buffer: HostBuffer) -> None:
    sealed = seal(buffer, 0, 1)
    before = buffer.path.stat().st_blocks
    buffer.populate(0)
    buffer.populate(1)
    assert buffer.path.stat().st_blocks > before
    assert buffer.snapshot(0) == sealed


def test_a_snapshot_that_is_mapped_to_read_is_what_it_was(buffer: HostBuffer) -> None:
    sealed = seal(buffer, 1, 1)
    with HostBuffer.open(buffer.path) as other:
        before = _resident_bytes(buffer.path)
        other.map_to_read(sealed)
        assert _resident_bytes(buffer.path) - before >= sealed.data_bytes > 0
        assert other.snapshot(1) == sealed


def _resident_bytes(path: Path) -> int:
    """Of a file, over all mappings of it in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [at for at, line in enumerate(lines) if line.endswith(str(path))]
    return 1024 * sum(int(lines[at + 4].removeprefix("Rss:").split()[0]) for at in starts)


def test_data_is_the_slots_own(buffer: HostBuffer) -> None:
    """Slots do not overlap, nor does data with tables."""
    for slot in range(2):
        view = buffer.data(slot)
        assert len(view) == CAPACITY.data_bytes
        np.frombuffer(view, np.uint8)[:] = slot + 1
        view.release()
    sealed = [seal(buffer, slot, slot + 1) for slot in range(2)]
    for one in sealed:
        view = buffer.data(one.slot)
        assert bytes(view) == bytes([one.slot + 1]) * CAPACITY.data_bytes
        view.release()
        assert buffer.table(one).layout == LAYOUT
