"""Two hosts, a rank and a daemon on each, and the network between them and an S3 gateway fails.

The gateway is Ceph's. A proxy of the test listens on a host of its own in front of it, because the
kernel here has no delay to put on a link: what comes late comes late in the proxy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from servers.ceph import Ceph
from servers.ceph import start_or_skip as ceph
from servers.faultproxy import Fault, FaultProxy, Kind
from servers.network import Host, needs_network, network
from stores.places import bucket_at
from stores.rows import row
from stores.test_network import (
    MIB,
    test_a_host_that_is_cut_off_amid_a_write_finishes_it_when_it_is_back,
    test_a_slow_network_is_only_slow,
    test_commits_resume_when_a_host_is_back,
    test_lost_packets_lose_nothing,
)
from stores.two_hosts import Job, Observer, job

__all__ = [
    "test_a_host_that_is_cut_off_amid_a_write_finishes_it_when_it_is_back",
    "test_a_slow_network_is_only_slow",
    "test_commits_resume_when_a_host_is_back",
    "test_lost_packets_lose_nothing",
]

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(900),
    *row("s3:// on Ceph RGW over a failing network"),
]

LATE_SECONDS = 0.4
TRY_SECONDS = "5"
"""Of a try: what a cut cable swallowed is sent again after this."""


@dataclass(frozen=True)
class Gateway:
    """A gateway behind a proxy on a host of its own, and two hosts that train."""

    hosts: dict[str, Host]
    ceph: Ceph
    proxy: FaultProxy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The watching process asks the gateway itself: its network is never touched."""
    needs_network("tc", "nft")
    with (
        ceph(tmp_path_factory.mktemp("ceph")) as running,
        network(["a", "b", "gateway"]) as hosts,
        FaultProxy(running.port, listener=hosts["gateway"].listen()) as proxy,
    ):
        yield Gateway(hosts, running, proxy)


@pytest.fixture
def training(
    cluster: Gateway, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Job, Observer]]:
    """A job of two ranks, whose daemons reach the store over their hosts' network only."""
    url, direct = bucket_at(cluster.ceph.endpoint, cluster.ceph.environment())
    for name, value in direct.items():
        monkeypatch.setenv(name, value)
    through = {
        **os.environ,
        "AWS_ENDPOINT_URL": cluster.proxy.endpoint,
        "CKPTMGR_STORE_TIMEOUT_SECONDS": TRY_SECONDS,
    }
    prefixes = [cluster.hosts[host].command() for host in ("a", "b")]
    asked = cluster.proxy.requests
    with (
        Observer(url) as observer,
        job([url, url], runtime, prefixes, mib=MIB, environment=through) as running,
    ):
        running.save_and_commit()
        assert cluster.proxy.requests > asked, "the daemons do not go over the network"
        yield running, observer
        running.save_and_commit()
        running.audit()
    observer.judge()


def test_late_answers_are_only_late(cluster: Gateway, training: tuple[Job, Observer]) -> None:
    running, _ = training
    cluster.proxy.plan(Fault(Kind.LATE, seconds=LATE_SECONDS))
    try:
        for _ in range(3):
            running.save_and_commit()
    finally:
        cluster.proxy.plan()
    assert cluster.proxy.struck[Kind.LATE] > 0


def test_commits_resume_when_the_gateway_is_back(
    cluster: Gateway, training: tuple[Job, Observer]
) -> None:
    """Nobody reaches it; both hosts hold what they sealed."""
    running, _ = training
    cluster.hosts["gateway"].cut()
    try:
        step = running.save()
        assert running.undecided(step, 3.0)
    finally:
        cluster.hosts["gateway"].join()
    running.committed(step)
