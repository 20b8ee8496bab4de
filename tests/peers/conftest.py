"""Fixtures of the tests that act the failures of other checkpoint systems out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rigged import Rig


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rigged store that every process started from here on can open."""
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    return found
