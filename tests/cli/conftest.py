"""Fixtures of more than one file of tests."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from called import make_store
from ckptmgr.config import open_private_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One store for all tests of a file that only read."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    open_private_dir(runtime)
    yield make_store(tmp_path_factory.mktemp("made"), runtime)
    shutil.rmtree(runtime)
