"""Fixtures of the crash tests."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import BUDGET_BYTES
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.restore import check, fetch, verify
from ckptmgr.store import memory
from crash.damaged import Rig
from small_step import (
    Objects,
    SavedStep,
    made_in_memory,
    memory_store,
    save_every_kind,
    smallest_state,
)


@pytest.fixture(scope="module")
def made() -> tuple[list[SavedStep], Objects]:
    return made_in_memory(lambda store: save_every_kind(store, smallest_state))


async def at_once(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Stand in for `in_thread`: half a million flips can not afford a thread for each chunk."""
    return work(*arguments, **named)


@pytest.fixture
def rig(made: tuple[list[SavedStep], Objects], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(fetch, "in_thread", at_once)
    monkeypatch.setattr(verify, "in_thread", at_once)
    monkeypatch.setattr(keys, "parse_step", cache(keys.parse_step))
    monkeypatch.setattr(memory, "check_key", cache(memory.check_key))
    pool = BufferPool(BUDGET_BYTES)  # a process has one; a command, which does one thing, makes it
    monkeypatch.setattr(check, "BufferPool", lambda _: pool)
    directory = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    directory.mkdir()
    saved, objects = made
    yield Rig(saved, objects, memory_store(objects), directory)
    shutil.rmtree(directory)
