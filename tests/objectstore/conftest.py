"""A Ceph gateway for the tests of a session, and a bucket for each."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from servers.buckets import Bucket
from servers.ceph import Ceph, start_or_skip
from servers.faultproxy import FaultProxy


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """Start a cluster for all tests of this process."""
    with start_or_skip(tmp_path_factory.mktemp("ceph")) as started:
        yield started


@pytest.fixture
def bucket(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Make a bucket; the environment leads to it, for this process and its children."""
    for name, value in ceph.environment().items():
        monkeypatch.setenv(name, value)
    made = Bucket(f"test-{secrets.token_hex(6)}", ceph.endpoint)
    made.make()
    return made


@pytest.fixture
def proxy(ceph: Ceph, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Put a proxy in front of the gateway; the environment leads through it from here on."""
    with FaultProxy(ceph.port) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        yield made
