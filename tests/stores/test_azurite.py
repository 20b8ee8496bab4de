"""Azure's blobs, as its emulator serves them, through the plugin's entry point."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.store.base import Store
from ckptmgr.store.registry import open_store
from ckptmgr.testing import StoreSuite
from servers.azurite import Azurite, azurite, needs_azurite
from stores.product import pass_over
from stores.rows import row

pytestmark = row("Azurite, az://")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """One emulator for all tests of this file."""
    program = needs_azurite()
    with azurite(program, tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture
def url(emulator: Azurite, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place in a new container; the environment leads to it, for children too."""
    for name, value in emulator.environment().items():
        monkeypatch.setenv(name, value)
    container = f"test-{secrets.token_hex(6)}"
    emulator.make_container(container)
    return f"az://{container}/some/run"


class TestPromises(StoreSuite):
    race_processes = 8
    race_keys = 40

    @pytest.fixture(autouse=True)
    def _place(self, url: str) -> None:
        self.shared_url = url

    def make_store(self) -> Store:
        return open_store(str(self.shared_url))


def test_what_it_decides_is_not_taken_on_trust(url: str) -> None:
    assert open_store(url).exclusive is None


def test_the_whole_product(url: str, runtime: Path, tmp_path: Path) -> None:
    pass_over(url, runtime, tmp_path)
