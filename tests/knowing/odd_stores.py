"""Stores that break one promise each, as a plugin that every process finds."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ckptmgr.errors import ObjectNotFoundError, StorePermissionError
from ckptmgr.store.base import Buffers, PutResult
from ckptmgr.store.finding import Finding
from ckptmgr.store.local import LocalStore
from ckptmgr.types import PAGE_BYTES

CLOCK_SECONDS = 3600.0


class _Local(LocalStore):
    scheme = ""

    def __init__(self, url: str) -> None:
        self._path = Path(url.partition("://")[2])
        super().__init__(str(self._path))

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self._path}"


class Broken(_Local):
    """Three faults that do not hide each other: a cache shows objects of one page late and declares
    no lag, large objects come back with another bit, and their dates are those of a server whose
    clock is ahead.
    """

    scheme = "broken"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._looks = Counter[tuple[str, str]]()

    def _hidden(self, how: str, key: str) -> bool:
        """The first look of a client at an object of one page does not see it."""
        path = self._path / key
        if not path.exists() or path.stat().st_size != PAGE_BYTES:
            return False
        self._looks[how, key] += 1
        return self._looks[how, key] == 1

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        result = await super().put_new(key, buffers)
        os.utime(self._path / key, (time.time() + CLOCK_SECONDS,) * 2)
        return result

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        if self._hidden("get", key):
            raise ObjectNotFoundError("is not there yet", subject=key)
        found = await super().get(key, offset, length, into)
        if len(found) > 1 << 16:
            found[1234] ^= 1
        return found

    async def list(self, prefix: str) -> list[str]:
        found = await super().list(prefix)
        return [key for key in found if not self._hidden("list", key)]


class Declared(_Local):
    """Says that it is exclusive, and lets everybody win; nothing can be deleted."""

    scheme = "declared"
    exclusive = True

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        await super().put_new(key, buffers)
        return PutResult.OK

    async def examine(self, key: str, put_between: tuple[float, float]) -> Sequence[Finding]:
        return ()

    async def delete(self, key: str) -> None:
        raise StorePermissionError("is under an object lock", subject=key)


def install(site: Path) -> str:
    """Make a distribution that names them; returns what PYTHONPATH must have."""
    info = site / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    kinds = (Broken, Declared)
    stores = "".join(f"{kind.scheme} = knowing.odd_stores:{kind.__name__}\n" for kind in kinds)
    (info / "entry_points.txt").write_text(f"[ckptmgr.stores]\n{stores}")
    tests = Path(__file__).parents[1]
    return os.pathsep.join(map(str, [site, tests, tests.parent]))
