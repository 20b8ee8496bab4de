"""A rank or a daemon that is stopped delays commits, and never the training of the others."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from test_ranks import environment, free_port

from ckptmgr.rank.planner import PLAN_SECONDS_MAX
from ckptmgr.types import StepId, StepState
from driven import PATIENCE_SECONDS, Daemon, until
from nursery import torch_nursery
from peers.job import entries_at, go_on, stop
from scale import FULL

PROGRAM = Path(__file__).with_name("clocked_process.py")
GOES_ON = 300
"""Steps that the others must make meanwhile; several snapshots are due in them."""


class Clocked:
    """One rank (clocked_process.py) and what it says."""

    def __init__(self, runtime: Path, url: str, epoch: float, port: int, rank: int) -> None:
        self._log = runtime / "trainer.out"
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        told |= {"MASTER_PORT": str(port), "CKPTMGR_RUNTIME_DIR": str(runtime)}
        with self._log.open("wb") as log:
            self.process = torch_nursery().start(
                [str(PROGRAM), url, str(epoch)],
                env=environment(**told),
                stdout=log,
                stderr=log,
            )

    def told(self) -> list[dict[str, Any]]:
        """All it has said; what it has not finished saying is left out."""
        lines = self._log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line[0] == "{" and line[-1] == "\n"]

    def last(self, key: str) -> Any:
        """What it said last about something; 0 if nothing."""
        assert self.process.poll() is None or key == "error", self._log.read_text()
        return next((one[key] for one in reversed(self.told()) if key in one), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def two_ranks(url: str, *hosts: Path) -> Iterator[tuple[list[Clocked], list[Daemon]]]:
    """Two ranks that train, each with a daemon of its own."""
    epoch, port = time.monotonic(), free_port()
    told = {**os.environ, "CKPTMGR_STUCK_SECONDS": "3"}
    with ExitStack() as stack:
        daemons = [stack.enter_context(Daemon(host, environment=told)) for host in hosts]
        ranks = [
            stack.enter_context(Clocked(host, url, epoch, port, rank))
            for rank, host in enumerate(hosts)
        ]
        yield ranks, daemons


def newest_commit(url: str) -> StepId:
    found = entries_at(url).values()
    done = [one.id for one in found if one.decision is not None and one.decision.committed]
    return max(done, default=StepId(0, 0))


def why_aborted(url: str) -> list[str]:
    found = entries_at(url).values()
    return [one.decision.why for one in found if one.decision and one.state is StepState.ABORTED]


@pytest.mark.reliability
@pytest.mark.parametrize(
    "victim", ["rank 0", "daemon 1", *(["rank 1", "daemon 0"] if FULL else [])]
)
def test_what_is_stopped_delays_commits_and_nobodys_training(
    hosts: list[Path], store_url: str, victim: str
) -> None:
    """Rank 0 has the key-value store in its process, too."""
    kind, number = victim.split()
    with two_ranks(store_url, *hosts[:2]) as (ranks, daemons):
        until(lambda: newest_commit(store_url) > StepId(1, 0), "they commit")
        chosen = {"rank": ranks, "daemon": daemons}[kind][int(number)]
        living = [one for one in ranks if one is not chosen]
        stop([chosen.process])
        try:
            goal = max(one.last("step") for one in ranks) + GOES_ON
            for rank in living:
                until(lambda rank=rank: rank.last("step") > goal, "it trains on")
            if victim != "rank 0":  # without its key-value store nothing more is begun
                name = f"rank {number} of 2"
                until(lambda: any(name in why for why in why_aborted(store_url)), "it is named")
        finally:
            go_on([chosen.process])
        stopped_at = max(one.last("step") for one in ranks)
        until(lambda: newest_commit(store_url) > StepId(1, stopped_at), "a later step commits")
        assert all(one.last("longest") < 10 * PLAN_SECONDS_MAX for one in living)


def test_ranks_that_were_stopped_and_superseded_end_themselves(
    hosts: list[Path], store_url: str
) -> None:
    with ExitStack() as stack:
        ranks, daemons = stack.enter_context(two_ranks(store_url, *hosts[:2]))
        until(lambda: newest_commit(store_url) > StepId(1, 0), "they commit")
        processes = [one.process for one in [*ranks, *daemons]]
        stack.callback(go_on, processes)
        stop(processes)
        last = newest_commit(store_url)
        newer, _ = stack.enter_context(two_ranks(store_url, *hosts[2:]))
        until(lambda: newest_commit(store_url) > StepId(2, 0), "the second one commits")
        assert [one.last("start") for one in newer] == [last.step] * 2
        go_on(processes)
        for one in ranks:
            assert one.process.wait(PATIENCE_SECONDS) == 0
            assert one.last("error") == "SupersededError"
        reached = newest_commit(store_url)
        assert reached.attempt == 2
        until(lambda: newest_commit(store_url) > reached, "the second one goes on")
