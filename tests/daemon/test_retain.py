"""Retention gives up what it may and nothing else: decided purely, carried out on real stores."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon import retain
from ckptmgr.daemon.readback import ReadBack
from ckptmgr.daemon.resume import claim_attempt
from ckptmgr.daemon.retain import NEWER_MIN, collect, garbage, mark_verified, victims
from ckptmgr.errors import DamageError, StoreUnreachableError
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog, Listing, Verified, list_steps
from ckptmgr.repository.commit import abort_step, put_record
from ckptmgr.repository.hold import held_step, host_name, place_of_pids, put_hold
from ckptmgr.repository.pack import pack_header
from ckptmgr.repository.record import Kind
from ckptmgr.restore.check import verify_store
from ckptmgr.staging.bufferfile import SLOTS_MAX
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import StepId
from small_step import memory_store, save_step, save_steps, shelf_of, small_state, write_tree

steps_of = st.frozensets(st.builds(StepId, st.integers(1, 4), st.integers(0, 30)), max_size=12).map(
    list
)


# -- what: pure -----------------------------------------------------------------------------------


@given(commits=steps_of, data=st.data(), keep=st.integers(-3, 8))
def test_victims_leave_what_must_stand(
    commits: list[StepId], data: st.DataObject, keep: int
) -> None:
    held = frozenset(data.draw(st.lists(st.sampled_from(commits or [StepId(1, 1)]))))
    random.shuffle(commits)
    chosen = victims(commits, held, keep)
    stand = set(commits) - set(chosen)
    assert len(stand) >= min(len(commits), max(keep, NEWER_MIN)), "fewer stand than must"
    assert set(chosen) <= set(commits) - held, "a held step was chosen"
    assert chosen == sorted(set(chosen)), "not oldest first"
    for step in chosen:
        assert sum(other > step for other in stand) >= NEWER_MIN
    newest_first = sorted(commits, reverse=True)
    assert set(newest_first[: max(keep, NEWER_MIN)]) <= stand
    assert set(newest_first[max(keep, NEWER_MIN) :]) <= set(chosen) | held, "more stand than need"


@given(decided=steps_of, with_manifest=steps_of, stored=steps_of, commits=steps_of)
def test_garbage_is_undecided_and_in_nobodys_memory(
    decided: list[StepId],
    with_manifest: list[StepId],
    stored: list[StepId],
    commits: list[StepId],
) -> None:
    listing = Listing(
        frozenset(decided), frozenset(), frozenset(), {}, dict.fromkeys(with_manifest, 1)
    )
    newest = max(commits, default=None)
    found = garbage(listing, frozenset(stored), set(commits))
    assert found == sorted(set(found))
    for step in found:
        assert newest is not None
        after = {one for one in decided if one.attempt == step.attempt and one > step}
        assert step < newest
        assert step.attempt < newest.attempt or len(after) > SLOTS_MAX
        assert step not in decided
        assert step in stored or step in with_manifest
    if newest is None:
        assert not found


# -- how: on stores -------------------------------------------------------------------------------

Make = Callable[[dict[str, bytes]], Store]


@pytest.fixture(params=["memory", "local"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Give a store of either kind that holds the given objects."""

    def made(objects: dict[str, bytes]) -> Store:
        if request.param == "memory":
            return memory_store(objects)
        root = tmp_path / secrets.token_hex(4)
        write_tree(root, objects)
        return LocalStore(str(root))

    return made


def run(test: Awaitable[None]) -> None:
    asyncio.run(test)  # type: ignore[arg-type]


async def gather(store: Store, keep: int = 2, **options: Any) -> list[tuple[str, str]]:
    done = await collect(Catalog(store), BufferPool(BUDGET_BYTES), keep, **options)
    return [(str(one.step), one.action) for one in done]


async def data_of(store: Store) -> set[str]:
    found = {
        keys.parse_step(key) for key in [*await store.list("data/"), *await store.list("man/")]
    }
    return {str(step) for step in found}


