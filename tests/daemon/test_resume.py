"""Claims and resume decisions: one winner in every race, and the newest step first."""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.daemon.resume import (
    ActiveMarks,
    Standing,
    Standings,
    candidates,
    claim_attempt,
    decide_resume,
    newest_active,
    parent_of,
    publish_have,
    put_active,
    standing_of,
    usable_in_memory,
)
from ckptmgr.errors import RegisterConflictError, StoreUnreachableError, UsageError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import (
    FROM_SCRATCH,
    Active,
    Claim,
    Decision,
    Have,
    abort_step,
    check_format,
    decide,
    get_record,
    put_record,
)
from ckptmgr.repository.hold import host_name
from ckptmgr.repository.line import resumed_from
from ckptmgr.repository.record import Kind
from ckptmgr.store.base import Store
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.registry import open_store
from ckptmgr.testing import Fault, FaultyStore
from ckptmgr.types import ATTEMPT_MAX, Outcome, Snapshot, StepId

STEPS = st.builds(StepId, st.integers(1, 4), st.integers(0, 6))


def memory_store() -> MemoryStore:
    return MemoryStore(secrets.token_hex(8))


def snapshot(attempt: int, step: int, nonce: str = "00" * 16) -> Snapshot:
    return Snapshot(0, 1, attempt, nonce, 0, 1, step, 0, 0, 0, 0.0, 0.0)


# ---- pure -------------------------------------------------------------------


@given(st.lists(STEPS), st.lists(STEPS), st.frozensets(STEPS))
def test_candidates_are_all_that_is_there_newest_attempt_first(
    memory: list[StepId], standing: list[StepId], rejected: frozenset[StepId]
) -> None:
    found = candidates(standing, memory, rejected, None, None)
    assert found == sorted(set(found), reverse=True)
    assert set(found) == (set(memory) | set(standing)) - rejected
    for step in found:
        of_number = candidates(standing, memory, rejected, step.step, None)
        assert of_number == [one for one in found if one.step == step.step]
        assert candidates(standing, memory, rejected, step.step, step.attempt) == [step]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(Outcome))))
def test_memory_is_usable_unless_its_step_was_given_up(pairs: list[tuple[int, Outcome]]) -> None:
    usable = usable_in_memory([(snapshot(1, step), outcome) for step, outcome in pairs])
    assert [s.step for s in usable] == [step for step, o in pairs if o is not Outcome.ABORTED]


# ---- claims -----------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_numbers_of_attempts_end_with_an_error(exclusive: bool) -> None:
    async def main() -> None:
        store = memory_store()
        store.exclusive = exclusive
        await check_format(store, create=True)
        last = ATTEMPT_MAX if exclusive else ATTEMPT_MAX - 5
        claim = Claim(last, "a" * 32, 1, "host", "", 0.0)
        await put_record(store, Kind.CLAIM, keys.claim(last), claim)
        with pytest.raises(UsageError, match=f"no number left after attempt {last}"):
            await claim_attempt(store, 1, "")
        assert await store.list("attempts/") == [keys.claim(last)]

    asyncio.run(main())


def test_a_stray_key_is_no_attempt() -> None:
    async def main() -> None:
        store = memory_store()
        for stray in ("999999999/claim", "9999999/claim", "99999999x/claim", "99999999"):
            await store.put_new(f"attempts/{stray}", [])
        assert (await claim_attempt(store, 1, ""))[0] == 1

    asyncio.run(main())


def test_attempts_are_counted_from_one() -> None:
    async def main() -> None:
        store = memory_store()
        assert [(await claim_attempt(store, 1, ""))[0] for _ in range(3)] == [1, 2, 3]

    asyncio.run(main())


def claim_some(url: str, count: int) -> list[tuple[int, str]]:
    async def main() -> list[tuple[int, str]]:
        store = open_store(url)
        return [await claim_attempt(store, 1, "race") for _ in range(count)]

    return asyncio.run(main())


