"""A state goes through a sealed slot of a real host buffer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckptmgr.rank.capture import Capture, Prepared
from ckptmgr.rank.place import Saved
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import HostBuffer, round_up
from ckptmgr.staging.layout import decode_layout
from ckptmgr.types import PAGE_BYTES, Binding

SLOTS = 2


@contextmanager
def buffer_for(prepared: Prepared) -> Iterator[HostBuffer]:
    """A fresh buffer on tmpfs that holds snapshots of this size."""
    data_bytes = max(PAGE_BYTES, prepared.data_bytes)
    capacity = Capacity(SLOTS, round_up(prepared.table_bytes + PAGE_BYTES, PAGE_BYTES), data_bytes)
    binding = Binding("file:///nowhere", 0, 1)
    buffer = HostBuffer.create(Path("/dev/shm"), binding, capacity)
    try:
        # Old bytes between the leaves would show in a comparison of slots.
        for slot in range(SLOTS):
            with buffer.data(slot) as data:
                used = min(len(data), 1 << 20)
                data[:used] = b"\xa5" * used
        yield buffer
    finally:
        buffer.unlink()
        buffer.close()


def seal(buffer: HostBuffer, slot: int, prepared: Prepared, step: int = 1) -> None:
    """Write WRITING, then everything, then SEALED; the data must be in place."""
    buffer.begin(slot).seal(
        attempt=1,
        nonce=secrets.token_hex(16),
        rank=0,
        world=1,
        step=step,
        layout=prepared.layout_bytes,
        layout_hash=prepared.layout_hash,
        values=prepared.values,
        tags={},
        data_bytes=prepared.data_bytes,
        stall_seconds=0.0,
    )


def read(buffer: HostBuffer, slot: int) -> Saved:
    """What a reader finds in a sealed slot; release `data` before the buffer is closed."""
    snapshot = buffer.snapshot(slot)
    assert snapshot is not None
    table = buffer.table(snapshot)
    layout = decode_layout(table.layout, subject="slot")
    return Saved(layout, table.values, buffer.data(slot))


@contextmanager
def snapshot(state: MutableMapping[str, Any], *, rng: bool = False) -> Iterator[Saved]:
    """One snapshot of `state`, read back from its sealed slot."""
    capture = Capture(state, rng=rng, overlap=False)
    heard: list[BaseException | None] = []
    prepared = capture.prepare()
    with buffer_for(prepared) as buffer:
        writer = buffer.begin(0)
        capture.copy(prepared, writer.data, heard.append)
        capture.close()
        assert heard == [None], heard
        seal(buffer, 0, prepared)
        saved = read(buffer, 0)
        try:
            yield saved
        finally:
            saved.data.release()
