"""A job that nobody uses any more is closed, unless somebody has come back for it meanwhile."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import DaemonSettings
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.service import Service


class Asked:
    """A connection that has asked for these jobs."""

    def __init__(self, urls: set[str]) -> None:
        self.urls = urls


async def test_one_that_is_asked_for_while_another_is_closed_stays(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(DaemonSettings(runtime))
    jobs = [service.job(f"memory://{secrets.token_hex(8)}") for _ in range(3)]
    closed: list[str] = []

    async def closing(job: Job) -> None:
        closed.append(job.url)
        if len(closed) == 1:
            asked: Any = Asked({one.url for one in jobs} - {job.url})
            service._serving.add(asked)

    monkeypatch.setattr(Job, "aclose", closing)
    await service._close_unused()
    assert len(closed) == 1
    assert service.jobs.keys() == {job.url for job in jobs} - set(closed)
