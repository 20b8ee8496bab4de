"""Which step is meant by a number, an attempt with a number, or nothing."""

from __future__ import annotations

import asyncio

import pytest

from ckptmgr.errors import DamageError, NothingToRestoreError, UsageError
from ckptmgr.repository import keys
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.choose import candidates, find
from ckptmgr.store.base import Store
from ckptmgr.types import StepId
from small_step import SavedStep, made_in_memory, memory_store, save_every_kind, save_steps


async def two_attempts(store: Store) -> list[SavedStep]:
    return [*await save_every_kind(store), *await save_steps(store, (20, 40))]


SAVED, OBJECTS = made_in_memory(two_attempts)
S20, S25, S30, NEW20, NEW40 = (
    StepId(1, 20),
    StepId(1, 25),
    StepId(1, 30),
    StepId(3, 20),
    StepId(3, 40),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [NEW40, NEW20, S30, S25, S20]),
        ("20", [NEW20, S20]),
        ("020", [NEW20, S20]),
        ("1.20", [S20]),
        ("3.20", [NEW20]),
        ("40", [NEW40]),
        ("1.40", []),
        ("10", []),
        ("25", [S25]),
    ],
)
def test_candidates(text: str | None, expected: list[StepId]) -> None:
    assert asyncio.run(candidates(Catalog(memory_store(OBJECTS)), text)) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "1.2.3", "1.", ".1", "1e3", "1" * 30, " 1"])
def test_what_is_no_step_is_a_wrong_argument(text: str) -> None:
    with pytest.raises(UsageError, match="is not a step"):
        asyncio.run(candidates(Catalog(memory_store(OBJECTS)), text))


@pytest.mark.parametrize(
    ("text", "expected"), [(None, NEW40), ("20", NEW20), ("1.20", S20), ("30", S30)]
)
def test_find(text: str | None, expected: StepId) -> None:
    assert asyncio.run(find(Catalog(memory_store(OBJECTS)), text)).id == expected


@pytest.mark.parametrize("text", ["25", "10", "99", "2.20"])
def test_a_step_that_was_never_committed_or_is_retired_is_not_found(text: str) -> None:
    with pytest.raises(NothingToRestoreError, match=text):
        asyncio.run(find(Catalog(memory_store(OBJECTS)), text))


def test_a_damaged_register_is_said() -> None:
    damaged = {**OBJECTS, keys.commit(NEW40): b"rubbish"}
    with pytest.raises(DamageError):
        asyncio.run(find(Catalog(memory_store(damaged)), None))
    assert SAVED[-1].id == NEW40


def test_an_empty_store_has_nothing() -> None:
    with pytest.raises(NothingToRestoreError, match="no committed step"):
        asyncio.run(find(Catalog(memory_store({})), None))
