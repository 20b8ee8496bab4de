"""A saved step into a slot of host memory: the same door for a rank, a reader and an export."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import xxhash

from ckptmgr.errors import HostMemoryError
from ckptmgr.repository.budget import BufferPool, in_thread
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import Plan, plan_chunks, plan_whole
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import (
    TAGS_BYTES_MAX,
    HostBuffer,
    SlotWriter,
    round_up,
    table_bytes_needed,
)
from ckptmgr.store.base import Store
from ckptmgr.types import PAGE_BYTES, Outcome, SlotState, Snapshot


def capacity_for(manifest: Manifest) -> Capacity:
    """A buffer with one slot that holds the step."""
    table_bytes = table_bytes_needed(len(manifest.layout), len(manifest.values) + TAGS_BYTES_MAX)
    return Capacity(1, table_bytes, round_up(manifest.read_layout().data_bytes, PAGE_BYTES))


async def fetch_into_slot(
    store: Store,
    manifest: Manifest,
    buffer: HostBuffer,
    slot: int,
    pool: BufferPool,
    progress: Callable[[int], None] = lambda _: None,
    chunks: Iterable[int] | None = None,
) -> Snapshot:
    """Fetch and verify a step, and seal it in `slot` as what it is: committed.

    With `chunks` only those are fetched, and the caller knows that the others are not there.

    Raises:
        DamageError: it does not hold; the slot stays unsealed.
        StoreUnreachableError: the store can not be read now.
        HostMemoryError: not enough shared memory. Every page is made present before it is written:
            a store into a hole of a full tmpfs would kill this process. Or somebody else has begun
            to write the slot: it is looked at before each batch, and before it is sealed.
    """
    await in_thread(buffer.populate_table, slot)
    writer = buffer.begin(slot)
    plan = plan_whole(manifest) if chunks is None else plan_chunks(manifest, chunks)
    await _fill(store, plan, buffer, slot, pool, progress, partial(_check_ours, buffer, writer))
    _check_ours(buffer, writer)
    buffer.settle(slot, writer.generation, Outcome.COMMITTED)
    return writer.seal(
        attempt=manifest.attempt,
        nonce=manifest.nonce,
        rank=manifest.rank,
        world=manifest.world,
        step=manifest.step,
        layout=manifest.layout,
        layout_hash=xxhash.xxh3_128_digest(manifest.layout),
        values=manifest.values,
        tags=manifest.tags,
        data_bytes=manifest.read_layout().data_bytes,
        stall_seconds=0.0,
        sealed_at=manifest.sealed_at,
    )


async def fetch_more(
    store: Store,
    manifest: Manifest,
    buffer: HostBuffer,
    slot: int,
    pool: BufferPool,
    chunks: Iterable[int],
) -> None:
    """Fetch and verify chunks that `fetch_into_slot` left out; errors as there."""
    await _fill(store, plan_chunks(manifest, chunks), buffer, slot, pool, lambda _: None)


def _check_ours(buffer: HostBuffer, writer: SlotWriter) -> None:
    """Look whether the slot is still ours: its trainer does not wait for a daemon that is dead."""
    if buffer.state(writer.slot) != (SlotState.WRITING, writer.generation):
        raise HostMemoryError(
            f"slot {writer.slot} is written by somebody else", subject=str(buffer.path)
        )


async def _fill(
    store: Store,
    plan: Plan,
    buffer: HostBuffer,
    slot: int,
    pool: BufferPool,
    progress: Callable[[int], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    def populate(start: int, end: int) -> None:
        check()
        buffer.populate_data(slot, start, end)

    with buffer.data(slot) as data:
        await fetch(store, plan, data, pool, progress, populate)
