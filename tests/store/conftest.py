"""A local store in a directory of its own, and a directory that it must leave alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ckptmgr.store.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[LocalStore]:
    made = LocalStore(str(root))
    yield made
    await made.aclose()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "object").write_bytes(b"not of the store")
    return path
