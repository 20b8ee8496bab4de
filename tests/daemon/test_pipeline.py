"""A snapshot goes into the store as it was sealed, or not at all."""

from __future__ import annotations

import asyncio
import errno
import secrets
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ckptmgr.config import BUDGET_BYTES, MIB, PACK_BYTES
from ckptmgr.daemon import pipeline
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.daemon.route import Send
from ckptmgr.errors import RegisterConflictError, StoreUnreachableError, TornSnapshotError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.chunk import Cut
from ckptmgr.repository.codec import Codec
from ckptmgr.repository.commit import FROM_SCRATCH, commit_step
from ckptmgr.repository.manifest import SealedManifest
from ckptmgr.repository.rates import BLOCK_BYTES, Meter
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.store.base import Buffers, PutResult, Store
from ckptmgr.store.memory import MemoryStore
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import StepId
from small_step import (
    HOST,
    Encoded,
    encode_state,
    fill_slot,
    host_buffer,
    memory_store,
    shelf_of,
    small_state,
)

STEP = StepId(1, 10)
ENCODED = encode_state(small_state(10))
NONCE = "ab" * 16
CODECS = pytest.mark.parametrize("codec", ["none", "zstd", "planes", "auto"])


class Forgetful(MemoryStore):
    """Its first answer is lost: the put again finds the bytes of then, and the slot has others."""

    def __init__(self, buffer: HostBuffer) -> None:
        super().__init__(secrets.token_hex(8))
        self._buffer = buffer

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        self._buffer.begin(0)
        return PutResult.CONFLICT


async def test_a_pack_that_was_put_before_its_slot_was_reused_is_no_conflict() -> None:
    with host_buffer("memory://a", len(ENCODED.data)) as buffer:
        snapshot = sealed_in(buffer)
        with pytest.raises(TornSnapshotError):
            await write(Forgetful(buffer), buffer, snapshot, "none")


def sealed_in(buffer: HostBuffer, encoded: Encoded = ENCODED, nonce: str = NONCE) -> Any:
    return fill_slot(buffer, 0, encoded, attempt=1, nonce=nonce, step=10)


async def write(store: Store, buffer: HostBuffer, snapshot: Any, codec: str) -> SealedManifest:
    pipeline = Pipeline(BufferPool(BUDGET_BYTES))
    return await pipeline.write(
        Source(buffer, snapshot, store, HOST), codec, lambda _raw, _stored: None
    )


async def read(store: Store, sealed: SealedManifest) -> bytes:
    target = bytearray(sum(chunk.raw_bytes for chunk in sealed.manifest.chunks))
    await fetch(store, plan_whole(sealed.manifest), memoryview(target), BufferPool(1))
    return bytes(target)


@CODECS
def test_what_was_sealed_comes_back(codec: str) -> None:
    async def main() -> None:
        store = memory_store({})
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            sealed = await write(store, buffer, sealed_in(buffer), codec)
        decision = await commit_step(store, [sealed], FROM_SCRATCH)
        (again,) = await Catalog(store).manifests(decision)
        assert await read(store, again) == ENCODED.data
        manifest = again.manifest
        assert (manifest.layout, manifest.values) == (ENCODED.layout_bytes, ENCODED.values)
        assert manifest.stored_bytes == sum(len(shelf_of(store)[k]) for k, _ in manifest.packs)
        if codec != "auto":
            expected = {"none": {0}, "zstd": {0, 1}, "planes": {0, 1, 2}}[codec]
            assert {chunk.codec for chunk in manifest.chunks} == expected

    asyncio.run(main())


