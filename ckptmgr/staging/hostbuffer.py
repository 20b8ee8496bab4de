"""Shared host memory of one rank: slots that describe themselves and survive both processes.

The protocol in three lines (docs/format.md section 1 has every byte):
writer:  state = WRITING(generation) ; table, data, sealed record ; barrier ; state = SEALED
reader:  read state ; read the slot ; barrier ; read state again: any change discards what was read
daemon:  settled[slot] = generation, outcome     (writes a slot itself only before the writer does)
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import xxhash

from ckptmgr.errors import HostBufferDamagedError, HostMemoryError, TornSnapshotError
from ckptmgr.staging.bufferfile import (
    BINDING_AT,
    SLOTS_AT,
    Capacity,
    is_unnamed,
    make_named,
    make_unnamed,
    open_buffer,
    read_header,
)
from ckptmgr.staging.sharedmap import SharedMap, memory_barrier
from ckptmgr.types import (
    MALFORMED,
    PAGE_BYTES,
    STEP_MAX,
    Binding,
    Outcome,
    SlotState,
    Snapshot,
    Tags,
)

_SEALED = struct.Struct("<QQQ16sIIQQQdd16s16s")
_DAEMON_PAGE_AT = PAGE_BYTES
_SEALED_AT = 64
_SEALED_HASH_AT = _SEALED_AT + _SEALED.size
_VALUES_ALIGN = 64

_FLOCK = struct.Struct("hhqqi0q")  # struct flock of 64-bit Linux

TAGS_BYTES_MAX = 64 << 10
"""Bound of the encoded tags of a step; every table region has this much room for them."""

_encode = msgspec.msgpack.Encoder().encode
_decode_values = msgspec.msgpack.Decoder(tuple[Tags, bytes]).decode
_decode_binding = msgspec.msgpack.Decoder(Binding).decode


def round_up(length: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not less than `length`."""
    return -(-length // unit) * unit


def table_bytes_needed(layout_bytes: int, values_bytes: int) -> int:
    """Bytes of a table region that holds a layout, and values with tags, of these lengths."""
    return round_up(round_up(layout_bytes, _VALUES_ALIGN) + values_bytes, PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Table:
    """What a slot says of itself: the encoded layout, the encoded values, and the tags."""

    layout: bytes
    values: bytes
    tags: Tags


class HostBuffer:
    """A mapped host buffer. One process writes slots, one daemon settles them, any may read.

    Views handed out by its methods must be released before `close`.
    """

    def __init__(self, path: Path, fd: int, mapped: SharedMap, capacity: Capacity) -> None:
        self.path = path
        self.capacity = capacity
        self._fd = fd
        self._map = mapped
        self.id = bytes(mapped.view[32:48]).hex()
        length = struct.unpack_from("<I", mapped.view, 48)[0]
        try:
            self.binding = _decode_binding(mapped.view[BINDING_AT : BINDING_AT + length])
        except MALFORMED as error:
            raise HostBufferDamagedError("has no readable binding", subject=str(path)) from error
        self._words = mapped.view.cast("Q")

    # -- life ---------------------------------------------------------------------------------

    @classmethod
    def create(cls, directory: Path, binding: Binding, capacity: Capacity) -> HostBuffer:
        """Make a buffer file in `directory`; sparse until somebody populates or writes it.

        Raises:
            HostMemoryFullError: no space in `directory`.
            HostMemoryError: a binding or capacity that can not be described.
        """
        return cls.open(make_named(directory, binding, capacity))

    @classmethod
    def create_unnamed(cls, binding: Binding, capacity: Capacity) -> HostBuffer:
        """Make a buffer without a name, outside every tmpfs mount; it dies with this process.

        Its `path` is good for other processes of this user as long as this one lives.

        Raises:
            HostMemoryFullError: not enough memory.
        """
        return cls.of_descriptor(make_unnamed(binding, capacity))

    @classmethod
    def open(cls, path: Path) -> HostBuffer:
        """Map an existing buffer.

        Raises:
            HostMemoryError: it is not a file of this user, or can not be mapped.
            HostBufferDamagedError: its header does not hold.
        """
        return cls._map_file(open_buffer(path), path)

    @classmethod
    def of_descriptor(cls, fd: int) -> HostBuffer:
        """Map the buffer without a name that `fd` is, which is closed with it.

        Raises:
            HostMemoryError: it is not a file of this user, or can not be mapped.
            HostBufferDamagedError: its header does not hold.
        """
        return cls._map_file(fd, Path(f"/proc/{os.getpid()}/fd/{fd}"))

    @classmethod
    def _map_file(cls, fd: int, path: Path) -> HostBuffer:
        try:
            capacity = read_header(fd, path)
            return cls(path, fd, SharedMap(fd, capacity.file_bytes), capacity)
        except BaseException:
            os.close(fd)
            raise

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._fd

    def close(self) -> None:
        """Unmap the file and drop the writer's lock, if this process holds it."""
        self._words.release()
        self._map.close()
        os.close(self._fd)

    def is_reachable(self) -> bool:
        """Whether its path still leads to it: cleaners of tmpfs and logind's RemoveIPC delete files
        that are in use.
        """
        return self._is_at(self.path)

    def _is_at(self, path: Path) -> bool:
        try:
            named, own = os.stat(path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)

    def follow(self, path: Path) -> bool:
        """Whether `path` leads to it; if so it is its path from now on. Each daemon has another
        name for a buffer without one.
        """
        if not self._is_at(path):
            return False
        self.path = path
        return True

    def unlink(self) -> None:
        """Remove the file; whoever has it mapped keeps the memory until it closes."""
        if not is_unnamed(self.path):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def lock_for_writing(self) -> bool:
        """Take the writer's lock; False if another live process has it.

        A POSIX record lock: the kernel drops it when the process dies, and a forked child
        (a data loader worker that outlives the trainer) does not inherit it.
        """
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def has_live_writer(self) -> bool:
        """Whether another process holds the writer's lock. It is only looked at, never taken."""
        ask = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, ask))[0]
        return bool(kind != fcntl.F_UNLCK)

    def map_to_read(self, snapshot: Snapshot, stop: threading.Event | None = None) -> None:
        """Map the pages of a snapshot to read them; errors as `populate`, which costs more."""
        start = self.data_at(snapshot.slot)
        end = start + round_up(snapshot.data_bytes, PAGE_BYTES)
        self._map.populate(start, end, stop, to_read=True)

    def populate(self, slot: int, stop: threading.Event | None = None) -> None:
        """Make every page of a slot present and writable in this process (about 1 s per GiB).

        Fresh pages cost ten times a copy into warm ones, and a full tmpfs would kill the writer
        with SIGBUS: both are met here, before the first snapshot. The memory is charged to the
        cgroup of the caller, which is the trainer.

        Raises:
            HostMemoryError: not enough shared memory.
        """
        start = self.slot_at(slot)
        self._map.populate(start, start + self.capacity.slot_bytes, stop)

    def populate_table(self, slot: int) -> None:
        """Make a slot's header page and table region present and writable in this process.

        Raises:
            HostMemoryError: not enough shared memory.
        """
        self._map.populate(self.slot_at(slot), self.data_at(slot))

    def populate_data(self, slot: int, start: int, end: int) -> None:
        """Make a range of a slot's data region present and writable in this process.

        Raises:
            HostMemoryError: not enough shared memory.
        """
        at = self.data_at(slot)
        self._map.populate(at + start, at + end)

    @property
    def memory(self) -> memoryview:
        """The whole file, mapped."""
        return self._map.view

    # -- slots --------------------------------------------------------------------------------

    def slot_at(self, slot: int) -> int:
        """Offset of a slot in the file."""
        return SLOTS_AT + slot * self.capacity.slot_bytes

    def data_at(self, slot: int) -> int:
        """Offset of a slot's data region in the file; a multiple of the page size."""
        return self.slot_at(slot) + PAGE_BYTES + self.capacity.table_bytes

    def state(self, slot: int) -> tuple[SlotState, int]:
        """State and generation of a slot, from one 8-byte load."""
        word = self._words[self.slot_at(slot) // 8]
        number = word & 3
        return (SlotState(number) if number < 3 else SlotState.EMPTY), word >> 2

    def _set_state(self, slot: int, state: SlotState, generation: int) -> None:
        # memoryview item assignment with format Q is one aligned 8-byte store.
        self._words[self.slot_at(slot) // 8] = generation << 2 | state

    def data(self, slot: int) -> memoryview:
        """The whole data region of a slot, writable."""
        start = self.data_at(slot)
        return self._map.view[start : start + self.capacity.data_bytes]

    def next_generation(self) -> int:
        """A generation greater than every one in the buffer."""
        return 1 + max(self.state(slot)[1] for slot in range(self.capacity.slots))

    def snapshot(self, slot: int) -> Snapshot | None:
        """The sealed snapshot in `slot`, or None if there is none.

        Raises:
            HostBufferDamagedError: it says SEALED, but its record does not hold.
        """
        state, generation = self.state(slot)
        if state is not SlotState.SEALED:
            return None
        at = self.slot_at(slot)
        reserved = bytes(self._map.view[at + 8 : at + _SEALED_AT])
        record = bytes(self._map.view[at + _SEALED_AT : at + _SEALED_HASH_AT])
        digest = bytes(self._map.view[at + _SEALED_HASH_AT : at + _SEALED_HASH_AT + 16])
        memory_barrier()
        if self.state(slot) != (state, generation):
            return None
        fields = _SEALED.unpack(record)
        inside = (
            fields[0] == generation
            and fields[2] <= STEP_MAX
            and not any(reserved)
            and table_bytes_needed(fields[6], fields[7]) <= self.capacity.table_bytes
            and fields[8] <= self.capacity.data_bytes
        )
        if xxhash.xxh3_128_digest(record) != digest or not inside:
            raise self._damaged(f"sealed record of slot {slot} does not hold")
        return Snapshot(
            slot=slot,
            generation=generation,
            attempt=fields[1],
            step=fields[2],
            nonce=fields[3].hex(),
            rank=fields[4],
            world=fields[5],
            layout_bytes=fields[6],
            values_bytes=fields[7],
            data_bytes=fields[8],
            sealed_at=fields[9],
            stall_seconds=fields[10],
        )

    def _damaged(self, why: str) -> HostBufferDamagedError:
        return HostBufferDamagedError(why, subject=str(self.path))

    def snapshots(self) -> list[Snapshot]:
        """All sealed snapshots, oldest first."""
        found = [self.snapshot(slot) for slot in range(self.capacity.slots)]
        return sorted((s for s in found if s is not None), key=lambda s: s.generation)

    def unchanged(self, snapshot: Snapshot) -> bool:
        """Whether the slot still holds `snapshot`: call it after the last read of the slot."""
        memory_barrier()
        return self.state(snapshot.slot) == (SlotState.SEALED, snapshot.generation)

    def table(self, snapshot: Snapshot) -> Table:
        """Copies of a snapshot's layout, values and tags, checked against their hashes.

        Raises:
            TornSnapshotError: the slot was reused while it was read.
            HostBufferDamagedError: the slot is the same, but the hashes do not hold.
        """
        start = self.slot_at(snapshot.slot) + PAGE_BYTES
        values_at = start + round_up(snapshot.layout_bytes, _VALUES_ALIGN)
        layout = bytes(self._map.view[start : start + snapshot.layout_bytes])
        values = bytes(self._map.view[values_at : values_at + snapshot.values_bytes])
        at = self.slot_at(snapshot.slot) + _SEALED_AT
        fields = _SEALED.unpack_from(self._map.view, at)
        if not self.unchanged(snapshot):
            raise TornSnapshotError(
                f"slot {snapshot.slot} was reused while it was read", subject=str(self.path)
            )
        hashes = (xxhash.xxh3_128_digest(layout), xxhash.xxh3_128_digest(values))
        if hashes != (fields[11], fields[12]):
            raise self._damaged(f"table of slot {snapshot.slot} does not hold")
        try:
            tags, plain = _decode_values(values)
        except MALFORMED as error:
            raise self._damaged(f"values can not be read: {error}") from error
        return Table(layout, plain, tags)

    def begin(self, slot: int) -> SlotWriter:
        """Start writing `slot`: from now on what it held does not exist any more."""
        generation = self.next_generation()
        self._set_state(slot, SlotState.WRITING, generation)
        memory_barrier()
        return SlotWriter(self, slot, generation)

    # -- words of the daemon ------------------------------------------------------------------

    def settle(self, slot: int, generation: int, outcome: Outcome) -> None:
        """Say what became of a snapshot; call it only when the register is durable."""
        at = (_DAEMON_PAGE_AT + 64 + 64 * slot) // 8
        self._words[at + 1] = outcome
        memory_barrier()
        self._words[at] = generation

    def outcome(self, snapshot: Snapshot) -> Outcome:
        """What became of a snapshot, as far as this buffer knows."""
        at = (_DAEMON_PAGE_AT + 64 + 64 * snapshot.slot) // 8
        if self._words[at] != snapshot.generation:
            return Outcome.UNDECIDED
        memory_barrier()
        return Outcome(self._words[at + 1])

    @property
    def superseded_by(self) -> int:
        """The newest active attempt the daemon has seen; an older writer must end."""
        return self._words[_DAEMON_PAGE_AT // 8 + 1]

    def supersede(self, attempt: int) -> None:
        """Tell the writer that `attempt` is active."""
        self._words[_DAEMON_PAGE_AT // 8 + 1] = attempt

    @property
    def taken_by(self) -> int:
        """The attempt whose trainer was given the buffer last; 0 if it never was."""
        return self._words[_DAEMON_PAGE_AT // 8 + 2]

    def take(self, attempt: int) -> None:
        """Remember for a later daemon whose buffer this is."""
        self._words[_DAEMON_PAGE_AT // 8 + 2] = attempt

    @property
    def progress_bytes(self) -> int:
        """Bytes that this buffer's snapshots have put into the store, ever."""
        return self._words[_DAEMON_PAGE_AT // 8]

    def add_progress(self, length: int) -> None:
        """Count bytes that reached the store; the rank tells a slow store from a dead one by it."""
        self._words[_DAEMON_PAGE_AT // 8] += length


class SlotWriter:
    """The right to fill one slot; ends with `seal`, or with the slot left as WRITING."""

    def __init__(self, buffer: HostBuffer, slot: int, generation: int) -> None:
        self._buffer = buffer
        self.slot = slot
        self.generation = generation

    @property
    def data(self) -> memoryview:
        """The slot's data region, writable."""
        return self._buffer.data(self.slot)

    def seal(
        self,
        *,
        attempt: int,
        nonce: str,
        rank: int,
        world: int,
        step: int,
        layout: bytes,
        layout_hash: bytes,
        values: bytes,
        tags: Tags,
        data_bytes: int,
        stall_seconds: float,
        sealed_at: float | None = None,
    ) -> Snapshot:
        """Write the table, then publish the snapshot by one aligned 8-byte store.

        `layout_hash` is xxh3_128 of `layout`, which is constant and hashed once by the caller.
        `tags` are at most TAGS_BYTES_MAX long when encoded.

        Raises:
            HostMemoryError: table or data do not fit into the slot.
        """
        buffer = self._buffer
        values = _encode((tags, values))
        if not buffer.capacity.holds(table_bytes_needed(len(layout), len(values)), data_bytes):
            raise HostMemoryError("snapshot does not fit", subject=str(buffer.path))
        view = buffer._map.view
        at = buffer.slot_at(self.slot)
        self._write_table(layout, layout_hash, values)
        record = _SEALED.pack(
            self.generation,
            attempt,
            step,
            bytes.fromhex(nonce),
            rank,
            world,
            len(layout),
            len(values),
            data_bytes,
            time.time() if sealed_at is None else sealed_at,
            stall_seconds,
            layout_hash,
            xxhash.xxh3_128_digest(values),
        )
        view[at + _SEALED_AT : at + _SEALED_HASH_AT] = record
        view[at + _SEALED_HASH_AT : at + _SEALED_HASH_AT + 16] = xxhash.xxh3_128_digest(record)
        memory_barrier()
        buffer._set_state(self.slot, SlotState.SEALED, self.generation)
        snapshot = buffer.snapshot(self.slot)
        assert snapshot is not None
        return snapshot

    def _write_table(self, layout: bytes, layout_hash: bytes, values: bytes) -> None:
        view = self._buffer._map.view
        at = self._buffer.slot_at(self.slot)
        start = at + PAGE_BYTES
        old = _SEALED.unpack_from(view, at + _SEALED_AT)
        # The layout is the same from step to step and may be megabytes: write it only once.
        # The old record may belong to a write that was cut short, so the bytes are compared too.
        same = old[11] == layout_hash and view[start : start + len(layout)] == layout
        if not same:
            view[start : start + len(layout)] = layout
        values_at = start + round_up(len(layout), _VALUES_ALIGN)
        view[values_at : values_at + len(values)] = values
