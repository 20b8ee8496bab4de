"""Jobs with a history: a real daemon, a rank that tells its steps, deaths and restarts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptmgr.staging.control import Restore
from ckptmgr.staging.reached import reach
from ckptmgr.types import Outcome
from driven import Daemon, Rank, until


def train(rank: Rank, steps: Sequence[int], saved: Sequence[int]) -> None:
    """Tell of steps, and commit some of them."""
    for step in steps:
        reach(rank.buffer.memory, rank.attempt, step)
        if step in saved:
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED


def trained(runtime: Path, url: str, steps: int, *, saved: Sequence[int], kill: bool = True) -> Any:
    """One attempt: resume, train so many steps on, and die (or leave); returns what it resumed
    from. The daemon ends too, and its host memory stays for the next one.
    """
    with Daemon(runtime):
        rank = Rank(runtime, url, keep=9)
        resumed = rank.restore(Restore())
        train(rank, range(resumed.step + 1, resumed.step + steps + 1), saved)
        rank.close(clean=not kill)
    return resumed


def forget_host_memory(runtime: Path) -> None:
    """As a reboot does."""
    shutil.rmtree(runtime / "buffers")


def counted(daemon: Daemon, number: int = 1) -> dict[str, Any]:
    """The event that tells what the last restart cost."""
    return daemon.await_event("restart_counted", number)


def sample(daemon: Daemon, name: str) -> dict[tuple[str, ...], float]:
    """The values of a metric, by its labels without the job's."""
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    port = daemon.status()["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        text = reply.read().decode()
    return {
        tuple(value for label, value in one.labels.items() if label != "job"): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name
    }


def await_sample(daemon: Daemon, name: str, value: float) -> None:
    """Wait until a metric has a value."""
    until(lambda: value in sample(daemon, name).values(), f"{name} is {value}")
