"""Servers of a MooseFS die, hang and come back under a job of two ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers.moosefs import CHUNKSERVERS, MASTER, Cluster, moosefs, needs_moosefs
from stores.rows import row
from stores.two_hosts import Job, Observer, job

pytestmark = [pytest.mark.root, pytest.mark.timeout(900), *row("MooseFS whose servers fail")]

MIB = 16
OUTAGE_SECONDS = 5.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    needs_moosefs()
    with moosefs(tmp_path_factory.mktemp("moosefs"), ["a", "b"]) as running:
        yield running


@pytest.fixture
def running(cluster: Cluster, runtime: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    """A job of two ranks, watched; it must be able to go on when the test is over."""
    urls = [(mount / str(request.node.name)).as_uri() for mount in cluster.mounts.values()]
    prefixes = [cluster.hosts[host].command() for host in cluster.mounts]
    with Observer(urls[1]) as observer, job(urls, runtime, prefixes, mib=MIB) as running:
        running.save_and_commit()
        yield running
        running.save_and_commit()
        running.audit()
    observer.judge()


def test_a_chunkserver_that_dies_amid_a_write_costs_nothing(cluster: Cluster, running: Job) -> None:
    for name in CHUNKSERVERS:
        step = running.save()
        running.writing(step)
        cluster.servers[name].kill()
        try:
            running.committed(step)
        finally:
            cluster.servers[name].start()
            cluster.await_servers()


@pytest.mark.parametrize("way", ["hangs", "is killed"])
def test_without_its_master_the_backlog_waits_and_drains(
    cluster: Cluster, running: Job, way: str
) -> None:
    """Whatever was acknowledged before the master went is there when it is back."""
    master = cluster.servers[MASTER]
    for _ in range(2):
        time.sleep(random.uniform(0, 0.3))  # anywhere between two saves
        step = running.save()
        if random.random() < 0.5:
            running.writing(step)
        if way == "hangs":
            master.freeze()
        else:
            master.kill()
        begun = time.monotonic()
        following = running.save()
        try:
            assert running.undecided(following, OUTAGE_SECONDS / 2)
        finally:
            if way == "hangs":
                master.thaw()
            else:
                master.start()
        running.committed(step)
        running.committed(following)
        print(f"\nmaster {way}: committed {time.monotonic() - begun:.1f} s after it went")
