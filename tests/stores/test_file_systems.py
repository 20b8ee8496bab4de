"""The local store keeps its promises on the file systems that Linux has for one machine.

A sample in each run of the suite; whole, with big objects and 16 racing processes, and with the
whole product on top, under `make stores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MIB, StoreSuite
from processes import needs_root
from scale import RACE_KEYS, STORES
from servers.filesystems import (
    FILE_SYSTEMS,
    make_file,
    mounted_file,
    mounted_tmpfs,
    needs_file_system,
)
from stores.product import pass_over
from stores.rows import row

SIZE_MIB = 1024 if STORES else 320
"""A file with holes: what is written is taken from the disk, and no more."""


@contextmanager
def mounted(system: str, place: Path) -> Iterator[Path]:
    """A new file system of one kind; below `place` is what holds it."""
    if system == "tmpfs":
        needs_root()
        with mounted_tmpfs(place / "mnt", f"{SIZE_MIB}m") as directory:
            yield directory
        return
    kind = needs_file_system(system)
    make_file(kind, place / "disk.img", SIZE_MIB)
    with mounted_file(kind, place / "disk.img", place / "mnt") as directory:
        yield directory


class Mounted(StoreSuite):
    """The suite on one file system, which is mounted once for all its tests."""

    system: str

    if STORES:
        race_keys = RACE_KEYS
    else:
        big_bytes = 2 * MIB
        race_processes = 2
        race_keys = 50

    @pytest.fixture(scope="class")
    @classmethod
    def directory(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        with mounted(cls.system, tmp_path_factory.mktemp("disk")) as directory:
            yield directory

    @pytest.fixture(autouse=True)
    def _place(self, directory: Path) -> None:
        self.root = directory / "store"
        self.shared_url = self.root.as_uri()

    def make_store(self) -> Store:
        return LocalStore(str(self.root))


@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.stores(place="local on ext4")
class TestExt4(Mounted):
    system = "ext4"


@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.stores(place="local on xfs")
class TestXfs(Mounted):
    system = "xfs"


@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.stores(place="local on btrfs")
class TestBtrfs(Mounted):
    system = "btrfs"


@pytest.mark.root
@pytest.mark.timeout(1800)
@pytest.mark.stores(place="local on tmpfs")
class TestTmpfs(Mounted):
    system = "tmpfs"


@pytest.mark.root
@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=row(f"local on {name}")) for name in (*FILE_SYSTEMS, "tmpfs")],
)
def test_the_whole_product(system: str, runtime: Path, tmp_path: Path) -> None:
    with mounted(system, tmp_path) as directory:
        pass_over((directory / "store").as_uri(), runtime, tmp_path)
