"""Stores of a known rate: what is put takes as long as its bytes take on a link of that rate."""

from __future__ import annotations

import asyncio

from ckptmgr.bucket import Bucket
from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.store.base import Buffers, PutResult, Store, range_of


class SinkStore(Store):
    """Keeps small objects (records) and forgets the bytes of packs: to put costs nothing."""

    KEEP_BYTES_MAX = 1 << 20

    def __init__(self, name: str) -> None:
        self._name = name
        self._objects: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"sink://{self._name}"

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        size = sum(map(len, buffers))
        small = size <= self.KEEP_BYTES_MAX
        self._objects[key] = b"".join(buffers) if small else b""
        return PutResult.OK

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        return range_of(key, memoryview(self._object(key)), offset, length, into)

    async def list(self, prefix: str) -> list[str]:
        return sorted(key for key in self._objects if key.startswith(prefix))

    async def delete(self, key: str) -> None:
        self._objects.pop(key, None)

    async def make_durable(self, key: str) -> None:
        self._object(key)

    async def aclose(self) -> None:
        pass

    def _object(self, key: str) -> bytes:
        if key not in self._objects:
            raise ObjectNotFoundError("does not exist", subject=key)
        return self._objects[key]


class ThrottledStore(SinkStore):
    """A sink behind a link of `rate` bytes per second, which serves one put after the other."""

    def __init__(self, name: str, rate: float) -> None:
        super().__init__(name)
        self._bucket = Bucket(rate)

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        nbytes = sum(map(len, buffers))
        wait = self._bucket.reserve(nbytes)
        await asyncio.sleep(wait + nbytes / self._bucket.rate)
        return await super().put_new(key, buffers)
