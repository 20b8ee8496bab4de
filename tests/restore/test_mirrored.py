"""When a mirror is read, and when it is not: a job that was there before has steps of the same
names.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import pytest

from ckptmgr.errors import DamageError, StoreUnreachableError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog, standing_steps
from ckptmgr.repository.commit import same_job
from ckptmgr.repository.hold import held_step
from ckptmgr.store import mirrored
from ckptmgr.store.base import Buffers, PutResult
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.mirrored import MirroredStore, Terms
from small_step import Objects, SavedStep, made_in_memory, memory_store, shelf_of

Made = tuple[list[SavedStep], Objects]


class Mute(MemoryStore):
    """Copies of `objects`; what begins with one of `mute` gets no answer, listed, put or read."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        super().__init__(secrets.token_hex(8))
        shelf_of(self).update({key: bytearray(blob) for key, blob in objects.items()})
        self.mute: tuple[str, ...] = ()

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        self._hear(key)
        return await super().get(key, offset, length, into)

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        self._hear(key)
        return await super().put_new(key, buffers)

    async def list(self, prefix: str) -> list[str]:
        self._hear(prefix)
        return await super().list(prefix)

    def _hear(self, key: str) -> None:
        if key.startswith(self.mute):
            raise StoreUnreachableError("does not answer", subject=key)


@pytest.fixture(scope="module")
def ours() -> Made:
    return made_in_memory()


@pytest.fixture(scope="module")
def other() -> Made:
    """The same steps of a job that was begun anew under the same URL."""
    return made_in_memory()


class Told:
    """What is told of the reading of a mirror."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.refusals = 0

    def terms(self) -> Terms:
        return Terms(keys.FORMAT, same_job, lambda key, _: self.reads.append(key), self.refuse)

    def refuse(self) -> None:
        self.refusals += 1


async def test_a_listing_without_an_answer_is_given_by_a_copy_alone(
    ours: Made, other: Made
) -> None:
    for objects, refusals in ((ours[1], 0), (other[1], 1)):
        first, told = Mute(ours[1]), Told()
        store = MirroredStore(first, memory_store(objects), told.terms())
        assert await standing_steps(store)
        first.mute = ("commit/",)
        if refusals:
            for _ in range(2):
                with pytest.raises(StoreUnreachableError):
                    await standing_steps(store)
            first.mute = ()
        assert await standing_steps(store) == [saved.id for saved in reversed(ours[0])]
        assert (told.refusals, bool(told.reads)) == (refusals, not refusals)


async def test_a_first_store_that_never_answers_contradicts_nothing(other: Made) -> None:
    first, told = Mute({}), Told()
    first.mute = ("",)
    store = MirroredStore(first, memory_store(other[1]), told.terms())
    assert await Catalog(store).latest() == other[0][-1].id
    assert told.refusals == 0


async def test_what_was_served_unproven_is_refused_as_soon_as_the_first_store_answers(
    other: Made, ours: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes of a manifest say only that it is the one of that register."""
    monkeypatch.setattr(mirrored, "AGAIN_SECONDS", 0.0)
    first, told = Mute(ours[1]), Told()
    first.mute = ("",)
    catalog = Catalog(MirroredStore(first, memory_store(other[1]), told.terms()))
    decision = await catalog.decision(other[0][-1].id)
    assert decision == other[0][-1].decision
    first.mute = ()
    with pytest.raises(DamageError):
        await catalog.manifest(decision, 0)
    assert told.refusals == 1


async def test_a_place_that_is_no_store_any_more_contradicts_by_its_claims_alone(
    ours: Made, other: Made
) -> None:
    for kept, latest in (("", other[0][-1].id), ("attempts/", None)):
        left = {key: blob for key, blob in ours[1].items() if kept and key.startswith(kept)}
        store = MirroredStore(memory_store(left), memory_store(other[1]), Told().terms())
        assert await Catalog(store).latest() == latest


async def test_a_damaged_register_is_read_from_a_copy_alone(ours: Made, other: Made) -> None:
    newest = ours[0][-1]
    damaged = dict(ours[1])
    damaged[keys.commit(newest.id)] = damaged[keys.commit(newest.id)][:-1] + b"\0"
    for objects, copy in ((ours[1], True), (other[1], False)):
        told = Told()
        store = MirroredStore(memory_store(damaged), memory_store(objects), told.terms())
        if copy:
            assert await Catalog(store).decision(newest.id) == newest.decision
        else:
            with pytest.raises(DamageError):
                await Catalog(store).decision(newest.id)
        assert (bool(told.reads), told.refusals) == (copy, int(not copy))


async def test_a_register_is_not_believed_where_no_claim_tells_whose_it_is(ours: Made) -> None:
    """A register has no hash that anything else knows."""
    newest = ours[0][-1]
    first = memory_store(ours[1])
    del shelf_of(first)[keys.commit(newest.id)]
    copy = Mute(ours[1])
    copy.mute = ("attempts/",)
    store = MirroredStore(first, copy, Told().terms())
    with pytest.raises(DamageError):
        await Catalog(store).decision(newest.id)
    copy.mute = ()
    assert await Catalog(store).decision(newest.id) == newest.decision


async def test_a_hold_is_released_where_it_was_put(
    ours: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left there, it would keep its step for as long as the process that put it lives."""
    step = ours[0][-1].id
    for before, amid in (((), ("commit/",)), (("holds/",), ())):
        first, copy = Mute(ours[1]), memory_store(ours[1])
        store = MirroredStore(first, copy, Told().terms())
        monkeypatch.setattr(mirrored, "AGAIN_SECONDS", 0.0 if before else 30.0)
        first.mute = before
        async with held_step(store, step):
            held = [key for one in (first, copy) for key in shelf_of(one) if "holds/" in key]
            assert len(held) == 1
            first.mute = amid
            assert await standing_steps(store)
        assert not [key for one in (first, copy) for key in shelf_of(one) if "holds/" in key]