async def damage_in(store: Store) -> list[object]:
    reports = await verify_store(
        Catalog(store), None, every=True, quick=False, progress=lambda _: None
    )
    return [damage for report in reports for damage in report["damage"]]


def test_old_steps_go_and_the_newest_two_stay(make: Make) -> None:
    async def main() -> None:
        store = make({})
        saved = await save_steps(store, (10, 20, 30, 40))
        before = await store.list("")
        planned = await gather(store, keep=1, dry_run=True)
        assert await store.list("") == before, "a dry run changed something"
        retired = [("1.10", "retire"), ("1.20", "retire")]
        assert planned == [("1.30", "keep"), ("1.40", "keep"), *retired]
        assert await gather(store, keep=1) == retired
        assert await data_of(store) == {"1.30", "1.40"}
        listing = await list_steps(store)
        assert listing.standing() == [one.id for one in reversed(saved[2:])]
        assert listing.verified & {saved[2].id, saved[3].id}, "nothing was verified"
        assert await gather(store, keep=1) == []
        assert await damage_in(store) == []
        await store.aclose()

    run(main())


def test_held_and_protected_steps_stay(make: Make) -> None:
    async def main() -> None:
        store = make({})
        saved = await save_steps(store, (10, 20, 30, 40, 50))
        await put_hold(store, saved[0].id, "person", "")
        async with held_step(store, saved[1].id):
            assert await gather(store, protected=frozenset({saved[2].id})) == []
        assert await gather(store) == [("1.20", "retire"), ("1.30", "retire")]
        assert await data_of(store) == {"1.10", "1.40", "1.50"}
        await store.aclose()

    run(main())


def test_a_hold_that_comes_between_the_look_and_the_mark_saves_the_data() -> None:
    """A reader's hold is put after the listing and before `retired`: one must see the other."""

    async def main() -> None:
        inner = memory_store({})
        saved = await save_steps(inner, (10, 20, 30))
        gate = asyncio.Event()
        store = FaultyStore(inner, [Fault(operation="put_new", key="retired/", gate=gate)])
        collecting = asyncio.create_task(gather(store))
        while ("put_new", keys.retired(saved[0].id)) not in store.operations:
            await asyncio.sleep(0)
        await put_hold(inner, saved[0].id, "reader", "")
        gate.set()
        await collecting
        assert "1.10" in await data_of(inner), "data went while it was being read"
        with pytest.raises(DamageError):
            await put_hold(inner, saved[0].id, "late", "")

    run(main())


@pytest.mark.parametrize(("whole", "asked"), [(True, "list"), (False, "get")])
def test_a_half_deleted_step_that_is_held_by_now_is_not_swept(whole: bool, asked: Any) -> None:
    """A sweep looks at the holds after it knows of the mark, not before."""

    async def main() -> None:
        inner = memory_store({})
        saved = await save_steps(inner, (10, 20, 30))
        gate = asyncio.Event()
        late = Fault(operation=asked, key="retired/", gate=gate)
        store = FaultyStore(inner, [late])
        collecting = asyncio.create_task(gather(store, whole=whole))
        while not any((name, key[:8]) == (asked, "retired/") for name, key in store.operations):
            await asyncio.sleep(0)
        await put_hold(inner, saved[0].id, "reader", "")  # behind the listing of the holds
        assert not await retain.retire(inner, saved[0].id, "by another daemon")
        gate.set()
        await collecting
        assert "1.10" in await data_of(inner), "the sweep took what somebody reads"
        await inner.delete(keys.hold(saved[0].id, "reader"))
        assert await gather(inner) == [("1.10", "delete")]
        assert "1.10" not in await data_of(inner)

    run(main())


def test_nothing_goes_when_no_newer_step_can_be_read_back(make: Make) -> None:
    async def main() -> None:
        store = make({})
        saved = await save_steps(store, (10, 20, 30))
        for one in saved[1:]:
            (pack,) = await store.list(keys.packs(one.id))
            blob = bytearray(await store.get(pack))
            blob[5000] ^= 1
            await store.delete(pack)
            await store.put_new(pack, [memoryview(blob)])
        assert await gather(store) == []
        assert "1.10" in await data_of(store)
        await store.aclose()

    run(main())


