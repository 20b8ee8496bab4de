"""Fixtures of the tests of preemption."""

from __future__ import annotations

from pathlib import Path

import pytest

from preemption.platforms import Job


@pytest.fixture
def job(runtime: Path, tmp_path: Path) -> Job:
    """A job of one rank on one host."""
    return Job(tmp_path, [runtime])