def test_a_pack_is_hashed_while_those_before_it_are_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a store need not wait for a hash, only for the first one."""

    async def main() -> None:
        loop, hashed, third = asyncio.get_running_loop(), set[int](), asyncio.Event()

        def hash_pack(source: Source, cuts: list[Cut]) -> Any:
            pack = raw_pack(source, cuts)
            hashed.add(cuts[0].offset // PACK_BYTES)
            if hashed == {0, 1, 2}:
                loop.call_soon_threadsafe(third.set)
            return pack

        class Slow(MemoryStore):
            async def put_new(self, key: str, buffers: Buffers) -> PutResult:
                async with asyncio.timeout(30):
                    await third.wait()
                return PutResult.OK

        raw_pack = pipeline._raw_pack
        monkeypatch.setattr(pipeline, "_raw_pack", hash_pack)
        encoded = encode_state({"state": np.zeros(3 * PACK_BYTES, np.uint8)})
        store = Slow("slow")
        with host_buffer(store.url, len(encoded.data)) as buffer:
            sealed = await write(store, buffer, sealed_in(buffer, encoded), "none")
        assert len(sealed.manifest.packs) == 3
        assert hashed == {0, 1, 2}

    asyncio.run(main())


def test_a_pack_that_can_not_be_read_ends_the_puts_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        def unreadable(source: Source, cuts: list[Cut]) -> Any:
            if cuts[0].offset == 2 * PACK_BYTES:
                raise OSError(errno.EIO, "the third pack")
            return raw_pack(source, cuts)

        class Waiting(MemoryStore):
            async def put_new(self, key: str, buffers: Buffers) -> PutResult:
                return await asyncio.get_running_loop().create_future()

        raw_pack = pipeline._raw_pack
        monkeypatch.setattr(pipeline, "_raw_pack", unreadable)
        encoded = encode_state({"state": np.zeros(3 * PACK_BYTES, np.uint8)})
        store = Waiting("waiting")
        with (
            host_buffer(store.url, len(encoded.data)) as buffer,
            pytest.raises(OSError, match="the third pack"),
        ):
            async with asyncio.timeout(30):
                await write(store, buffer, sealed_in(buffer, encoded), "none")
        task = asyncio.current_task()
        assert task is not None
        assert asyncio.all_tasks() == {task}
        assert not task.cancelling()

    asyncio.run(main())


def test_packs_that_must_be_copied_never_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of files that `watch` adopts: what goes raw needs a buffer, too. Two that had a place and
    waited for a buffer, and two that had one and waited for a place, waited for ever.
    """

    class Elsewhere(Source):
        in_place = False

    async def main() -> None:
        writing, store = Pipeline(BufferPool(BUDGET_BYTES)), MemoryStore("elsewhere")
        sends = iter([Send.COMPRESSED, Send.COMPRESSED, Send.RAW, Send.RAW])
        monkeypatch.setattr(writing.route(store.url), "next", lambda *_, **__: next(sends))
        with host_buffer(store.url, len(encoded.data)) as buffer:
            source = Elsewhere(buffer, sealed_in(buffer, encoded), store, HOST)
            async with asyncio.timeout(30):
                sealed = await writing.write(source, "zstd", lambda _raw, _stored: None)
        assert await read(store, sealed) == encoded.data

    monkeypatch.setattr(pipeline.packs_of, "__defaults__", (4 * MIB,))
    encoded = encode_state({"letters": np.arange(16 * MIB, dtype=np.uint8) % 16})
    asyncio.run(main())


def measured(rate: float, nbytes: int) -> Meter:
    """A meter that has seen `nbytes` at `rate`, and whose clock stands still since."""
    moments = iter([0.0])
    meter = Meter(lambda: next(moments, nbytes / rate))
    meter.begin()
    meter.end(nbytes)
    return meter


@pytest.mark.parametrize(("store_rate", "compresses"), [(1e3, True), (1e12, False)])
def test_auto_does_what_the_rates_say_and_what_it_stored_comes_back(
    store_rate: float, compresses: bool
) -> None:
    """A store of 1 kB/s, and one of 1 TB/s."""

    async def main() -> None:
        store = memory_store({})
        pipeline = Pipeline(BufferPool(BUDGET_BYTES))
        route = pipeline.route(store.url)
        route.encoded(route.begin(), 64 << 20, 32 << 20)
        route.store = measured(store_rate, BLOCK_BYTES)
        route.codec = measured(1e8, BLOCK_BYTES)
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            source = Source(buffer, sealed_in(buffer), store, HOST)
            sealed = await pipeline.write(source, "auto", lambda _raw, _stored: None)
        codecs = {chunk.codec for chunk in sealed.manifest.chunks}
        assert (codecs != {Codec.NONE}) == compresses
        assert Codec.NONE in codecs, "noise is not compressed"
        assert await read(store, sealed) == ENCODED.data
        assert pipeline.state(store.url)["store_bytes_per_second"] == pytest.approx(store_rate)

    asyncio.run(main())


@CODECS
@pytest.mark.parametrize("operation", ["make_durable", "put_new"])
def test_a_slot_that_is_reused_meanwhile_leaves_no_manifest(codec: str, operation: Any) -> None:
    """The trainer writes the next step over it while the store is slow: nothing mixed gets out."""

    async def main() -> None:
        gate = asyncio.Event()
        inner = memory_store({})
        store = FaultyStore(inner, [Fault(operation=operation, gate=gate)])
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            writing = asyncio.create_task(write(store, buffer, sealed_in(buffer), codec))
            while not any(made == operation for made, _ in store.operations):
                await asyncio.sleep(0)
            fill_slot(buffer, 0, encode_state(small_state(11)), attempt=1, nonce=NONCE, step=11)
            gate.set()
            with pytest.raises(TornSnapshotError):
                await writing
        assert await inner.list("man/") == []

    asyncio.run(main())


