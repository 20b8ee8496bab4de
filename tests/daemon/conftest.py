"""A rigged store and two hosts, for the daemon's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from rigged import Rig


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rigged store that every daemon started from here on can open."""
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    return found


@pytest.fixture
def hosts(runtime: Path) -> tuple[Path, Path]:
    """Two runtime directories: two hosts, as far as daemons can tell."""
    found = runtime / "h0", runtime / "h1"
    for path in found:
        path.mkdir(mode=0o700)
    return found