def test_processes_that_race_for_attempts_get_one_each(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        claims = [c for found in pool.starmap(claim_some, [(url, 10)] * 4) for c in found]
    assert sorted(attempt for attempt, _ in claims) == list(range(1, 41))
    assert len({nonce for _, nonce in claims}) == 40


def test_a_claim_whose_answer_is_lost_is_not_used_by_two() -> None:
    """The put took effect and then failed: whoever asks again gets another attempt."""

    async def main() -> None:
        inner = memory_store()
        lost = StoreUnreachableError("answer lost")
        store = FaultyStore(
            inner, [Fault(lost, operation="put_new", key="attempts/", when="after")]
        )
        with pytest.raises(StoreUnreachableError):
            await claim_attempt(store, 1, "")
        assert (await claim_attempt(store, 1, ""))[0] == 2

    asyncio.run(main())


def test_what_memory_holds_is_published_once() -> None:
    async def main() -> None:
        store = memory_store()
        await publish_have(store, 1, host_name(), [(1, 5, 0), (1, 6, 0)])
        await publish_have(store, 1, host_name(), [])
        (key,) = await store.list("attempts/")
        have = await get_record(store, Kind.HAVE, key, Have)
        assert have.snapshots == ((1, 5, 0), (1, 6, 0))

    asyncio.run(main())


# ---- whose steps ------------------------------------------------------------


def test_a_snapshot_belongs_to_the_store_that_knows_its_claim() -> None:
    async def main() -> None:
        store = memory_store()
        attempt, nonce = await claim_attempt(store, 1, "")
        assert await standing_of(store, snapshot(attempt, 1, nonce)) is Standing.OURS
        assert await standing_of(store, snapshot(attempt, 1, "ff" * 16)) is Standing.OTHER
        assert await standing_of(store, snapshot(attempt + 1, 1, nonce)) is Standing.MISSING

    asyncio.run(main())


def test_a_store_that_can_not_be_read_contradicts_nothing() -> None:
    async def main() -> None:
        store = FaultyStore(memory_store())
        attempt, nonce = await claim_attempt(store, 1, "")
        store.plan([Fault(StoreUnreachableError("gone"), operation="get", and_later=True)])
        assert await standing_of(store, snapshot(attempt, 1, nonce)) is Standing.OURS

    asyncio.run(main())


def test_a_store_that_could_not_be_read_is_asked_again_and_one_that_could_is_not() -> None:
    async def main() -> None:
        store = FaultyStore(memory_store())
        attempt, _ = await claim_attempt(store, 1, "")
        standings, foreign = Standings(), snapshot(attempt, 1, "ff" * 16)
        store.plan([Fault(StoreUnreachableError("gone"), operation="get")])
        assert await standings.of(store, foreign) is Standing.OURS
        assert await standings.of(store, foreign) is Standing.OTHER
        store.plan([Fault(StoreUnreachableError("gone"), operation="get", and_later=True)])
        assert await standings.of(store, foreign) is Standing.OTHER

    asyncio.run(main())


# ---- who is active ----------------------------------------------------------


async def claimed(store: Store, count: int) -> list[str]:
    """Nonces of attempts 1 to `count`."""
    return [(await claim_attempt(store, 1, ""))[1] for _ in range(count)]


async def put_mark(store: Store, attempt: int, nonce: str) -> None:
    await put_record(store, Kind.ACTIVE, keys.active(attempt), Active(attempt, nonce))


def test_an_older_attempt_sees_the_newer_active_one() -> None:
    async def main() -> None:
        store = memory_store()
        one, two, three = await claimed(store, 3)
        assert await newest_active(store, 1, ActiveMarks()) == 0
        assert await put_active(store, 2, two) == 2
        assert await put_active(store, 1, one) == 2
        assert await put_active(store, 3, three) == 3
        assert not [k for k in await store.list("attempts/00000001/") if k.endswith("active")]

    asyncio.run(main())


async def rubbish(store: Store) -> None:
    await claimed(store, 2)
    await store.put_new(keys.active(3), [memoryview(b"rubbish")])


async def copied(store: Store) -> None:
    await claimed(store, 2)
    await put_mark(store, 2, "b" * 32)
    await store.put_new(keys.active(3), [await store.get(keys.active(2))])
    await store.delete(keys.active(2))


async def of_nobody(store: Store) -> None:
    await put_mark(store, 3, "c" * 32)


async def of_another_nonce(store: Store) -> None:
    await claimed(store, 2)
    await put_mark(store, 3, "c" * 32)


async def of_another_attempt(store: Store) -> None:
    nonce = (await claimed(store, 2))[1]
    await put_record(store, Kind.ACTIVE, keys.active(3), Active(4, nonce))


async def of_a_damaged_claim(store: Store) -> None:
    await claimed(store, 1)
    await store.put_new(keys.claim(3), [memoryview(b"rubbish")])
    await put_mark(store, 3, "c" * 32)


async def of_a_host_with_that_name(store: Store) -> None:
    await store.put_new(keys.have(3, "active"), [memoryview(b"any host name is a key")])


@pytest.mark.parametrize(
    "stray",
    [
        rubbish,
        copied,
        of_nobody,
        of_another_nonce,
        of_another_attempt,
        of_a_damaged_claim,
        of_a_host_with_that_name,
    ],
)
def test_a_mark_that_does_not_hold_ends_nobody(
    stray: Callable[[Store], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        store, marks = memory_store(), ActiveMarks()
        (nonce,) = await claimed(store, 1)
        await stray(store)
        for _ in range(3):
            assert await put_active(store, 1, nonce, marks) == 1

    with caplog.at_level("WARNING", logger="ckptmgr"):
        asyncio.run(main())
    told = [record.message for record in caplog.records]
    nothing_to_read = stray in (of_nobody, of_a_host_with_that_name)
    assert told == ([] if nothing_to_read else ["active_ignored"])


def test_below_a_mark_that_does_not_hold_the_next_one_counts() -> None:
    async def main() -> None:
        store = memory_store()
        nonces = await claimed(store, 2)
        await put_active(store, 2, nonces[1])
        await rubbish(store)
        assert await put_active(store, 1, nonces[0]) == 2

    asyncio.run(main())


def test_a_mark_that_was_found_to_hold_is_not_read_again() -> None:
    async def main() -> None:
        store, marks = FaultyStore(memory_store()), ActiveMarks()
        nonces = await claimed(store, 3)
        assert await put_active(store, 1, nonces[0], marks) == 1
        await put_mark(store, 2, nonces[1])
        assert await put_active(store, 1, nonces[0], marks) == 2
        store.operations.clear()
        assert await put_active(store, 1, nonces[0], marks) == 2
        looked_at = [keys.active(1), keys.claim(2), keys.active(2), keys.claim(3), keys.active(3)]
        assert store.operations == [("get", key) for key in [*looked_at, keys.claim(4)]]
        await put_mark(store, 3, nonces[2])
        assert await put_active(store, 1, nonces[0], marks) == 3

    asyncio.run(main())


def test_a_save_asks_twice_however_many_attempts_and_hosts_there_are() -> None:
    async def main() -> None:
        store, marks = FaultyStore(memory_store()), ActiveMarks()
        nonces = await claimed(store, 9)
        for attempt in range(1, 10):
            for host in range(5):
                await publish_have(store, attempt, f"h{host}", [])
        await put_active(store, 9, nonces[8], marks)
        store.operations.clear()
        assert await put_active(store, 9, nonces[8], marks) == 9
        assert store.operations == [("get", keys.active(9)), ("get", keys.claim(10))]

    asyncio.run(main())


def test_a_mark_in_a_store_that_was_emptied_is_read_anew() -> None:
    async def main() -> None:
        store, marks = memory_store(), ActiveMarks()
        (nonce,) = await claimed(store, 1)
        await put_active(store, 1, nonce, marks)
        for key in await store.list(""):
            await store.delete(key)
        (other,) = await claimed(store, 1)
        assert await newest_active(store, 1, marks) == 0
        await put_mark(store, 1, nonce)
        assert await newest_active(store, 1, marks) == 0
        with pytest.raises(RegisterConflictError):
            await put_active(store, 1, other, marks)

    asyncio.run(main())


def test_ones_own_damaged_mark_is_put_again() -> None:
    async def main() -> None:
        store = memory_store()
        (nonce,) = await claimed(store, 1)
        await store.put_new(keys.active(1), [memoryview(b"rubbish")])
        assert await put_active(store, 1, nonce) == 1
        assert await newest_active(store, 1, ActiveMarks()) == 1

    asyncio.run(main())


def test_a_store_that_can_not_be_read_tells_nothing_of_a_mark() -> None:
    async def main() -> None:
        store = FaultyStore(memory_store())
        nonces = await claimed(store, 2)
        await put_active(store, 2, nonces[1])
        store.plan([Fault(StoreUnreachableError("gone"), operation="get", and_later=True)])
        with pytest.raises(StoreUnreachableError):
            await put_active(store, 1, nonces[0])

    asyncio.run(main())


# ---- decisions --------------------------------------------------------------


def test_of_many_who_decide_one_wins_and_all_obey() -> None:
    async def main() -> None:
        store = memory_store()
        choices = [StepId(1, step) for step in range(20)]
        found = await asyncio.gather(*(decide_resume(store, 2, 0, one) for one in choices))
        assert len(set(found)) == 1
        assert await resumed_from(store, 2) == found[0]
        assert await decide_resume(store, 2, 1, StepId(1, 3)) == StepId(1, 3)
        assert await resumed_from(store, 2) == StepId(1, 3)
        assert await resumed_from(store, 3) is None

    asyncio.run(main())


async def commit(store: MemoryStore, step: StepId) -> None:
    record = Decision("COMMIT", step.attempt, step.step, world=1, manifests=("00",))
    await decide(store, Kind.COMMIT, keys.commit(step), record)


def test_the_parent_is_the_newest_commit_before() -> None:
    async def main() -> None:
        store = memory_store()
        assert await parent_of(Catalog(store), StepId(1, 5)) == FROM_SCRATCH
        for step in (StepId(1, 10), StepId(1, 20), StepId(2, 5)):
            await commit(store, step)
        await abort_step(store, StepId(1, 30), "no")
        await store.put_new(keys.commit(StepId(1, 40)), [memoryview(b"damaged")])
        catalog = Catalog(store)
        assert await parent_of(catalog, StepId(1, 10)) == FROM_SCRATCH
        assert await parent_of(catalog, StepId(1, 15)) == StepId(1, 10)
        assert await parent_of(catalog, StepId(2, 1)) == StepId(1, 20)
        assert await parent_of(catalog, StepId(3, 1)) == StepId(2, 5)

    asyncio.run(main())
