"""A medium that fails: below one object it is damage of a step, below all of them an outage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ckptmgr.errors import MediumError, StoreUnreachableError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.testing import Fault, FaultyStore
from crash.test_store_failures import base, directory, restored
from small_step import Objects, SavedStep, memory_store

__all__ = ["base", "directory"]  # fixtures

pytestmark = pytest.mark.reliability


@pytest.mark.parametrize("key", ["data/", "man/", "commit/"])
def test_an_object_that_stays_unreadable_is_damage_of_its_step(
    base: tuple[list[SavedStep], Objects], directory: Path, key: str
) -> None:
    """EIO on one object of a store that otherwise answers: the step before is there to be had."""

    async def main() -> None:
        named = f"{key}00000001/000000000020"
        gone = Fault(MediumError("by the test's will"), operation="get", key=named, and_later=True)
        store = RetryingStore(
            FaultyStore(memory_store(base[1]), [gone]), jitter=lambda: 0.0, landmark=keys.FORMAT
        )
        assert await restored(store, directory, 0) == ("1.10", ["1.20"])
        out = directory / "out"
        out.mkdir()
        document = await restore_files(Catalog(store), None, "safetensors", out, lambda _: None)
        assert document["id"] == "1.10"
        assert named in document["skipped"][0]["why"]
        for quick in (True, False):
            reports = await verify_store(
                Catalog(store), None, every=True, quick=quick, progress=lambda _: None
            )
            damage = [one["key"] for report in reports for one in report["damage"]]
            assert set(damage) == {next(k for k in base[1] if k.startswith(named))}
        assert await store.list("holds/") == []

    asyncio.run(main())


def test_a_medium_that_fails_everywhere_is_no_damage(
    base: tuple[list[SavedStep], Objects], directory: Path
) -> None:
    async def main() -> None:
        gone = Fault(MediumError("by the test's will"), operation="get", and_later=True)
        store = RetryingStore(
            FaultyStore(memory_store(base[1]), [gone]),
            deadline_seconds=0.05,
            jitter=lambda: 0.0,
            landmark=keys.FORMAT,
        )
        with pytest.raises(StoreUnreachableError):
            await restored(store, directory, 2)
        with pytest.raises(StoreUnreachableError):
            await restore_files(Catalog(store), None, "safetensors", directory, lambda _: None)
        with pytest.raises(StoreUnreachableError):
            await verify_store(
                Catalog(store), None, every=True, quick=False, progress=lambda _: None
            )

    asyncio.run(main())
