"""A store and a codec of known rates, in virtual time, around the real decisions.

Puts share the store's rate, none is faster than one stream, and each has a latency; encoders share
the cores. Nothing here is measured: the same numbers come out on every machine.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.virtual import VirtualLoop
from ckptmgr.config import CHUNK_BYTES, MIB, PACK_BYTES
from ckptmgr.daemon.flow import flow
from ckptmgr.daemon.route import PROBE_CHUNKS, Route


@dataclass(slots=True)
class Shared:
    """Something whose rate its users share alike; one alone gets at most `alone`."""

    rate: float
    alone: float
    _each: float = 0.0  # bytes that a user has got who is there since the beginning
    _at: float = 0.0
    _ends: list[tuple[float, int, asyncio.Future[None]]] = field(default_factory=list)
    _timer: asyncio.TimerHandle | None = None
    _count: int = 0

    async def move(self, nbytes: float) -> None:
        loop = asyncio.get_running_loop()
        self._go_on(loop)
        self._count += 1
        ended = loop.create_future()
        heapq.heappush(self._ends, (self._each + nbytes, self._count, ended))
        self._set_timer(loop)
        await ended

    def _speed(self) -> float:
        return min(self.alone, self.rate / len(self._ends))

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._ends:
            self._each += (loop.time() - self._at) * self._speed()
        self._at = loop.time()

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ends:
            left = max(self._ends[0][0] - self._each, 0.0) / self._speed()
            self._timer = loop.call_later(left, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._go_on(loop)
        while self._ends and self._ends[0][0] <= self._each + 1:
            heapq.heappop(self._ends)[2].set_result(None)
        self._set_timer(loop)


@dataclass(slots=True)
class InTurn:
    """Something that serves one user after the other."""

    rate: float
    _free_at: float = 0.0

    async def move(self, nbytes: float) -> None:
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + nbytes / self.rate
        await asyncio.sleep(self._free_at - now)


@dataclass(slots=True)
class World:
    """Rates in MiB/s. `noise` is the spread of how well a pack compresses and of every latency;
    `in_turn` says that the store serves one put after the other. Buffers are the daemon's.
    """

    store: float
    codec: float = 500.0
    encoder: float = 320.0
    ratio: float = 1.2
    latency: float = 0.002
    stream: float = 1e9
    buffers: int = 2
    packs: int = 16
    noise: float = 0.0
    in_turn: bool = False
    link: Shared | InTurn = field(init=False)
    cores: Shared = field(init=False)

    def __post_init__(self) -> None:
        shared = Shared(self.store * MIB, self.stream * MIB)
        self.link = InTurn(self.store * MIB) if self.in_turn else shared
        self.cores = Shared(self.codec * MIB, self.encoder * MIB)


class SimulatedPacks:
    """One snapshot in a world."""

    def __init__(self, world: World, route: Route, seed: int) -> None:
        self._world, self._route = world, route
        self._buffers = asyncio.Semaphore(world.buffers)
        self._random = random.Random(seed)
        self.sent: dict[int, str] = {}

    def spare(self) -> bool:
        return not self._buffers.locked()

    async def raw(self, index: int) -> None:
        self.sent[index] = "raw"
        await self._put(PACK_BYTES)

    async def compressed(self, index: int, encoded: Callable[[], None]) -> None:
        self.sent[index] = "compressed"
        async with self._buffers:
            nbytes = await self._encode(PACK_BYTES)
            encoded()
            async with self._route.place(nbytes):
                await self._put(nbytes)

    async def probe(self) -> None:
        await self._probe(PROBE_CHUNKS)
        await asyncio.gather(*(self._probe(1) for _ in range(self._route.encoders)))

    async def _probe(self, chunks: int) -> None:
        async with self._buffers:
            await self._encode(chunks * CHUNK_BYTES)

    async def _encode(self, nbytes: int) -> int:
        begun = self._route.begin()
        await self._world.cores.move(nbytes)
        ratio = 1 + (self._world.ratio - 1) * self._spread()
        stored = min(int(nbytes / ratio), nbytes)
        self._route.encoded(begun, nbytes, stored)
        return stored

    async def _put(self, nbytes: int) -> None:
        async with self._route.putting(nbytes):
            await asyncio.sleep(self._world.latency * self._spread())
            await self._world.link.move(nbytes)

    def _spread(self) -> float:
        return self._random.lognormvariate(0.0, self._world.noise) if self._world.noise else 1.0


@dataclass(frozen=True, slots=True)
class Saves:
    """Seconds of each snapshot, how its packs were sent, and where the width ended."""

    seconds: list[float]
    sent: list[dict[int, str]]
    width: int


def save(world: World, codec: str, snapshots: int = 3, ranks: int = 1) -> Saves:
    """Some snapshots one after the other, of `ranks` at once, on a route of their own."""
    with _loop() as loop:
        return loop.run_until_complete(_save(world, codec, snapshots, ranks, loop.time))


async def _save(
    world: World, codec: str, snapshots: int, ranks: int, clock: Callable[[], float]
) -> Saves:
    route, seconds, sent = Route(2, clock), [], []
    sizes = [PACK_BYTES] * world.packs
    for turn in range(snapshots):
        start = clock()
        packs = [SimulatedPacks(world, route, turn * ranks + rank) for rank in range(ranks)]
        await asyncio.gather(*(flow(route, sizes, codec, one) for one in packs))
        seconds.append(clock() - start)
        sent += [one.sent for one in packs]
        assert all(len(one.sent) == world.packs for one in packs)
    return Saves(seconds, sent, route.width.now)


@contextmanager
def _loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    try:
        yield loop
    finally:
        loop.close()
