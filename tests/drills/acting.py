"""What drills have in common: a trainer that goes on, and the log of a daemon by codes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ckptmgr.types import Outcome
from crash.full_disk import train
from driven import Daemon, Rank, until
from scale import FULL

PACE_SECONDS = 0.2

in_full = pytest.mark.skipif(
    not FULL, reason="acted out by `make reliability`: a minute of waiting"
)


@contextmanager
def training(rank: Rank, first: int) -> Iterator[list[int]]:
    """Snapshot step after step in the background, as a trainer does; yields the steps so far."""
    ended, steps = threading.Event(), [first - 1]

    def run() -> None:
        while not ended.wait(PACE_SECONDS):
            train(rank, steps[-1] + 1)
            steps.append(steps[-1] + 1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield steps
    finally:
        ended.set()
        thread.join()


def commit(rank: Rank, step: int) -> None:
    """Save a step and hear that it is committed."""
    rank.save(step)
    assert rank.wait(step).outcome == Outcome.COMMITTED


def logged(daemon: Daemon, code: str) -> dict[str, object]:
    """The first event of a code, once it is there."""
    found: dict[str, object] = until(
        lambda: next((e for e in daemon.events() if e["code"] == code), None), f"{code} is logged"
    )
    return found