def test_a_manifest_of_the_same_snapshot_is_taken_over_and_made_durable() -> None:
    """A daemon died after its manifest: the next one commits that, and writes nothing twice."""

    async def main() -> None:
        store = FaultyStore(memory_store({}))
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            snapshot = sealed_in(buffer)
            first = await write(store, buffer, snapshot, "planes")
            before = len(store.operations)
            again = await write(store, buffer, snapshot, "zstd")
        assert again == first
        key = keys.manifest(STEP, 0)
        made_durable, *reads = store.operations[before:]
        assert made_durable == ("make_durable", key)
        assert set(reads) == {("get", key)}

    asyncio.run(main())


class LateStore(MemoryStore):
    """The answer to the first manifest never comes; it arrives when the next pack is put."""

    def __init__(self) -> None:
        super().__init__(secrets.token_hex(8))
        self.on_its_way: list[tuple[str, bytes]] = []
        self.arrived: list[bytes] = []

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        if key.startswith("man/") and not self.on_its_way and not self.arrived:
            self.on_its_way.append((key, b"".join(buffers)))
            raise StoreUnreachableError("no answer", subject=key)
        while self.on_its_way:
            late, record = self.on_its_way.pop()
            await super().put_new(late, [memoryview(record)])
            self.arrived.append(record)
        return await super().put_new(key, buffers)


def test_a_manifest_of_an_earlier_try_that_arrives_late_is_taken_over() -> None:
    """It is whole, and ours: to take it for another writer's would give the step up."""

    async def main() -> None:
        store = LateStore()
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            snapshot = sealed_in(buffer)
            with pytest.raises(StoreUnreachableError):
                await write(store, buffer, snapshot, "none")
            sealed = await write(store, buffer, snapshot, "none")
        assert [sealed.record] == store.arrived
        assert await read(store, sealed) == ENCODED.data

    asyncio.run(main())


def test_a_late_manifest_of_another_snapshot_of_the_step_is_not_adopted() -> None:
    async def main() -> None:
        store = LateStore()
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            with pytest.raises(StoreUnreachableError):
                await write(store, buffer, sealed_in(buffer), "none")
            again = replace(sealed_in(buffer), sealed_at=time.time())
            with pytest.raises(RegisterConflictError, match="another snapshot of this step"):
                await write(store, buffer, again, "none")

    asyncio.run(main())


def test_the_manifest_of_another_incarnation_is_left_alone() -> None:
    async def main() -> None:
        store = memory_store({})
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            first = await write(store, buffer, sealed_in(buffer), "none")
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            snapshot = sealed_in(buffer, nonce="cd" * 16)
            with pytest.raises(RegisterConflictError):
                await write(store, buffer, snapshot, "none")
        assert bytes(shelf_of(store)[keys.manifest(STEP, 0)]) == first.record

    asyncio.run(main())


def test_the_manifest_of_another_snapshot_of_the_step_is_not_adopted() -> None:
    """One number, one nonce, other bytes: whoever asks for its commit must not be told of these."""

    async def main() -> None:
        store = memory_store({})
        with host_buffer(store.url, len(ENCODED.data)) as buffer:
            first = await write(store, buffer, sealed_in(buffer), "none")
            again = replace(sealed_in(buffer), sealed_at=time.time())
            with pytest.raises(RegisterConflictError, match="another snapshot of this step"):
                await write(store, buffer, again, "none")
        assert bytes(shelf_of(store)[keys.manifest(STEP, 0)]) == first.record

    asyncio.run(main())


@CODECS
def test_a_failed_put_leaves_no_manifest_and_can_be_tried_again(codec: str) -> None:
    async def main() -> None:
        for at in (1, 2):
            fault = Fault(StoreUnreachableError("no"), operation="put_new", at=at)
            store = FaultyStore(memory_store({}), [fault])
            with host_buffer(store.url, len(ENCODED.data)) as buffer:
                snapshot = sealed_in(buffer)
                with pytest.raises(StoreUnreachableError):
                    await write(store, buffer, snapshot, codec)
                assert await store.list("man/") == []
                assert await read(store, await write(store, buffer, snapshot, codec)) == (
                    ENCODED.data
                )

    asyncio.run(main())
