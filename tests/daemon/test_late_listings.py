"""A reader and a collector meet on a store that shows each of them late what the other put."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from ckptmgr.daemon import retain
from ckptmgr.errors import DamageError, ObjectNotFoundError
from ckptmgr.repository.hold import put_hold
from ckptmgr.store.base import Buffers, PutResult
from ckptmgr.store.memory import MemoryStore
from small_step import memory_store, save_steps, shelf_of

LAG = 6.0


@dataclass
class World:
    """Virtual time, and who put what when; what is not in `put` has been there for ever."""

    now: float = 0.0
    put: dict[str, tuple[float, str]] = field(default_factory=dict)


class LateStore(MemoryStore):
    """One party's view of a store: its own objects at once, those of others LAG seconds late."""

    visibility_lag_seconds = LAG

    def __init__(self, inner: MemoryStore, world: World, who: str) -> None:
        super().__init__(inner.url.removeprefix("memory://"))
        self._shelf = shelf_of(inner)
        self._world, self._who = world, who

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        result = await super().put_new(key, buffers)
        if result is PutResult.OK:
            self._world.put[key] = self._world.now, self._who
        return result

    async def list(self, prefix: str) -> list[str]:
        return [key for key in await super().list(prefix) if self._shows(key)]

    def _shows(self, key: str) -> bool:
        at, who = self._world.put.get(key, (-LAG, ""))
        return who == self._who or self._world.now >= at + LAG

    def _object(self, key: str) -> bytearray:
        if not self._shows(key):
            raise ObjectNotFoundError("does not exist", subject=key)
        return super()._object(key)


@pytest.mark.parametrize("read_at", [0.0, 0.1, 3.0, 5.9, 6.0, 6.1, 11.9, 12.0, 12.1, 20.0])
def test_nobody_reads_what_is_being_deleted(
    read_at: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the reader comes: it is told that the step is retired, or its hold is respected."""

    async def main() -> None:
        inner, world = memory_store({}), World()
        (saved,) = await save_steps(inner, (10,))
        reader, collector = (LateStore(inner, world, who) for who in ("reader", "collector"))
        held: list[bool] = []

        async def read() -> None:
            world.now = max(world.now, read_at)
            try:
                await put_hold(reader, saved.id, "reader", "")
            except DamageError:
                held.append(False)
            else:
                held.append(True)

        async def sleep(seconds: float) -> None:
            end = world.now + seconds
            if read_at < end:
                await read()
            world.now = end

        monkeypatch.setattr(retain.asyncio, "sleep", sleep)
        deleted = await retain.retire(collector, saved.id, "for the test")
        if not held:
            await read()
        assert held in ([True], [False])
        assert not (held[0] and deleted), "data that is held was deleted"

    asyncio.run(main())
