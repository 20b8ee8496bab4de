"""LocalStore keeps every promise on a real file system, and says exactly what went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import StoreSuite


class TestPromises(StoreSuite):
    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.root = tmp_path / "store"
        self.shared_url = self.root.as_uri()

    def make_store(self) -> Store:
        return LocalStore(str(self.root))
