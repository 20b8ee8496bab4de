"""A Ceph gateway for the tests of a session, and a bucket for each."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from servers.buckets import make_bucket
from servers.ceph import Ceph, start_or_skip


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    """Start a cluster for all tests of this process."""
    with start_or_skip(tmp_path_factory.mktemp("ceph")) as started:
        yield started


@pytest.fixture
def bucket(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a bucket; the environment leads to it, for this process and its children."""
    for name, value in ceph.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{secrets.token_hex(6)}"
    make_bucket(name)
    return name
