"""Stores that break one promise each, as a plugin that every process finds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.store.base import Buffers, PutResult
from ckptmgr.store.finding import Finding
from ckptmgr.store.local import LocalStore

LATE_SECONDS = 2.0
CLOCK_SECONDS = 3600.0


class _Local(LocalStore):
    scheme = ""

    def __init__(self, url: str) -> None:
        self._path = Path(url.partition("://")[2])
        super().__init__(str(self._path))

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self._path}"


class Late(_Local):
    """Shows an object some seconds after it was put, and declares no lag: a cache in between."""

    scheme = "late"

    def _hidden(self, key: str) -> bool:
        try:
            return time.time() - (self._path / key).stat().st_mtime < LATE_SECONDS
        except FileNotFoundError:
            return False

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        if self._hidden(key) and len(await super().get(key)) == 4096:
            raise ObjectNotFoundError("is not there yet", subject=key)
        return await super().get(key, offset, length, into)

    async def list(self, prefix: str) -> list[str]:
        return [key for key in await super().list(prefix) if not self._hidden(key)]


class Rotten(_Local):
    """Gives one other bit than it was given, in large objects."""

    scheme = "rotten"

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        found = await super().get(key, offset, length, into)
        if len(found) > 1 << 16:
            found[1234] ^= 1
        return found


class Ahead(_Local):
    """Dates its objects by a clock that is an hour ahead, as a file server's may be."""

    scheme = "ahead"

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        result = await super().put_new(key, buffers)
        os.utime(self._path / key, (time.time() + CLOCK_SECONDS,) * 2)
        return result


class Declared(_Local):
    """Says that it is exclusive, and lets everybody win."""

    scheme = "declared"
    exclusive = True

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        await super().put_new(key, buffers)
        return PutResult.OK

    async def examine(self, key: str, put_between: tuple[float, float]) -> Sequence[Finding]:
        return ()


class Undeletable(_Local):
    """Does not let objects be deleted, as a bucket with an object lock."""

    scheme = "undeletable"

    async def delete(self, key: str) -> Any:
        from ckptmgr.errors import StorePermissionError

        raise StorePermissionError("may not be deleted", subject=key)


def install(site: Path) -> str:
    """Make a distribution that names them; returns what PYTHONPATH must have."""
    info = site / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    kinds = (Late, Rotten, Ahead, Declared, Undeletable)
    stores = "".join(f"{kind.scheme} = knowing.stores:{kind.__name__}\n" for kind in kinds)
    (info / "entry_points.txt").write_text(f"[ckptmgr.stores]\n{stores}")
    tests = Path(__file__).parents[1]
    return os.pathsep.join(map(str, [site, tests, tests.parent]))
