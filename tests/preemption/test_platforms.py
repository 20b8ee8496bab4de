"""Whenever a platform ends a job, the last step that was sealed is committed and comes back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from driven import until
from preemption.platforms import (
    Flag,
    Job,
    by_hai,
    by_kubelet,
    by_slurm,
    by_torchrun,
    seeded,
)
from scale import FULL, scaled

INSTANTS = scaled(3, 100)

pytestmark = [pytest.mark.kill, pytest.mark.reliability, pytest.mark.timeout(scaled(300, 3600))]


def preempted(job: Job, end: Callable[..., None], *more: Any) -> None:
    """End the job at one random instant after the other; at last it resumes from what is owed, and
    goes on to a commit: what one rank has sealed and another has not is open until then.
    """
    chance = seeded()
    for _ in range(INSTANTS):
        end(job, chance, *more)
    before = job.latest()
    job.start()
    job.await_resumed()
    until(lambda: job.latest() > before, "a commit of the last attempt")
    job.kill()
    print(f"{end.__name__} x{job.world}: {dict(sorted(job.facts.items()))}")
    assert job.facts["attempts"] == INSTANTS
    if FULL:  # a sample may have met none
        assert job.facts["left"] > INSTANTS // 10
        assert job.facts["left off the cadence"] > 0
        for kind in ("loader", "c", "interpreter"):
            assert job.facts[f"hung: {kind}"] > 0


def await_judged(job: Job) -> tuple[int, int, int]:
    """Preemptions that the daemons were told of, saved and not, once there is a verdict on each."""

    def judged() -> tuple[int, int, int] | None:
        names = "preempted", "preemption_saved", "preemption_unsaved"
        told, saved, lost = (len(job.events(name)) for name in names)
        return (told, saved, lost) if told == saved + lost else None

    found: tuple[int, int, int] = until(judged, "a verdict on every preemption")
    print(f"preemptions told of, saved, lost: {found}")
    return found


def test_torchrun(job: Job) -> None:
    preempted(job, by_torchrun)
    assert await_judged(job)[2] == 0


def test_slurm(job: Job, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    scontrol.chmod(0o755)
    job.source = "slurm"
    job.environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": "1",
        "CKPTMGR_SLURM_REQUEUE": "1",
    }
    preempted(job, by_slurm)
    if job.facts["queued again"]:
        assert set((tmp_path / "scontrol").read_text().splitlines()) == {"requeue 4711"}


def test_kubernetes(job: Job) -> None:
    job.source = "kubernetes"
    job.environment = {"CKPTMGR_GRACE_SECONDS": "30"}
    preempted(job, by_kubelet)


@pytest.fixture
def pods(runtime: Path, tmp_path: Path) -> Iterator[tuple[Job, Flag]]:
    """A job of two ranks on two nodes; only the first sees the flag."""
    nodes = [runtime / "n0", runtime / "n1"]
    for node in nodes:
        node.mkdir(mode=0o700)
    job = Job(tmp_path, nodes, source="hai", key=secrets.randbits(30) | 1)
    flag = Flag(job.key)
    yield job, flag
    flag.remove()


def test_hai(pods: tuple[Job, Flag]) -> None:
    job, flag = pods
    start = job.start

    def start_on_nodes(hang: str = "", at: int = 0) -> None:
        said = job.place / f"hfai{job.started + 1}"
        job.environment = {"HFAI_SAID": str(said), "MARSV2_TASK_TYPE": "training"}
        start(hang, at)

    job.start = start_on_nodes  # type: ignore[method-assign]
    preempted(job, by_hai, flag)
    await_judged(job)  # lost is what the other rank had not sealed yet
