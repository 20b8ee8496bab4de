"""Tags that nobody here has the key of are not known, which is not the same as not there."""

from __future__ import annotations

import asyncio

import pytest

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.daemon.resume import claim_attempt
from ckptmgr.daemon.retain import collect
from ckptmgr.errors import LockedError, WrongKeyError
from ckptmgr.keep import Keep
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.keyring import NO_KEYS, Keyring, keyring_of
from ckptmgr.restore.choose import candidates_before
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import StepId
from security.forged import OTHER, OURS, RING
from small_step import memory_store, save_step, small_state

BOTH, LATER = keyring_of(OTHER, OURS), keyring_of(OTHER)


async def rotated() -> MemoryStore:
    """Steps 10 and 20 are of the old key, 30 to 50 of the new one; each has its number as a tag."""
    store = memory_store({})
    attempt, nonce = await claim_attempt(store, 1, "")
    for step, keyring in ((10, RING), (20, RING), (30, BOTH), (40, BOTH), (50, BOTH)):
        await save_step(store, attempt, nonce, step, small_state(step), keyring=keyring)
    return store


async def retired(catalog: Catalog, keep: Keep) -> list[int]:
    done = await collect(catalog, BufferPool(BUDGET_BYTES), keep)
    return [one.step.step for one in done if one.action == "retire"]


@pytest.mark.parametrize(
    ("keyring", "lost"), [(BOTH, [20, 30]), (LATER, []), (NO_KEYS, [])], ids=["both", "new", "none"]
)
def test_what_may_be_among_the_best_stays(keyring: Keyring, lost: list[int]) -> None:
    async def main() -> None:
        catalog = Catalog(await rotated(), keyring)
        assert await retired(catalog, Keep(2, best=("seed", "min", 1))) == lost

    asyncio.run(main())


def test_a_spike_behind_a_lost_key_is_not_passed_over() -> None:
    """Its step is retired, and its key is gone: what stands may have come after the spike."""

    async def main() -> None:
        store = await rotated()
        assert await retired(Catalog(store, BOTH), Keep(3)) == [10, 20]
        found = await candidates_before(Catalog(store, BOTH), "seed == 20")
        assert found == ([], StepId(1, 20))
        with pytest.raises(WrongKeyError, match=rf"encrypted with key {OURS.id}, given {OTHER.id}"):
            await candidates_before(Catalog(store, LATER), "seed == 20")
        with pytest.raises(LockedError, match="no key is given"):
            await candidates_before(Catalog(store), "seed == 20")

    asyncio.run(main())


def test_a_key_that_only_steps_after_the_spike_have_is_not_asked_for() -> None:
    async def main() -> None:
        found = await candidates_before(Catalog(await rotated(), RING), "seed == 20")
        assert found == ([StepId(1, 10)], StepId(1, 20))

    asyncio.run(main())


def test_a_policy_that_asks_for_no_tags_needs_no_key() -> None:
    async def main() -> None:
        assert await retired(Catalog(await rotated()), Keep(2)) == [10, 20, 30]

    asyncio.run(main())
