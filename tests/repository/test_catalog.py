"""The catalog tells what a store holds, whatever else lies in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from ckptmgr.errors import DamageError, MissingObjectError, ObjectNotFoundError, RecordDamagedError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import (
    Catalog,
    Retired,
    is_retired,
    list_steps,
    standing_steps,
)
from ckptmgr.repository.commit import put_record
from ckptmgr.repository.manifest import seal_manifest
from ckptmgr.repository.record import Kind, seal
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import StepId, StepState
from small_step import made_in_memory, memory_store, save_every_kind, shelf_of

SAVED, OBJECTS = made_in_memory(save_every_kind)
S10, S20, S25, S30 = (StepId(1, step) for step in (10, 20, 25, 30))


def on_copy(test: Callable[[MemoryStore, Catalog], Awaitable[None]]) -> Callable[[], None]:
    """Run a coroutine on a copy of the store."""

    def run() -> None:
        store = memory_store(OBJECTS)
        asyncio.run(test(store, Catalog(store)))  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


@on_copy
async def test_states_of_all_steps(store: MemoryStore, catalog: Catalog) -> None:
    shelf_of(store)[keys.manifest(StepId(2, 5), 0)] = bytearray(b"x")
    entries = await catalog.entries()
    assert [(entry.id, entry.state) for entry in entries] == [
        (StepId(2, 5), StepState.UNDECIDED),
        (S30, StepState.VERIFIED),
        (S25, StepState.ABORTED),
        (S20, StepState.COMMITTED),
        (S10, StepState.RETIRED),
    ]
    assert [len(entry.ranks) for entry in entries] == [1, 1, 0, 1, 0]
    assert entries[3].holds == ("test",)
    assert entries[3].decision == SAVED[0].decision
    assert not any(entry.damage for entry in entries)
    assert await catalog.latest() == S30
    assert [one.id async for one in catalog.committed()] == [S30, S20]
    assert await standing_steps(store) == [S30, S25, S20]


@on_copy
async def test_of_retired_steps_the_newest_are_told(store: MemoryStore, catalog: Catalog) -> None:
    for step in range(1, 8):
        await put_record(store, Kind.RETIRED, keys.retired(StepId(1, step)), Retired(1, step, ""))
    all_of_them = [entry.id for entry in await catalog.entries()]
    assert all_of_them == [S30, S25, S20, S10, *(StepId(1, step) for step in range(7, 0, -1))]
    some = [entry.id for entry in await catalog.entries(retired_max=3)]
    assert some == [S30, S25, S20, S10, StepId(1, 7), StepId(1, 6)]
    assert [entry.id for entry in await catalog.entries(retired_max=0)] == [S30, S25, S20]
    old = await catalog.entry(None, 2)
    assert old is not None
    assert (old.id, old.state) == (StepId(1, 2), StepState.RETIRED)
    assert await catalog.entry(2, 2) is None


@on_copy
async def test_an_empty_store(store: MemoryStore, catalog: Catalog) -> None:
    shelf_of(store).clear()
    assert await catalog.entries() == []
    assert await catalog.latest() is None
    assert (await list_steps(store)).standing() == []


@on_copy
async def test_a_damaged_register_is_an_entry_with_its_damage(
    store: MemoryStore, catalog: Catalog
) -> None:
    newer = keys.commit(S20)
    shelf_of(store)[keys.commit(S30)][80] ^= 1
    shelf_of(store)[newer] = bytearray(_of_version_2(newer))
    by_id = {entry.id: entry for entry in await catalog.entries()}
    assert "digest" in by_id[S30].damage
    assert "version" in by_id[S20].damage
    assert by_id[S30].decision is None
    with pytest.raises(RecordDamagedError):
        await catalog.latest()


def _of_version_2(key: str) -> bytes:
    from ckptmgr.repository.record import _HEAD, MAGIC, _digest

    head = _HEAD.pack(MAGIC, Kind.COMMIT, 2, 0, 0, 2, 2)
    return head + _digest(head, key, b"{}") + b"{}"


@on_copy
async def test_a_register_is_believed_of_its_own_step_only(
    store: MemoryStore, catalog: Catalog
) -> None:
    key = keys.commit(StepId(1, 40))
    shelf_of(store)[key] = bytearray(seal(Kind.COMMIT, key, SAVED[1].decision))
    with pytest.raises(RecordDamagedError, match="decides another step"):
        await catalog.decision(StepId(1, 40))
    with pytest.raises(ObjectNotFoundError):
        await catalog.decision(StepId(1, 50))


@on_copy
async def test_manifests_are_those_that_were_committed(
    store: MemoryStore, catalog: Catalog
) -> None:
    decision = SAVED[1].decision
    (sealed,) = await catalog.manifests(decision)
    assert sealed.digest.hex() == decision.manifests[0]

    key = keys.manifest(S30, 0)
    other = msgspec.structs.replace(sealed.manifest, host="another")
    shelf_of(store)[key] = bytearray(seal_manifest(other).record)
    with pytest.raises(RecordDamagedError, match="not the manifest that was committed"):
        await catalog.manifests(decision)
    del shelf_of(store)[key]
    with pytest.raises(MissingObjectError, match="is gone"):
        await catalog.manifests(decision)


@on_copy
async def test_stray_keys_mark_nothing(store: MemoryStore, catalog: Catalog) -> None:
    for key in (
        "retired/00000001/000000000030/x",
        "verified/00000001/000000000020/x",
        "commit/00000001/000000000040/x",
        "commit/1/2",
        "commit/x",
        "retired/00000001",
        "tags/00000001/000000000030",
        "unknown/00000001/000000000030",
    ):
        shelf_of(store)[key] = bytearray(b"x")
    listing = await list_steps(store)
    assert listing.standing() == [S30, S25, S20]
    assert listing.verified == {S30}
    assert await catalog.latest() == S30


@on_copy
async def test_a_mark_that_was_copied_or_damaged_hides_no_step(
    store: MemoryStore, catalog: Catalog
) -> None:
    shelf_of(store)[keys.retired(S30)] = shelf_of(store)[keys.retired(S10)]
    shelf_of(store)[keys.retired(S20)] = bytearray(b"")
    assert await standing_steps(store) == [S30, S25, S20]
    assert await catalog.latest() == S30
    assert await is_retired(store, S10)
    assert not await is_retired(store, S30)
    assert not await is_retired(store, S25)
    del shelf_of(store)[keys.retired(S30)]
    await put_record(store, Kind.RETIRED, keys.retired(S30), Retired(1, 30, "really"))
    assert await standing_steps(store) == [S25, S20]


def test_keys_and_steps() -> None:
    step = StepId(12, 3456)
    for key in (
        keys.commit(step),
        keys.retired(step),
        keys.verified(step),
        keys.hold(step, "x"),
        keys.manifest(step, 7),
        keys.new_pack(step, 7),
    ):
        assert keys.parse_step(key) == step
        assert keys.parse_attempt(key) is None
    for key in (keys.claim(12), keys.active(12), keys.have(12, "h"), keys.resume(12, 0)):
        assert keys.parse_attempt(key) == 12
        assert keys.parse_step(key) is None
    assert keys.new_pack(step, 0) != keys.new_pack(step, 0)
    assert issubclass(MissingObjectError, DamageError)
