"""Fixtures of the tests of preemption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from preemption.platforms import Job
from rank.zygote import Zygote


@pytest.fixture(scope="session")
def trainers() -> Iterator[Zygote]:
    """A warm process that trainers of preempted_job.py are forked from."""
    with Zygote("preemption.preempted_job") as found:
        yield found


@pytest.fixture
def job(runtime: Path, tmp_path: Path, trainers: Zygote) -> Job:
    """A job of one rank on one host."""
    return Job(trainers, tmp_path, [runtime])
