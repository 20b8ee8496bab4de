"""A fetch brings verified bytes or an error, and leaves the memory it was lent alone afterwards."""

from __future__ import annotations

import asyncio
import mmap
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.config import CHUNK_BYTES
from ckptmgr.errors import (
    ChunkDamagedError,
    MissingObjectError,
    StoreError,
    StoreUnreachableError,
)
from ckptmgr.repository.budget import LEASE_BYTES, BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.chunk import Chunk
from ckptmgr.repository.codec import Codec
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.fetch import BATCH_READS_MAX, LANES, _batches, _room_bytes, fetch
from ckptmgr.restore.plan import Move, Plan, Read, plan_whole
from ckptmgr.store.base import Store, Wanted
from ckptmgr.testing import Fault, FaultyStore
from small_step import (
    Objects,
    SavedStep,
    made_in_memory,
    memory_store,
    plan_leaves,
    save_step,
    save_steps,
    shelf_of,
)


def several_chunks() -> dict[str, Any]:
    """Five chunks: three of floats, one of counters, one of noise."""
    rng = np.random.default_rng(7)
    return {
        "weights": (rng.standard_normal(2 * CHUNK_BYTES // 4 + 1000) * 0.02).astype(np.float32),
        "odd": (rng.standard_normal((7, 11)) * 0.02).astype(np.float32),
        "counts": rng.integers(0, 100, 50_000, np.int64),
        "noise": rng.integers(0, 256, 40_960, np.uint8),
    }


def made(codec: str) -> tuple[SavedStep, Objects, Manifest]:
    async def save(store: Store) -> list[SavedStep]:
        (first,) = await save_steps(store, (1,))
        return [await save_step(store, 1, first.decision.nonce, 2, several_chunks(), codec)]

    (saved,), objects = made_in_memory(save)
    manifest = asyncio.run(Catalog(memory_store(objects)).manifest(saved.decision, 0)).manifest
    return saved, objects, manifest


MADE = {codec: made(codec) for codec in ("none", "zstd", "planes")}
CODECS = pytest.mark.parametrize("codec", MADE)


def bring(store: Store, plan: Plan, pool: BufferPool | None = None) -> bytes:
    target = bytearray(plan.target_bytes)
    asyncio.run(fetch(store, plan, memoryview(target), pool or BufferPool(1)))
    return bytes(target)


@CODECS
def test_the_whole_comes_back(codec: str) -> None:
    saved, objects, manifest = MADE[codec]
    assert len(manifest.chunks) == 5
    told: list[int] = []
    target = bytearray(len(saved.encoded.data))
    plan = plan_whole(manifest)
    asyncio.run(fetch(memory_store(objects), plan, memoryview(target), BufferPool(1), told.append))
    assert bytes(target) == saved.encoded.data
    assert sum(told) == len(target)


@CODECS
def test_some_leaves_in_any_order_come_back(codec: str) -> None:
    saved, objects, manifest = MADE[codec]
    leaves = list(manifest.read_layout().leaves)
    for _ in range(5):
        random.shuffle(leaves)
        some = leaves[: random.randrange(len(leaves) + 1)]
        found = bring(memory_store(objects), plan_leaves(manifest, some))
        assert found == b"".join(saved.arrays[leaf.path].tobytes() for leaf in some)


@CODECS
def test_only_wanted_chunks_are_read(codec: str) -> None:
    _, objects, manifest = MADE[codec]
    (odd,) = [leaf for leaf in manifest.read_layout().leaves if leaf.path == "counts"]
    store = FaultyStore(memory_store(objects))
    bring(store, plan_leaves(manifest, [odd]))
    assert len(store.operations) == 1


def broken(codec: str, how: str, at: int) -> tuple[Objects, Manifest]:
    """The chunk with index `at` is damaged, or its pack cut or gone."""
    _, objects, manifest = MADE[codec]
    chunk = manifest.chunks[at]
    key = manifest.packs[chunk.pack][0]
    blob = bytearray(objects[key])
    if how == "flipped":
        blob[chunk.pack_offset + random.randrange(chunk.stored_bytes)] ^= 1 << random.randrange(8)
    elif how == "cut":
        del blob[chunk.pack_offset + chunk.stored_bytes - 1 :]
    changed = {**objects, key: bytes(blob)}
    if how == "gone":
        del changed[key]
    return changed, manifest


@CODECS
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_named_and_the_memory_is_free_at_once(codec: str, how: str) -> None:
    """Closing the mapping while the error is being handled must work: restore does just that."""
    for at in range(5):
        objects, manifest = broken(codec, how, at)
        kind = MissingObjectError if how == "gone" else ChunkDamagedError
        for plan in (plan_whole(manifest), plan_leaves(manifest, manifest.read_layout().leaves)):
            mapped = mmap.mmap(-1, plan.target_bytes)
            with pytest.raises(kind) as caught, memoryview(mapped) as target:
                asyncio.run(fetch(memory_store(objects), plan, target, BufferPool(1)))
            mapped.close()  # while `caught` keeps every frame of the failure alive
            assert caught.value.subject.startswith(manifest.packs[0][0])


@CODECS
def test_a_failure_ends_the_fetch_only_when_nothing_is_under_way(codec: str) -> None:
    """One chunk is damaged while another is still being read into the same memory."""

    async def main() -> None:
        objects, manifest = broken(codec, "flipped", 0)
        gate = asyncio.Event()
        store = FaultyStore(memory_store(objects), [Fault(operation="get", at=3, gate=gate)])
        plan = plan_whole(manifest)
        target = bytearray(plan.target_bytes)
        task = asyncio.create_task(fetch(store, plan, memoryview(target), BufferPool(1)))
        done, _ = await asyncio.wait([task], timeout=0.3)
        assert not done, "it ended with a read under way"
        gate.set()
        with pytest.raises(ChunkDamagedError):
            await task
        target[:] = bytes(len(target))
        await asyncio.sleep(0.05)
        assert not any(target), "written to after the end"

    asyncio.run(main())


@CODECS
def test_an_unreachable_store_is_not_damage(codec: str) -> None:
    _, objects, manifest = MADE[codec]
    for at in range(1, 6):
        store = FaultyStore(memory_store(objects), [Fault(StoreUnreachableError("no"), at=at)])
        with pytest.raises(StoreUnreachableError):
            bring(store, plan_whole(manifest))


@CODECS
def test_cancelled_it_gives_its_lease_back(codec: str) -> None:
    async def main() -> None:
        _, objects, manifest = MADE[codec]
        pool = BufferPool(1)
        plan = plan_whole(manifest)
        store = FaultyStore(memory_store(objects), [Fault(at=2, gate=asyncio.Event())])
        task = asyncio.create_task(
            fetch(store, plan, memoryview(bytearray(plan.target_bytes)), pool)
        )
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        async with asyncio.timeout(10), pool.lease():
            pass

    asyncio.run(main())


def test_an_empty_plan_reads_nothing() -> None:
    store = FaultyStore(memory_store({}))
    assert bring(store, Plan((), 0)) == b""
    assert store.operations == []


@pytest.mark.parametrize("codec", ["zstd", "planes"])
def test_chunks_of_another_pack_are_not_taken(codec: str) -> None:
    """The same state in another codec under the pack's name: every chunk there is refused."""
    _, objects, manifest = MADE[codec]
    _, others, other = MADE["none"]
    store = memory_store(objects)
    shelf_of(store)[manifest.packs[0][0]] = bytearray(others[other.packs[0][0]])
    with pytest.raises(ChunkDamagedError):
        bring(store, plan_whole(manifest))


class BatchStore(FaultyStore):
    """Serves many ranges at once; its errors do not say which of them is at fault."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.batches: list[int] = []
        self.under_way = self.most = 0

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        self.batches.append(len(wanted))
        self.under_way += len(wanted)
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            await self._inner.get_many(wanted)
        except StoreError as error:
            raise type(error)("one of many failed", subject="batch") from error
        finally:
            self.under_way -= len(wanted)


def moved(read: Read, by: int) -> Read:
    """The same chunk, to a place further behind."""
    places = (Move(move.source, move.target + by, move.nbytes) for move in read.moves)
    return Read(read.key, read.chunk, tuple(places), read.check)


@CODECS
def test_many_ranges_are_asked_for_at_once_and_fit_the_lease(codec: str) -> None:
    saved, objects, manifest = MADE[codec]
    whole, times = plan_whole(manifest), 12
    reads = tuple(
        moved(read, at * whole.target_bytes) for at in range(times) for read in whole.reads
    )
    store = BatchStore(memory_store(objects))
    assert bring(store, Plan(reads, times * whole.target_bytes)) == times * saved.encoded.data
    assert sum(store.batches) == len(reads)
    assert max(store.batches) > 1
    assert store.most <= LANES * BATCH_READS_MAX
    for batch in _batches(reads):
        assert len(batch) <= BATCH_READS_MAX
        assert sum(map(_room_bytes, batch)) <= LEASE_BYTES // LANES


@given(count=st.integers(1, 40))
def test_a_batch_never_needs_more_room_than_its_lane(count: int) -> None:
    """The largest chunks that the format allows, all to be spread: nothing is cut short."""
    chunk = Chunk(0, 4096, CHUNK_BYTES, 0, CHUNK_BYTES, Codec.ZSTD, b"", b"")
    read = Read("pack", chunk, (Move(0, 0, CHUNK_BYTES - 1),))
    batches = list(_batches((read,) * count))
    assert sum(map(len, batches)) == count
    assert all(sum(map(_room_bytes, batch)) <= LEASE_BYTES // LANES for batch in batches)


@CODECS
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_what_failed_in_a_batch_is_named(codec: str, how: str) -> None:
    objects, manifest = broken(codec, how, 4)
    kind = MissingObjectError if how == "gone" else ChunkDamagedError
    with pytest.raises(kind) as caught:
        bring(BatchStore(memory_store(objects)), plan_whole(manifest))
    assert caught.value.subject.startswith(manifest.packs[0][0])
