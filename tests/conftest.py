"""Fixtures of more than one test file."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ckptmgr.config import open_private_dir
from processes import end_processes_of

# How long an example takes says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a private runtime directory on tmpfs; its daemons are killed when the test ends."""
    path = Path(f"/dev/shm/ckptmgr-test-{os.getpid()}-{secrets.token_hex(4)}")
    open_private_dir(path)
    monkeypatch.setenv("CKPTMGR_RUNTIME_DIR", str(path))
    yield path
    end_processes_of(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def hosts(runtime: Path) -> list[Path]:
    """Four runtime directories: four hosts, as far as daemons can tell."""
    found = [runtime / f"h{number}" for number in range(4)]
    for path in found:
        path.mkdir(mode=0o700)
    return found


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Return the URL of a fresh local store."""
    return f"file://{tmp_path}/store"
