"""Snapshots of a few pages for tests of host buffers."""

from __future__ import annotations

import xxhash

from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import TAGS_BYTES_MAX, HostBuffer, table_bytes_needed
from ckptmgr.types import PAGE_BYTES, Binding, Snapshot, Tags

BINDING = Binding("file:///somewhere", 0, 1)
LAYOUT = b"layout " * 100
LAYOUT_HASH = xxhash.xxh3_128_digest(LAYOUT)
CAPACITY = Capacity(2, table_bytes_needed(len(LAYOUT), TAGS_BYTES_MAX), 4 * PAGE_BYTES)


def seal(
    buffer: HostBuffer, slot: int, step: int, values: bytes = b"\x90", tags: Tags | None = None
) -> Snapshot:
    """Seal a step of attempt 3 whose data is whatever the slot holds."""
    return buffer.begin(slot).seal(
        attempt=3,
        nonce="ab" * 16,
        rank=0,
        world=1,
        step=step,
        layout=LAYOUT,
        layout_hash=LAYOUT_HASH,
        values=values,
        tags=tags or {},
        data_bytes=CAPACITY.data_bytes,
        stall_seconds=0.5,
        sealed_at=1e9,
    )


def racing_table(step: int) -> tuple[bytes, Tags]:
    """Values and tags of a step whose every byte depends on it."""
    return bytes([step % 251]) * (20_000 + step % 1000), {"step": step}
