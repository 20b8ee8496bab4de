"""Two hosts, a rank and a daemon on each, and the network between them and their store fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers.moosefs import Cluster, moosefs, needs_moosefs
from servers.network import Network, needs_network
from stores.rows import row
from stores.two_hosts import Job, Observer, job

pytestmark = [pytest.mark.root, pytest.mark.timeout(900), *row("MooseFS over a failing network")]

SLOW_MEGABITS = 80
LOST_SHARE = 0.02
PARTITION_SECONDS = 6.0
LOSSY = ("a", "b", "master", "chunks1", "gateway")
MIB = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two hosts that train, and one that watches and whose network is never touched."""
    needs_moosefs()
    needs_network("tc", "nft")
    with moosefs(tmp_path_factory.mktemp("moosefs"), ["a", "b", "watch"]) as running:
        yield running


@pytest.fixture
def training(
    cluster: Cluster, runtime: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Job, Observer]]:
    """A job of two ranks whose hosts name the store by their own mounts."""
    name = str(request.node.name)
    urls = [(cluster.mounts[host] / name).as_uri() for host in ("a", "b")]
    prefixes = [cluster.hosts[host].command() for host in ("a", "b")]
    with (
        Observer((cluster.mounts["watch"] / name).as_uri()) as observer,
        job(urls, runtime, prefixes, mib=MIB) as running,
    ):
        running.save_and_commit()
        yield running, observer
        running.save_and_commit()
        running.url = observer.url
        running.audit()
    observer.judge()


def test_a_slow_network_is_only_slow(cluster: Network, training: tuple[Job, Observer]) -> None:
    running, _ = training
    host = cluster.hosts["b"]
    sent = host.bytes_sent()
    host.limit(SLOW_MEGABITS)
    try:
        for _ in range(3):
            running.save_and_commit()
    finally:
        host.heal()
    assert host.bytes_sent() - sent > 3 * MIB << 20, "it did not go over this network"


def test_lost_packets_lose_nothing(cluster: Network, training: tuple[Job, Observer]) -> None:
    running, _ = training
    hosts = [host for name, host in cluster.hosts.items() if name in LOSSY]
    for host in hosts:
        host.lose(LOST_SHARE)
    try:
        for _ in range(5):
            running.save_and_commit()
        dropped = [host.packets_lost() for host in hosts]
    finally:
        for host in hosts:
            host.heal()
    print(f"\npackets lost: {dropped}")
    assert all(dropped)


@pytest.mark.parametrize("cut", ["a", "b"])
def test_commits_resume_when_a_host_is_back(
    cluster: Network, training: tuple[Job, Observer], cut: str
) -> None:
    running, _ = training
    host = cluster.hosts[cut]
    for _ in range(2):
        host.cut()
        try:
            step = running.save()
            assert running.undecided(step, PARTITION_SECONDS / 2)
        finally:
            host.join()
        joined = time.monotonic()
        running.committed(step)
        print(f"\ncommitted {time.monotonic() - joined:.1f} s after {cut} was back")


def test_a_host_that_is_cut_off_amid_a_write_finishes_it_when_it_is_back(
    cluster: Network, training: tuple[Job, Observer]
) -> None:
    running, _ = training
    host = cluster.hosts["b"]
    host.limit(SLOW_MEGABITS // 4)
    try:
        step = running.save()
        running.writing(step)
        host.cut()
        assert running.undecided(step, PARTITION_SECONDS / 2)
    finally:
        host.join()
        host.heal()
    running.committed(step)
