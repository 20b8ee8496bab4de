"""The store of docs/write-a-store.md keeps every promise, as it stands on the page."""

from __future__ import annotations

import importlib
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.store.base import Store
from ckptmgr.testing import StoreSuite
from scale import RACE_PROCESSES

TREE = Path(__file__).parents[2]
PAGE = TREE / "docs/write-a-store.md"
LINES_MAX = 75


def block(number: int) -> str:
    """A piece of code of the page."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A directory with the page's store as an installed distribution, here and for children."""
    found = tmp_path_factory.mktemp("site")
    (found / "my_stores.py").write_text(block(0))
    info = found / "my_stores-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-stores\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ckptmgr.stores]\nsqlite = my_stores:SqliteStore\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(found)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(found), str(TREE)]))
        yield importlib.import_module("my_stores")
    del sys.modules["my_stores"]


class TestTheStoreOfThePage(StoreSuite):
    big_bytes = 5 * 4096
    race_processes = RACE_PROCESSES
    race_keys = 20  # each put waits for a disk

    @pytest.fixture(autouse=True)
    def _page(self, site: Any, tmp_path: Path) -> None:
        self._site = site
        self.shared_url = f"sqlite://{tmp_path}/{secrets.token_hex(4)}.db"

    def make_store(self) -> Store:
        store: Store = self._site.SqliteStore(self.shared_url)
        return store


def test_it_fits_a_page() -> None:
    lines = [line for line in block(0).splitlines() if line.strip()]
    assert len(lines) <= LINES_MAX


def test_the_suite_of_the_page_is_a_suite(site: Any) -> None:
    names: dict[str, Any] = {"SqliteStore": site.SqliteStore}
    exec(block(1), names)
    assert issubclass(names["TestSqliteStore"], StoreSuite)
    assert names["TestSqliteStore"]().make_store().url == "sqlite:///tmp/suite.db"