def test_a_mark_of_verification_counts_for_its_own_register_only() -> None:
    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30))
        await mark_verified(store, saved[0].id)
        shelf = shelf_of(store)
        for one in saved[1:]:
            shelf[keys.verified(one.id)] = shelf[keys.verified(saved[0].id)]
            (pack,) = await store.list(keys.packs(one.id))
            shelf[pack][5000] ^= 1
        assert await gather(store) == [], "a copied mark was believed"
        assert "1.10" in await data_of(store)

    run(main())


def test_a_mark_of_verification_of_another_register_is_not_believed() -> None:
    """The mark itself holds; the register that was read back then is not the one there now."""

    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30))
        for one in saved[1:]:
            mark = Verified(one.id.attempt, one.id.step, "00" * 32)
            await put_record(store, Kind.VERIFIED, keys.verified(one.id), mark)
            (pack,) = await store.list(keys.packs(one.id))
            shelf_of(store)[pack][5000] ^= 1
        assert await gather(store) == []
        assert "1.10" in await data_of(store)

    run(main())


def test_a_mark_of_verification_that_does_not_hold_is_put_again() -> None:
    """Else each collection reads the newest step back again."""

    async def main() -> None:
        store = FaultyStore(memory_store({}))
        saved = await save_steps(store, (10, 20, 30, 40))
        await put_hold(store, saved[1].id, "person", "")
        key = keys.verified(saved[3].id)
        await store.put_new(key, [memoryview(b"rubbish")])
        assert await gather(store) == [("1.10", "retire")]
        await store.delete(keys.hold(saved[1].id, "person"))
        start = len(store.operations)
        assert await gather(store) == [("1.20", "retire")]
        read = [key for name, key in store.operations[start:] if name == "get"]
        assert not [key for key in read if key.startswith("data/")], "it was read back again"
        assert await damage_in(store) == []

    run(main())


def test_what_takes_the_place_of_a_retired_step_is_made_durable_first() -> None:
    """Visible is not durable: a power cut must not take the new step after the old one went."""

    async def main() -> None:
        store = FaultyStore(memory_store({}))
        saved = await save_steps(store, (10, 20, 30))
        start = len(store.operations)
        await gather(store)
        done = store.operations[start:]
        marked = done.index(("put_new", keys.retired(saved[0].id)))
        for one in saved[1:]:
            assert ("make_durable", keys.commit(one.id)) in done[:marked]
        first_deleted = min(done.index(one) for one in done if one[0] == "delete")
        assert marked < done.index(("make_durable", keys.retired(saved[0].id))) < first_deleted
        assert ("list", keys.holds(saved[0].id)) in done[marked:first_deleted]

    run(main())


def test_leftovers_are_aborted_first_and_deleted_then(make: Make) -> None:
    async def main() -> None:
        store = make({})
        _, old = await claim_attempt(store, 1, "")
        await save_steps(store, (10, 30))
        attempt, nonce = await claim_attempt(store, 1, "")
        cut_short, in_flight = StepId(1, 20), StepId(attempt, 40)
        for step in (cut_short, in_flight):
            key = keys.new_pack(step, 0)
            await store.put_new(key, [memoryview(pack_header(key, step, 0, nonce))])
        given_up = StepId(1, 25)
        key = keys.new_pack(given_up, 0)
        await store.put_new(key, [memoryview(pack_header(key, given_up, 0, nonce))])
        await abort_step(store, given_up, "test")
        assert await gather(store) == [("1.20", "abort"), ("1.25", "delete")]
        assert await data_of(store) == {"2.10", "2.30", "3.40"}, "a step in flight was touched"
        assert not (await Catalog(store).decision(cut_short)).committed
        late = await save_step(store, 1, old, 20, small_state(20))
        assert not late.decision.committed, "an aborted step was committed after all"
        await store.aclose()

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_rank_may_still_hold_is_left_alone(make: Make, whole: bool) -> None:
    """An undecided step of the running attempt, until every slot must hold a newer one."""

    async def main() -> None:
        store = make({})
        saved = await save_steps(store, (20, 30, 40))
        late = StepId(1, 10)
        key = keys.new_pack(late, 0)
        await store.put_new(key, [memoryview(pack_header(key, late, 0, "00" * 16))])
        assert ("1.10", "abort") not in await gather(store, whole=whole)
        await save_step(store, 1, saved[0].decision.nonce, 50, small_state(50))
        assert ("1.10", "abort") in await gather(store, whole=whole)
        await store.aclose()

    run(main())


