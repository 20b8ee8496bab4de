"""Verify names the object, the offset and what is wrong, and tells damage from silence."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.errors import StoreUnreachableError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import Retired, put_record
from ckptmgr.repository.manifest import read_manifest
from ckptmgr.repository.pack import padded
from ckptmgr.repository.record import Kind
from ckptmgr.restore.check import not_committed, verify_store
from ckptmgr.restore.records import expected
from ckptmgr.restore.verify import verify_step
from ckptmgr.store.base import Store
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import PAGE_BYTES, StepId
from small_step import made_in_memory, memory_store, save_every_kind, save_steps, shelf_of

SAVED, OBJECTS = made_in_memory(save_steps)
NEWEST = SAVED[-1]
PACK = next(key for key in OBJECTS if key.startswith(keys.packs(NEWEST.id)))
MANIFEST = read_manifest(NEWEST.id, 0, OBJECTS[keys.manifest(NEWEST.id, 0)]).manifest


async def reports_of(store: Store, **options: Any) -> list[dict[str, Any]]:
    step, every, quick = (options.get(name) for name in ("step", "every", "quick"))
    return await verify_store(
        Catalog(store), step, every=bool(every), quick=bool(quick), progress=lambda _: None
    )


def damage_of(objects: dict[str, bytes], **options: Any) -> list[tuple[str, int, str]]:
    reports = asyncio.run(reports_of(memory_store(objects), **options))
    return [(d["key"], d["offset"], d["what"]) for report in reports for d in report["damage"]]


def changed(key: str, at: int) -> dict[str, bytes]:
    blob = bytearray(OBJECTS[key])
    blob[at] ^= 1 << random.randrange(8)
    return {**OBJECTS, key: bytes(blob)}


def test_what_holds_has_no_damage() -> None:
    assert damage_of(OBJECTS) == damage_of(OBJECTS, every=True) == []
    assert damage_of(OBJECTS, quick=True, every=True) == []


def test_a_chunk_is_named_by_its_offset_in_the_pack() -> None:
    for chunk in MANIFEST.chunks:
        inside = chunk.pack_offset + random.randrange(chunk.stored_bytes)
        ((key, offset, what),) = damage_of(changed(PACK, inside))
        assert (key, offset) == (PACK, chunk.pack_offset)
        assert "hash" in what


def test_padding_and_header_are_looked_at() -> None:
    for chunk in MANIFEST.chunks:
        end = chunk.pack_offset + padded(chunk.stored_bytes)
        if end > chunk.pack_offset + chunk.stored_bytes:
            ((key, offset, what),) = damage_of(changed(PACK, end - 1))
            assert (key, offset, "padding" in what) == (PACK, chunk.pack_offset, True)
    for at in (0, 40, 70, PAGE_BYTES - 1):
        assert {(key, offset) for key, offset, _ in damage_of(changed(PACK, at))} == {(PACK, 0)}


def test_two_damages_are_two() -> None:
    objects = dict(OBJECTS)
    blob = bytearray(objects[PACK])
    for chunk in MANIFEST.chunks[:2]:
        blob[chunk.pack_offset] ^= 1
    objects[PACK] = bytes(blob)
    offsets = [offset for _, offset, _ in damage_of(objects)]
    assert offsets == [chunk.pack_offset for chunk in MANIFEST.chunks[:2]]


def test_quick_looks_at_lengths_and_records_only() -> None:
    assert damage_of(changed(PACK, 5000), quick=True) == []
    assert damage_of({**OBJECTS, PACK: OBJECTS[PACK][:-1]}, quick=True)
    assert damage_of({**OBJECTS, PACK: OBJECTS[PACK] + b"x"}, quick=True)
    assert damage_of({k: v for k, v in OBJECTS.items() if k != PACK}, quick=True)
    assert damage_of(changed(keys.manifest(NEWEST.id, 0), 70), quick=True)


def test_one_step_all_steps_or_the_newest() -> None:
    older = SAVED[0].id
    damaged = changed(keys.manifest(older, 0), 100)
    assert damage_of(damaged) == []
    for options in ({"every": True}, {"step": "10"}, {"step": "1.10"}):
        ((key, offset, _),) = damage_of(damaged, **options)
        assert (key, offset) == (keys.manifest(older, 0), 0)
    steps = [r["id"] for r in asyncio.run(reports_of(memory_store(OBJECTS), every=True))]
    assert steps == ["1.20", "1.10"]
    assert asyncio.run(reports_of(memory_store(OBJECTS), step="99")) == []


@pytest.mark.parametrize("every", [False, True])
def test_a_store_that_does_not_answer_is_no_damage(every: bool) -> None:
    counting = FaultyStore(memory_store(OBJECTS))
    asyncio.run(reports_of(counting, every=every))
    for at in range(1, len(counting.operations) + 1):
        store = FaultyStore(memory_store(OBJECTS), [Fault(StoreUnreachableError("no"), at=at)])
        with pytest.raises(StoreUnreachableError):
            asyncio.run(reports_of(store, every=every))


def test_a_step_that_retention_takes_away_meanwhile_is_no_damage() -> None:
    """The listing still has it, its manifest is gone, and by now there is a mark that says why."""

    async def main() -> None:
        inner = memory_store(OBJECTS)
        gate = asyncio.Event()
        older = SAVED[0].id
        first_read = Fault(operation="get", key=keys.manifest(older, 0), gate=gate)
        store = FaultyStore(inner, [first_read])
        looking = asyncio.create_task(reports_of(store, every=True))
        while ("get", keys.manifest(older, 0)) not in store.operations:
            await asyncio.sleep(0)
        await put_record(inner, Kind.RETIRED, keys.retired(older), Retired(1, 10))
        for key in [key for key in shelf_of(inner) if keys.parse_step(key) == older]:
            if key.startswith(("data/", "man/")):
                del shelf_of(inner)[key]
        gate.set()
        reports = await looking
        assert [(r["id"], r["damage"]) for r in reports] == [("1.20", [])]

    asyncio.run(main())


def test_progress_counts_what_was_read() -> None:
    async def main() -> None:
        told: list[int] = []
        catalog = Catalog(memory_store(OBJECTS))
        pool = BufferPool(BUDGET_BYTES)
        assert await verify_step(catalog, NEWEST.decision, pool, progress=told.append) == []
        assert sum(told) == len(OBJECTS[PACK])

    asyncio.run(main())


# -- what must be there ---------------------------------------------------------------------------


def test_nothing_is_missed_in_a_whole_store() -> None:
    _, objects = made_in_memory(save_every_kind)
    assert expected(objects, [StepId(1, 10), StepId(1, 20), StepId(0, 0)]) <= set(objects)
    assert expected([], []) == set()


def test_causes_are_missed_where_their_effects_are() -> None:
    man, data = keys.manifest(StepId(4, 1), 0), keys.new_pack(StepId(4, 1), 0)
    assert expected([data], []) == {keys.claim(4)}
    assert expected([man], []) == {keys.claim(4), keys.active(4)}
    newer = [man, keys.active(5)]
    assert expected(newer, []) == {keys.claim(4), keys.claim(5)}, "an older attempt may be silent"
    assert keys.commit(StepId(2, 7)) in expected([], [StepId(2, 7)])
    for mark in (keys.retired, keys.verified, lambda step: keys.hold(step, "x")):
        assert keys.commit(StepId(4, 1)) in expected([mark(StepId(4, 1))], [])
    assert expected([keys.commit(StepId(4, 1))], []) == {keys.claim(4)}, "an ABORT needs no more"


def test_newer_steps_without_a_register() -> None:
    man = [keys.manifest(StepId(1, step), 0) for step in (10, 20, 30)]
    assert not_committed([]) == []
    assert not_committed(man) == [StepId(1, 30), StepId(1, 20), StepId(1, 10)]
    assert not_committed([*man, keys.commit(StepId(1, 20))]) == [StepId(1, 30)]
    assert not_committed([*man, keys.commit(StepId(2, 5))]) == []
