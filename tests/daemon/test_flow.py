"""Packs reach the store as soon as store and codec allow, whatever the two give.

All of it in virtual time: the decisions are real, the rates are given, and no run differs from
another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import product

import pytest

from bench.twoways import World, save
from bench.virtual import VirtualLoop
from ckptmgr.daemon.flow import flow
from ckptmgr.daemon.route import Route, Send
from ckptmgr.repository.width import AT_ONCE_MIN

MIB = 1 << 20
STORES = (50, 200, 500, 1024, 2000)  # MiB/s
RATIOS = (1.05, 1.2, 1.46)
CODECS = ((500, 320), (250, 250), (1200, 700))  # all encoders, one encoder
PACKS = (1, 3, 4, 8, 16)


def best_fixed(world: Callable[[], World]) -> float:
    return min(min(save(world(), codec).seconds[1:]) for codec in ("none", "planes"))


@pytest.mark.parametrize("packs", PACKS)
@pytest.mark.parametrize("in_turn", [False, True])
def test_after_the_first_snapshot_auto_is_within_5_percent_of_the_best_fixed_codec(
    packs: int, in_turn: bool
) -> None:
    for store, ratio, (codec, encoder) in product(STORES, RATIOS, CODECS):

        def world(at: tuple[float, ...] = (store, codec, encoder, ratio)) -> World:
            return World(*at, packs=packs, in_turn=in_turn)

        seconds = save(world(), "auto").seconds
        best = best_fixed(world)
        case = f"{store} MiB/s, ratio {ratio}, codec {codec}/{encoder}: {seconds} against {best}"
        assert max(seconds[1:]) <= 1.05 * best, case
        probe_seconds = 24 / encoder
        assert seconds[0] <= 1.05 * save(world(), "none", 1).seconds[0] + probe_seconds, case


def test_where_codec_and_store_are_about_as_fast_a_mix_beats_both() -> None:
    def world() -> World:
        return World(400, 250, 150, 1.46)

    done = save(world(), "auto")
    assert set(done.sent[-1].values()) == {"raw", "compressed"}
    assert done.seconds[-1] < 0.95 * best_fixed(world)


@pytest.mark.parametrize("seed", range(3))
def test_noise_does_not_mislead_it(seed: int) -> None:
    """Latencies and sizes vary by a factor; means of several snapshots are compared."""
    for store in STORES[:-1]:  # on the fastest it is the latency that counts, and that is noise

        def world(store: float = store) -> World:
            return World(store, ratio=1.46, latency=0.02 * (seed + 1), noise=0.5)

        def mean(codec: str, world: Callable[[], World] = world) -> float:
            return sum(save(world(), codec, 7).seconds[2:])

        assert mean("auto") <= 1.05 * min(mean("none"), mean("planes")), store


def test_a_store_that_becomes_slow_is_compressed_for_and_a_fast_one_is_not() -> None:
    def sent(store: float) -> list[str]:
        return list(save(World(store, ratio=1.46), "auto").sent[-1].values())

    assert sent(50).count("compressed") >= 14
    assert sent(4000).count("compressed") <= 1


def test_a_store_with_latency_gets_more_packs_at_once_and_a_disk_does_not() -> None:
    far = save(World(2000, latency=0.2, stream=150, packs=32), "none", 4)
    assert far.width == 16
    assert far.seconds[-1] < 0.5 * 32 * 64 / 300, "as with two at a time"
    disk = save(World(1500, packs=32), "none", 6)
    assert disk.width <= 2 * AT_ONCE_MIN


def test_ranks_of_one_host_share_the_places_before_the_store() -> None:
    alone = save(World(200, packs=32), "none", 2).seconds[-1]
    four = save(World(200, packs=8), "none", 2, ranks=4)
    assert four.seconds[-1] == pytest.approx(alone, rel=0.05)


@pytest.mark.parametrize("buffers", [1, 2, 3, 8])
@pytest.mark.parametrize("codec", ["none", "planes", "auto"])
def test_it_ends_with_any_number_of_buffers(codec: str, buffers: int) -> None:
    for store, packs in product((50, 4000), (1, 2, 7)):
        save(World(store, ratio=3, buffers=buffers, packs=packs), codec)


def test_a_buffer_that_never_comes_free_stops_nothing() -> None:
    """A restore from a dead store has the whole budget: raw packs need none of it."""

    class NoBuffer:
        def __init__(self) -> None:
            self.raws = 0

        def spare(self) -> bool:
            return False

        async def raw(self, index: int) -> None:
            async with route.putting(64 * MIB):
                await asyncio.sleep(1.0)
            self.raws += 1

        async def compressed(self, index: int, encoded: Callable[[], None]) -> None:
            raise AssertionError(index)

        async def probe(self) -> None:
            begun = route.begin()
            await asyncio.sleep(0.01)
            route.encoded(begun, 64 * MIB, 1 * MIB)

    loop = VirtualLoop()
    route, packs = Route(2, loop.time), NoBuffer()
    loop.run_until_complete(flow(route, [64 * MIB] * 12, "auto", packs))
    loop.close()
    assert packs.raws == 12


@pytest.mark.parametrize("codec", ["none", "planes"])
def test_a_failure_gives_every_place_back(codec: str) -> None:
    class Failing:
        started = 0

        def spare(self) -> bool:
            return True

        async def raw(self, index: int) -> None:
            self.started += 1
            async with route.putting(1):
                await asyncio.sleep(0.001 if index == 1 else 1.0)
                raise OSError(index)

        async def compressed(self, index: int, encoded: Callable[[], None]) -> None:
            encoded()
            async with route.place(1):
                await self.raw(index)

        async def probe(self) -> None:
            raise AssertionError

    async def main() -> None:
        packs = Failing()
        with pytest.raises(OSError, match="1"):
            await flow(route, [1] * 9, codec, packs)
        assert packs.started <= 3, "it went on after the failure"
        assert route.pending_bytes == 0
        for _ in range(AT_ONCE_MIN):
            assert route.next("none", 1, spare=True) is Send.RAW
            route.take_place(1)
        assert route.next("none", 1, spare=True) is None
        assert route.next("planes", 1, spare=True) is Send.COMPRESSED
        assert route.store.running == 0

    loop = VirtualLoop()
    route = Route(2, loop.time)
    loop.run_until_complete(main())
    loop.close()