def test_a_damaged_register_keeps_its_data(make: Make) -> None:
    async def main() -> None:
        store = make({})
        saved = await save_steps(store, (10, 20, 30, 40))
        key = keys.commit(saved[0].id)
        await store.delete(key)
        await store.put_new(key, [memoryview(b"rubbish")])
        assert await gather(store) == [("1.20", "retire")]
        assert "1.10" in await data_of(store)
        await store.aclose()

    run(main())


def test_a_copied_mark_of_retirement_costs_no_data() -> None:
    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30, 40))
        await gather(store)
        shelf = shelf_of(store)
        shelf[keys.retired(saved[3].id)] = shelf[keys.retired(saved[0].id)]
        await gather(store)
        assert "1.40" in await data_of(store)

    run(main())


def test_holds_of_dead_readers_are_dropped() -> None:
    async def main() -> None:
        store = memory_store({})
        saved = await save_steps(store, (10, 20, 30))
        dead = f"reader.{host_name()}.{place_of_pids()}.4194999.0123456789abcdef"
        await put_hold(store, saved[0].id, dead, "killed")
        assert await gather(store) == [("1.10", "retire")]
        assert await store.list("holds/") == []

    run(main())


def test_a_hold_that_could_not_be_released_is_released_by_the_next_collection() -> None:
    async def main() -> None:
        store = FaultyStore(memory_store({}))
        saved = await save_steps(store, (10, 20, 30))
        store.plan([Fault(StoreUnreachableError("no"), operation="delete", key="holds/")])
        async with held_step(store, saved[0].id):
            assert await gather(store) == []
        assert len(await store.list("holds/")) == 1
        assert await gather(store) == [("1.10", "retire")]
        assert await store.list("holds/") == []

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_a_collection_that_fails_anywhere_is_finished_by_the_next(whole: bool) -> None:
    async def main() -> None:
        clean = memory_store({})
        await save_steps(clean, (10, 20, 30, 40))
        objects = {key: bytes(blob) for key, blob in shelf_of(clean).items()}
        counting = FaultyStore(memory_store(objects))
        await gather(counting, whole=whole)
        count = len(counting.operations)
        expected = await data_of(counting)
        for at in range(1, count + 1):
            store = FaultyStore(
                memory_store(objects), [Fault(StoreUnreachableError("no"), at=at, and_later=True)]
            )
            with pytest.raises(StoreUnreachableError):
                await gather(store, whole=whole)
            store.plan(())
            assert await damage_in(store) == [], f"damage after a failure at {at}"
            await gather(store, whole=whole)
            assert await data_of(store) == expected
            assert await damage_in(store) == []

    run(main())


def test_a_collection_tells_what_it_leaves_in_bytes() -> None:
    async def main() -> None:
        store, metrics = memory_store({}), Metrics()
        saved = await save_steps(store, (10, 20, 30, 40))
        await put_hold(store, saved[0].id, "person", "")
        done = await gather(store, readback=ReadBack("ab", metrics))
        assert done == [("1.20", "retire")]

        def told(name: str, **labels: str) -> float | None:
            return metrics.registry.get_sample_value(f"ckptmgr_{name}", {"job": "ab", **labels})

        held, _, older, newest = (one.decision.stored_bytes for one in saved)
        assert told("store_bytes", state="verified") == newest, "it stands in for the retired one"
        assert told("store_bytes", state="committed") == held + older
        assert told("pinned_bytes") == held
        metrics.close_job("ab")
        assert told("store_bytes", state="verified") is None

    run(main())
