"""Stores that are reached over a network, each started once for all tests that need it.

with Places(directory) as places:
    url, environment = places.make("ceph")     a new place, and what leads a process to it
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from unittest import mock

import pytest

from servers.azurite import make_container
from servers.azurite import start_or_skip as azurite
from servers.buckets import Bucket
from servers.ceph import start_or_skip as ceph
from servers.moosefs import moosefs, needs_moosefs
from servers.swift import needs_swift, swift
from stores.rows import row

ROWS = {
    "ceph": "s3:// on Ceph RGW",
    "azurite": "az:// on Azurite",
    "moosefs": "MooseFS, two mounts",
    "swift": "s3:// on Swift",
}
"""Names of stores, and their rows in the table of docs/stores.md."""

EXCLUSIVE = ("ceph", "azurite", "moosefs")
"""Those of whose writers one wins: what tests know of attempt numbers holds there."""

Make = Callable[[], tuple[str, dict[str, str]]]


def on(*names: str) -> list[object]:
    """Parameters of a fixture: each of these stores, in its row."""
    return [pytest.param(name, marks=row(ROWS[name])) for name in names]


class Places:
    """Servers that run until the end, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._makers: dict[str, Make] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def make(self, name: str) -> tuple[str, dict[str, str]]:
        """The URL of a new place in a store; the caller is skipped where it can not be had."""
        if name not in self._makers:
            start = {"ceph": self._ceph, "azurite": self._azurite, "moosefs": self._moosefs}
            self._makers[name] = {**start, "swift": self._swift}[name](self._directory / name)
        return self._makers[name]()

    def _ceph(self, directory: Path) -> Make:
        directory.mkdir()
        running = self._stack.enter_context(ceph(directory))
        return lambda: bucket_at(running.endpoint, running.environment())

    def _swift(self, directory: Path) -> Make:
        needs_swift()
        running = self._stack.enter_context(swift(directory))
        return lambda: bucket_at(running.endpoint, running.environment())

    def _azurite(self, _: Path) -> Make:
        environment = self._stack.enter_context(azurite())

        def make() -> tuple[str, dict[str, str]]:
            container = new_name()
            make_container(environment["AZURE_STORAGE_ENDPOINT"], container)
            return f"az://{container}/run", environment

        return make

    def _moosefs(self, directory: Path) -> Make:
        needs_moosefs()
        running = self._stack.enter_context(moosefs(directory, ["a", "b"]))
        return lambda: ((running.mounts["a"] / new_name()).as_uri(), {})


def bucket_at(endpoint: str, environment: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A new bucket of an S3 server."""
    name = new_name()
    with mock.patch.dict("os.environ", environment):
        Bucket(name, endpoint).make()
    return f"s3://{name}/run", environment


def new_name() -> str:
    return f"test-{secrets.token_hex(6)}"
