"""A store of ten thousand clients in one process: every operation counted, and time that jumps.

The clock of the loop goes straight to the next timer, so that waiting costs nothing and a run is
the same on every machine.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

from ckptmgr.daemon import committer, resume
from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.restore import verify
from ckptmgr.store.base import Buffers, PutResult, Store, range_of

T = TypeVar("T")

LATENCY_SECONDS, LATENCY_SIGMA = 0.010, 0.5
"""Median and spread (lognormal) of one request."""

AT_ONCE = 64
"""Requests that one daemon has under way at a time."""

PAGE_KEYS = 1000
"""Keys that one request of a listing returns, as object stores do."""


class _Jump(selectors.DefaultSelector):
    """Waits for nothing: where there is a timer, it is that time now."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


@contextmanager
def _clocks(loop: VirtualLoop) -> Iterator[None]:
    """Let the code under test read the clock of the loop, and start no threads."""

    async def inline(work: Any, *arguments: Any) -> Any:
        return work(*arguments)

    clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
    places: list[tuple[Any, str, Any]] = [(one, "time", clock) for one in (committer, resume)]
    places += [(one, "in_thread", inline) for one in (committer, verify)]
    before = [getattr(place, name) for place, name, _ in places]
    try:
        for place, name, value in places:
            setattr(place, name, value)
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    loop = VirtualLoop()
    with _clocks(loop), asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)


class Bucket:
    """The objects of a store, with an index of its directories, and what was asked of it."""

    def __init__(self, seed: int) -> None:
        self.objects: dict[str, bytearray] = {}
        self.below: dict[str, set[str]] = {}
        self.asked: Counter[str] = Counter()
        self.random = random.Random(seed)

    def count(self) -> Counter[str]:
        """What was asked since the last call."""
        found, self.asked = self.asked, Counter()
        return found

    def add(self, key: str, blob: bytearray) -> None:
        self.objects[key] = blob
        for directory in _directories(key):
            self.below.setdefault(directory, set()).add(key)

    def remove(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            for directory in _directories(key):
                self.below[directory].discard(key)


def _directories(key: str) -> Iterator[str]:
    yield ""
    at = key.find("/")
    while at >= 0:
        yield key[: at + 1]
        at = key.find("/", at + 1)


class Door(Store):
    """One daemon's way to the bucket; `asked` are its requests by kind, and their bytes."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return "virtual://bucket"

    def _tally(self, what: str, count: int = 1) -> None:
        self.asked[what] += count
        self._bucket.asked[what] += count

    async def _ask(self, kind: str, requests: int = 1) -> None:
        self._tally(kind, requests)
        seconds = math.log(LATENCY_SECONDS)
        async with self._gate:
            for _ in range(requests):
                await asyncio.sleep(self._bucket.random.lognormvariate(seconds, LATENCY_SIGMA))

    async def put_new(self, key: str, buffers: Buffers) -> PutResult:
        await self._ask("put")
        if key in self._bucket.objects:
            return PutResult.CONFLICT
        blob = bytearray().join(buffers)
        self._tally("bytes put", len(blob))
        self._bucket.add(key, blob)
        return PutResult.OK

    async def get(
        self,
        key: str,
        offset: int = 0,
        length: int | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        await self._ask("get")
        blob = memoryview(self._object(key)).toreadonly()
        found = range_of(key, blob, offset, length, into)
        self._tally("bytes read", len(found))
        return found

    async def list(self, prefix: str) -> list[str]:
        pages = -(-len(self._bucket.below.get(prefix, ())) // PAGE_KEYS)
        await self._ask("list", max(pages, 1))
        found = sorted(self._bucket.below.get(prefix, ()))
        self._tally("keys listed", len(found))
        self._tally("bytes listed", sum(map(len, found)))
        return found

    async def delete(self, key: str) -> None:
        await self._ask("delete")
        self._bucket.remove(key)

    async def make_durable(self, key: str) -> None:
        await self._ask("make_durable")
        self._object(key)

    async def aclose(self) -> None:
        pass

    def _object(self, key: str) -> bytearray:
        try:
            return self._bucket.objects[key]
        except KeyError:
            raise ObjectNotFoundError("does not exist", subject=key) from None
