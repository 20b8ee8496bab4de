"""memory://name: objects in a dict of this process; the twin that says what a store does."""

from __future__ import annotations

from collections.abc import Sequence

from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.store.base import (
    Buffers,
    PutResult,
    Store,
    Wanted,
    check_key,
    check_prefix,
    range_of,
)

_SHELVES: dict[str, dict[str, bytearray]] = {}
"""One shelf per name for the life of the process: opening a name again finds its objects."""


class MemoryStore(Store):
    """Every promise of `Store` on a dict, whose `setdefault` is exclusive and atomic."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shelf = _SHELVES.setdefault(name, {})

    @property
    def url(self) -> str:
        """As `Store.url`."""
        return f"memory://{self._name}"

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        """As `Store.put_new`."""
        # A bytearray, because no two are the same object: equal bytes may be.
        blob = bytearray().join(buffers)
        won = self._shelf.setdefault(check_key(key), blob) is blob
        return PutResult.OK if won else PutResult.CONFLICT

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """As `Store.get`."""
        blob = memoryview(self._object(key)).toreadonly()
        return range_of(key, blob, offset, length, into)

    async def get_many(self, wanted: Sequence[Wanted]) -> None:
        """As `Store.get_many`: one after the other, for none of them waits."""
        for one in wanted:
            await self.get(one.key, one.offset, into=one.into)

    async def list(self, prefix: str) -> list[str]:
        """As `Store.list`."""
        check_prefix(prefix)
        return sorted(key for key in list(self._shelf) if key.startswith(prefix))

    async def delete(self, key: str) -> None:
        """As `Store.delete`."""
        self._shelf.pop(check_key(key), None)

    async def make_durable(self, key: str) -> None:
        """As `Store.make_durable`."""
        self._object(key)

    async def aclose(self) -> None:
        """Nothing to release: the objects stay for the next who opens the name."""

    def _object(self, key: str) -> bytearray:
        try:
            return self._shelf[check_key(key)]
        except KeyError:
            raise ObjectNotFoundError("does not exist", subject=key) from None
