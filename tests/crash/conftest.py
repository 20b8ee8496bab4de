"""Fixtures of the crash tests."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.damaged import Rig, make_cheap
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


@pytest.fixture
def rig(made: tuple[list[SavedStep], Objects], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    make_cheap(monkeypatch)
    directory = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    directory.mkdir()
    saved, objects = made
    yield Rig(saved, objects, memory_store(objects), directory)
    shutil.rmtree(directory)
