"""MemoryStore, the twin, keeps every promise of a store."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from ckptmgr.store.base import Store
from ckptmgr.store.memory import MemoryStore
from ckptmgr.testing import StoreSuite


class TestPromises(StoreSuite):
    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        self.name = secrets.token_hex(8)

    def make_store(self) -> Store:
        return MemoryStore(self.name)


def test_names_are_worlds_of_their_own() -> None:
    async def main() -> None:
        one, other = MemoryStore(secrets.token_hex(8)), MemoryStore(secrets.token_hex(8))
        await one.put_new("key", [memoryview(b"x")])
        assert await other.list("") == []
        assert await MemoryStore(one.url.removeprefix("memory://")).list("") == ["key"]

    asyncio.run(main())


def test_what_was_got_can_not_be_changed() -> None:
    async def main() -> None:
        store = MemoryStore(secrets.token_hex(8))
        await store.put_new("key", [memoryview(b"x")])
        got = await store.get("key")
        assert got.readonly

    asyncio.run(main())
