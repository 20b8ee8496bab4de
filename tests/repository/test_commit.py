"""A register is decided once, and everybody who asks is told the same."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import (
    DamageError,
    MissingObjectError,
    ObjectNotFoundError,
    RecordDamagedError,
    RegisterConflictError,
    StoreUnreachableError,
    UnsupportedFormatError,
)
from ckptmgr.repository import keys
from ckptmgr.repository.commit import (
    FROM_SCRATCH,
    Decision,
    Format,
    abort_step,
    check_format,
    commit_of,
    commit_step,
    decide,
    get_record,
    read_record,
)
from ckptmgr.repository.manifest import Manifest, SealedManifest, seal_manifest
from ckptmgr.repository.record import Kind, seal
from ckptmgr.store.memory import MemoryStore
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import StepId
from small_step import memory_store, shelf_of

STEP = StepId(1, 100)
KEY = keys.commit(STEP)


def manifest_of(rank: int, world: int, **changes: Any) -> SealedManifest:
    made = Manifest(
        attempt=1,
        step=100,
        nonce="ab" * 16,
        rank=rank,
        world=world,
        host=f"host{rank}",
        layout=b"\x94\x90\x90\x00\xc4\x00",
        values=b"\x90",
        packs=(),
        chunks=(),
        raw_bytes=10 + rank,
        stored_bytes=5,
        sealed_at=float(rank),
        tags={"rank": rank},
    )
    return seal_manifest(msgspec.structs.replace(made, **changes))


@given(world=st.integers(1, 8), seed=st.integers(0, 100))
@settings(deadline=None)
def test_every_order_of_the_manifests_gives_the_same_bytes(world: int, seed: int) -> None:
    """Racing daemons compute the register on their own; rank 0 gives the tags."""
    manifests = [manifest_of(rank, world) for rank in range(world)]
    shuffled = manifests[:]
    random.Random(seed).shuffle(shuffled)
    commit = commit_of(shuffled, StepId(1, 90))
    assert commit == commit_of(manifests, StepId(1, 90))
    assert seal(Kind.COMMIT, KEY, commit) == seal(
        Kind.COMMIT, KEY, commit_of(manifests, StepId(1, 90))
    )
    assert commit.committed
    assert commit.id == STEP
    assert commit.manifests == tuple(m.digest.hex() for m in manifests)
    assert (commit.world, commit.parent) == (world, (1, 90))
    assert commit.raw_bytes == sum(10 + rank for rank in range(world))
    assert commit.tags == {"rank": 0}


MIXED = [
    [manifest_of(0, 2)],
    [manifest_of(1, 2)],
    [manifest_of(0, 2), manifest_of(0, 2)],
    [manifest_of(0, 2), manifest_of(1, 2), manifest_of(1, 2)],
    [manifest_of(0, 1), manifest_of(1, 2)],
    [manifest_of(0, 2), manifest_of(1, 2, nonce="cd" * 16)],
    [manifest_of(0, 2), manifest_of(1, 2, step=101)],
    [manifest_of(0, 2), manifest_of(1, 2, attempt=2)],
]


@pytest.mark.parametrize("manifests", MIXED, ids=range(len(MIXED)))
def test_a_mix_is_never_a_commit(manifests: list[SealedManifest]) -> None:
    with pytest.raises(RegisterConflictError):
        commit_of(manifests, FROM_SCRATCH)


def test_of_commits_and_aborts_that_race_one_wins_and_all_obey() -> None:
    async def main() -> None:
        winners = set()
        for _ in range(200):
            store = memory_store({})
            calls = [
                commit_step(store, [manifest_of(0, 1)], FROM_SCRATCH),
                commit_step(store, [manifest_of(0, 1)], FROM_SCRATCH),
                abort_step(store, STEP, "too late"),
                abort_step(store, STEP, "superseded"),
            ]
            random.shuffle(calls)
            told = await asyncio.gather(*calls)
            assert len({(one.decision, one.why) for one in told}) == 1
            assert await get_record(store, Kind.COMMIT, KEY, Decision) == told[0]
            winners.add(told[0].decision)
        assert winners == {"COMMIT", "ABORT"}

    asyncio.run(main())


def test_whoever_loses_makes_the_winner_durable_before_obeying() -> None:
    async def main() -> None:
        store = FaultyStore(memory_store({}))
        await abort_step(store, STEP, "first")
        store.plan(())
        before = len(store.operations)
        assert not (await commit_step(store, [manifest_of(0, 1)], FROM_SCRATCH)).committed
        put, durable, *reads = store.operations[before:]
        assert (put, durable) == (("put_new", KEY), ("make_durable", KEY))
        assert set(reads) == {("get", KEY)}, "what is obeyed is read when it is durable"

        store.plan([Fault(StoreUnreachableError("no"), operation="make_durable")])
        with pytest.raises(StoreUnreachableError):
            await commit_step(store, [manifest_of(0, 1)], FROM_SCRATCH)

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_ambiguous_put_is_settled_by_asking_again(when: Any) -> None:
    async def main() -> None:
        fault = Fault(StoreUnreachableError("timeout"), operation="put_new", when=when)
        store = FaultyStore(memory_store({}), [fault])
        with pytest.raises(StoreUnreachableError):
            await commit_step(store, [manifest_of(0, 1)], FROM_SCRATCH)
        assert (await commit_step(store, [manifest_of(0, 1)], FROM_SCRATCH)).committed

    asyncio.run(main())


def test_a_damaged_register_decides_nothing() -> None:
    async def main() -> None:
        store = memory_store({KEY: b"rubbish"})
        with pytest.raises(RecordDamagedError):
            await decide(store, Kind.COMMIT, KEY, Decision("ABORT", 1, 100))
        assert shelf_of(store)[KEY] == b"rubbish", "a register was overwritten"

    asyncio.run(main())


def test_a_record_is_read_no_further_than_it_declares() -> None:
    async def main() -> None:
        record = seal(Kind.COMMIT, KEY, Decision("ABORT", 1, 100))
        store = FaultyStore(memory_store({KEY: record + b"x" * 1000}))
        assert bytes(await read_record(store, Kind.COMMIT, KEY)) == record
        for length in (0, 1, 63, 64, len(record) - 1):
            with pytest.raises(RecordDamagedError, match="too short"):
                await read_record(memory_store({KEY: record[:length]}), Kind.COMMIT, KEY)
        with pytest.raises(ObjectNotFoundError):
            await read_record(memory_store({}), Kind.COMMIT, KEY)
        store.plan([Fault(StoreUnreachableError("no"))])
        with pytest.raises(StoreUnreachableError):
            await read_record(store, Kind.COMMIT, KEY)

    asyncio.run(main())


def format_of(version: int) -> bytes:
    return seal(Kind.FORMAT, keys.FORMAT, Format(version))


def test_the_mark_of_the_format() -> None:
    async def main() -> None:
        empty = memory_store({})
        assert not await check_format(empty, create=False)
        assert shelf_of(empty) == {}
        assert await check_format(empty, create=True)
        assert await check_format(empty, create=False)

        with pytest.raises(UnsupportedFormatError):
            await check_format(memory_store({"format": format_of(2)}), create=True)
        for create in (False, True):
            with pytest.raises(RecordDamagedError, match="Delete this object"):
                await check_format(memory_store({"format": b"x" * 80}), create=create)
        used = memory_store({keys.claim(1): b"x"})
        with pytest.raises(MissingObjectError, match="Start the job"):
            await check_format(used, create=False)
        assert await check_format(used, create=True), "the job can not start again"
        assert issubclass(MissingObjectError, DamageError)

    asyncio.run(main())


def test_many_writers_of_one_memory_store_agree_on_every_register() -> None:
    """The same with threads of their own, each with an event loop, through another handle."""
    name = f"agree-{random.random()}"

    async def ask(writer: int) -> list[str]:
        store = MemoryStore(name)
        told = []
        for step in range(50):
            one = await abort_step(store, StepId(1, step), f"writer {writer}")
            told.append(one.why)
        return told

    async def main() -> None:
        answers = await asyncio.gather(
            *(asyncio.to_thread(asyncio.run, ask(writer)) for writer in range(8))
        )
        assert all(one == other for one, other in itertools.pairwise(answers))

    asyncio.run(main())
