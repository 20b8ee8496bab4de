"""One byte of an answer is another, while what is stored is whole: it is read again, and told."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path

import pytest

from ckptmgr.errors import ChunkDamagedError, DamageError, RecordDamagedError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.commit import check_format
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.restore.copying import copy_packs, put_manifest
from ckptmgr.store.memory import MemoryStore
from ckptmgr.store.retry import RetryingStore
from small_step import Objects, SavedStep, made_in_memory, memory_store, same_bits, shelf_of

KINDS = {
    "format": RecordDamagedError,
    "commit/": RecordDamagedError,
    "man/": RecordDamagedError,
    "data/": ChunkDamagedError,
}


class BadLine(MemoryStore):
    """The objects of another store; of the first `times` answers that hold bytes of a key below
    `prefix` one byte is another.
    """

    def __init__(self, objects: Objects, prefix: str, times: int) -> None:
        super().__init__(secrets.token_hex(8))
        shelf_of(self).update({key: bytearray(blob) for key, blob in objects.items()})
        self.prefix, self.times = prefix, times
        self.flipped: Counter[str] = Counter()

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        found = await super().get(key, offset, length, into)
        if not (key.startswith(self.prefix) and len(found) and self.times):
            return found
        self.times -= 1
        self.flipped[key] += 1
        changed = found if into is not None else memoryview(bytearray(found))
        changed[len(changed) // 2] ^= 1
        return changed


@pytest.fixture(scope="module")
def made() -> tuple[list[SavedStep], Objects]:
    return made_in_memory()


def behind(line: BadLine) -> tuple[RetryingStore, list[Exception]]:
    """The store as the daemon has it, and what it is told."""
    told: list[Exception] = []
    return RetryingStore(line, on_failure=lambda _, error: told.append(error)), told


@pytest.mark.parametrize("prefix", KINDS)
async def test_one_flipped_byte_costs_no_step_and_is_told(
    prefix: str, made: tuple[list[SavedStep], Objects], tmp_path: Path
) -> None:
    saved, objects = made
    line = BadLine(objects, prefix, times=1)
    store, told = behind(line)
    await check_format(store, create=False)
    document = await restore_files(Catalog(store), None, "safetensors", tmp_path, lambda _: None)
    assert (document["id"], document["skipped"]) == (str(saved[-1].id), [])
    assert same_bits(tmp_path, saved[-1])
    ((key, _),) = line.flipped.items()
    assert [type(error) for error in told] == [KINDS[prefix]]
    assert key in str(told[0])


@pytest.mark.parametrize("prefix", [kind for kind in KINDS if kind != "format"])
async def test_what_is_flipped_each_time_costs_its_step_and_is_told(
    prefix: str, made: tuple[list[SavedStep], Objects], tmp_path: Path
) -> None:
    saved, objects = made
    newest = saved[-1].id
    line = BadLine(objects, f"{prefix}{newest.attempt:08d}/{newest.step:012d}", times=1 << 30)
    document = await restore_files(
        Catalog(behind(line)[0]), None, "safetensors", tmp_path, lambda _: None
    )
    assert [one["id"] for one in document["skipped"]] == [str(newest)]
    assert same_bits(tmp_path, next(one for one in saved if str(one.id) == document["id"]))


@pytest.mark.parametrize("prefix", KINDS)
async def test_verify_calls_no_object_damaged_for_one_answer(
    prefix: str, made: tuple[list[SavedStep], Objects]
) -> None:
    line = BadLine(made[1], prefix, times=1)
    store, told = behind(line)
    reports = await verify_store(
        Catalog(store), None, every=True, quick=False, progress=lambda _: None
    )
    assert [damage for report in reports for damage in report["damage"]] == []
    assert sum(line.flipped.values()) == len(told) == 1


async def test_a_copy_is_made_of_the_second_answer(made: tuple[list[SavedStep], Objects]) -> None:
    """As a mirror follows, and as a spool is drained."""
    line = BadLine(made[1], "data/", times=1)
    store, told = behind(line)
    target = memory_store({})
    decision = await Catalog(store).decision(made[0][-1].id)
    sealed = await Catalog(store).manifest(decision, 0)
    await copy_packs(store, target, sealed.manifest, BufferPool(1 << 27))
    await put_manifest(target, sealed)
    assert all(shelf_of(target)[key] == made[1][key] for key, _ in sealed.manifest.packs)
    assert [isinstance(error, DamageError) for error in told] == [True]
