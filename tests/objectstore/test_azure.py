"""The objects of Azure's emulator keep every promise of a store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from ckptmgr.store.base import Store
from ckptmgr.store.registry import open_store
from ckptmgr.testing import StoreSuite
from scale import RACE_KEYS, STORES
from servers.azurite import make_container, start_or_skip

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.stores(place="az:// on Azurite"),
    pytest.mark.skipif(not STORES, reason="az:// is checked with CKPTMGR_STORES=1"),
]


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    with (
        start_or_skip() as environment,
        mock.patch.dict(os.environ, environment),
    ):
        name = f"test-{secrets.token_hex(6)}"
        make_container(environment["AZURE_STORAGE_ENDPOINT"], name)
        yield name


class TestPromises(StoreSuite):
    race_keys = RACE_KEYS

    @pytest.fixture(autouse=True)
    def _place(self, container: str, tmp_path: Path) -> None:
        self.shared_url = f"az://{container}/{tmp_path.name}"

    def make_store(self) -> Store:
        return open_store(self.shared_url)
