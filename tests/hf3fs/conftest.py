"""An emulated 3FS mount for tests."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf3fs.mounted import Mounted, mounted, needs_fuse


@contextmanager
def _emulated() -> Iterator[Mounted]:
    """On tmpfs, because the disk of a test machine is not what is tested."""
    needs_fuse()
    directory = Path(f"/dev/shm/hf3fs-test-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with mounted(directory) as mount:
            yield mount
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def mount() -> Iterator[Mounted]:
    """Mount an emulator that the test may break."""
    with _emulated() as made:
        yield made


@pytest.fixture(scope="module")
def shared_mount() -> Iterator[Mounted]:
    """Mount one emulator for all tests of a module, which leave it as it is."""
    with _emulated() as made:
        yield made
