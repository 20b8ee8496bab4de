"""torchrun restarts a job one of whose ranks was killed: on one host, and on two that it reaches
over a network. Every rank finds the agreed step, and no bit differs from the uninterrupted job.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ckptmgr.config import open_private_dir
from crash.storm import Storm
from processes import end_processes_of
from rank.havoc import PROGRAM, Judge, Plan, free_port, truth_of
from ranks import TESTS
from scale import FULL
from servers.network import needs_network, network

pytestmark = [pytest.mark.kill, pytest.mark.reliability, pytest.mark.timeout(600)]

SECONDS_MAX = 240.0
"""For six imports of torch on a busy machine; nothing here measures time."""

PLAN = Plan("fsdp2", 2, 100)

A_STORE_PER_ATTEMPT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torch 2.13 keeps one store through all attempts and puts no attempt into its keys: restarted
ranks may then read the addresses of the dead ones, and `init_process_group` is refused or hangs.
"""


@dataclass(slots=True)
class Node:
    """Where a launcher runs: its runtime directory, and how it joins the others."""

    runtime: Path
    arguments: list[str]
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Launched:
    """The launchers of a job, and what its ranks say."""

    judge: Judge
    launchers: list[subprocess.Popen[bytes]]
    log: Path

    def await_(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            over = all(one.poll() is not None for one in self.launchers)
            self.judge.read()
            if holds():
                return
            assert not over, f"{what} never came\n{self.log.read_text()[-6000:]}"
            assert time.monotonic() < deadline, (
                f"{what} not in time\n{self.log.read_text()[-6000:]}"
            )
            time.sleep(0.005)

    def end(self) -> None:
        """The launchers by pid; each ends its own ranks."""
        for one in self.launchers:
            one.terminate()
        for one in self.launchers:
            try:
                one.wait(20)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


@contextmanager
def launched(nodes: list[Node], url: str, judge: Judge) -> Iterator[Launched]:
    """Start torchrun on every node."""
    paths = os.pathsep.join(map(str, [TESTS.parent, TESTS, TESTS / "rank"]))
    log = judge.place / "torchrun.log"
    program = [str(PROGRAM), PLAN.layout, url, str(PLAN.steps), str(judge.place)]
    launchers = []
    with log.open("wb") as file:
        for node in nodes:
            more = {
                "CKPTMGR_RUNTIME_DIR": str(node.runtime),
                "OMP_NUM_THREADS": "1",
                **A_STORE_PER_ATTEMPT,
            }
            started = subprocess.Popen(
                [
                    *node.prefix,
                    *[sys.executable, "-W", "ignore", "-m", "torch.distributed.run"],
                    *["--rdzv-backend=c10d", "--max-restarts=3", "--monitor-interval=0.1"],
                    *[*node.arguments, *program],
                ],
                env={**os.environ, "PYTHONPATH": paths, **more, **node.environment},
                stdout=file,
                stderr=file,
            )
            launchers.append(started)
    found = Launched(judge, launchers, log)
    try:
        yield found
    finally:
        found.end()


@contextmanager
def runtimes(count: int) -> Iterator[list[Path]]:
    """Runtime directories of as many hosts."""
    name = secrets.token_hex(4)
    found = [Path(f"/dev/shm/ckptmgr-torchrun-{name}-{at}") for at in range(count)]
    for one in found:
        open_private_dir(one)
    try:
        yield found
    finally:
        for one in found:
            end_processes_of(one)
            shutil.rmtree(one, ignore_errors=True)


def kill_one(job: Launched, chance: random.Random) -> int:
    """SIGKILL one rank at a random instant after something was acknowledged; its step."""
    heard = job.judge.heard
    steps = chance.randint(4, 20)
    job.await_(lambda: bool(job.judge.acked), "an acknowledged commit")
    goal = heard[0].step + steps
    job.await_(lambda: heard[0].step >= goal, f"step {goal}")
    victim = chance.choice(heard)
    os.kill(victim.pid, signal.SIGKILL)
    job.judge.read()
    job.judge.before = job.judge.furthest
    return job.judge.furthest


def judge_restart(job: Launched, killed_at: int) -> None:
    """All launchers end well, after one restart of all ranks or more, with the right bits."""
    job.await_(lambda: all(one.ended for one in job.judge.heard), "the end")
    assert [one.wait(SECONDS_MAX) for one in job.launchers] == [0] * len(job.launchers)
    first, *again = sorted(job.judge.chosen.items())
    assert first == (1, (0, 0))
    assert again, "nothing was restarted"
    assert all(0 < step <= killed_at for _, (_, step) in again), again
    assert all(one.counts["resumed"] == len(job.judge.chosen) for one in job.judge.heard)


def seeded() -> random.Random:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def judged(tmp_path: Path) -> Judge:
    place = tmp_path / "job"
    place.mkdir()
    return Judge(truth_of(PLAN, tmp_path / "truth"), place, Counter())


@pytest.mark.skipif(
    not FULL and os.getuid() == 0, reason="two hosts do the same, where there is root for them"
)
def test_torchrun_restarts_all_ranks_and_each_finds_the_agreed_step(
    tmp_path: Path, store_url: str
) -> None:
    judge, chance = judged(tmp_path), seeded()
    rendezvous = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    arguments = [rendezvous, "--local-addr=127.0.0.1", "--nproc-per-node=2", "--nnodes=1"]
    with (
        runtimes(1) as (runtime,),
        launched([Node(runtime, arguments)], store_url, judge) as job,
    ):
        judge_restart(job, kill_one(job, chance))
        print(judge.facts)
        assert judge.facts["from memory"] == 2 * (len(judge.chosen) - 1)


@contextmanager
def two_hosts(directories: list[Path]) -> Iterator[list[Node]]:
    """Two hosts on a network of their own."""
    with network(["a", "b"]) as hosts:
        yield [
            Node(
                runtime,
                [
                    *["--nnodes=2", "--nproc-per-node=1", f"--node-rank={at}", "--rdzv-id=job"],
                    f"--rdzv-endpoint={hosts['a'].address}:29400",
                    f"--local-addr={host.address}",
                    f"--rdzv-conf=is_host={1 - at}",
                ],
                host.command(),
                {"GLOO_SOCKET_IFNAME": host.port},
            )
            for at, (runtime, host) in enumerate(zip(directories, hosts.values(), strict=True))
        ]


@pytest.mark.root
def test_two_hosts_on_a_network_with_a_daemon_each_resume_together(
    tmp_path: Path, store_url: str
) -> None:
    needs_network()
    judge, chance = judged(tmp_path), seeded()
    with (
        runtimes(2) as directories,
        two_hosts(directories) as nodes,
        launched(nodes, store_url, judge) as job,
    ):
        killed_at = kill_one(job, chance)
        daemons = [Storm(tmp_path, one, chance) for one in directories]
        assert all(one.daemon_pid() for one in daemons), "each host has a daemon"
        assert chance.choice(daemons).kill_daemon()
        judge_restart(job, killed_at)
        print(judge.facts)
