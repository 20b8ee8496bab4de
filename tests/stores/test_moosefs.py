"""A distributed file system under the local store: two hosts that have mounted one MooseFS."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Barrier

import pytest

from ckptmgr.errors import ObjectNotFoundError
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import StoreSuite
from crash.test_kills import run as kill_at_random
from scale import RACE_KEYS, scaled
from servers.moosefs import Cluster, moosefs, needs_moosefs
from stores.product import damage_over, pass_over
from stores.rows import row

pytestmark = [pytest.mark.root, pytest.mark.timeout(1800), *row("MooseFS, two mounts")]

PUTS_WATCHED = 200
RACED_KEYS, RACERS_OF_A_MOUNT = 50, 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Hosts a and b share one file system."""
    needs_moosefs()
    with moosefs(tmp_path_factory.mktemp("moosefs"), ["a", "b"]) as running:
        yield running


class Turning(StoreSuite):
    """Handles of one test are on the one mount and on the other in turn."""

    race_keys = RACE_KEYS

    @pytest.fixture(autouse=True)
    def _place(self, cluster: Cluster) -> None:
        self.mounts = list(cluster.mounts.values())
        self.shared_url = (self.mounts[0] / "store").as_uri()

    def make_store(self) -> Store:
        self.mounts.reverse()
        return LocalStore(str(self.mounts[0] / "store"))


class TestPromises(Turning):
    """Of what one host put, the other sees all."""


def new_stores(cluster: Cluster) -> tuple[LocalStore, LocalStore]:
    name = f"store-{secrets.token_hex(4)}"
    first, second = (LocalStore(str(mount / name)) for mount in cluster.mounts.values())
    return first, second


async def race(mount: Path, name: str, writer: int, start: Barrier) -> list[int]:
    """The keys that one writer of one mount won; all writers begin each key together."""
    store, won = LocalStore(str(mount / name)), []
    for number in range(RACED_KEYS):
        start.wait(60)
        content = memoryview(f"{writer} won {number}".encode())
        if await store.put_new(f"race/{number}", [content]) is PutResult.OK:
            won.append(number)
    await store.aclose()
    return won


def test_one_writer_wins_over_both_mounts_and_both_see_who(cluster: Cluster) -> None:
    name = f"store-{secrets.token_hex(4)}"
    mounts = [*cluster.mounts.values()] * RACERS_OF_A_MOUNT
    start = Barrier(len(mounts))

    def racer(number: int) -> list[int]:
        return asyncio.run(race(mounts[number], name, number, start))

    with ThreadPoolExecutor(len(mounts)) as threads:
        won = list(threads.map(racer, range(len(mounts))))
    assert sorted(chain.from_iterable(won)) == list(range(RACED_KEYS))
    assert sum(1 for keys in won if keys) > 1, "nobody raced"

    async def look(mount: Path) -> None:
        store = LocalStore(str(mount / name))
        for writer, keys in enumerate(won):
            for number in keys:
                found = bytes(await store.get(f"race/{number}"))
                assert found == f"{writer} won {number}".encode()
        await store.aclose()

    for mount in cluster.mounts.values():
        asyncio.run(look(mount))


def test_what_one_mount_put_the_other_sees_within_the_declared_lag(cluster: Cluster) -> None:
    """The other looks before, too, so that it has something to remember wrongly."""

    async def main() -> tuple[float, float]:
        writer, reader = new_stores(cluster)
        got, listed = 0.0, 0.0
        for number in range(PUTS_WATCHED):
            key = f"dir{number % 7}/{number}"
            for _ in range(2):
                assert not await exists(reader, key)
                assert key not in await reader.list("")
            assert await writer.put_new(key, [memoryview(b"x")]) is PutResult.OK
            returned = time.monotonic()
            if number % 2:
                got = max(got, await seconds_until_got(reader, key, returned))
            else:
                listed = max(listed, await seconds_until_listed(reader, key, returned))
        for store in (writer, reader):
            await store.aclose()
        return got, listed

    got, listed = asyncio.run(main())
    print(f"\nlooks that did not see an object that was put: for {got:.3f} s, lists {listed:.3f} s")
    declared = new_stores(cluster)[0].visibility_lag_seconds
    assert max(got, listed) <= declared


async def exists(store: Store, key: str) -> bool:
    try:
        await store.get(key)
    except ObjectNotFoundError:
        return False
    return True


async def seconds_until_got(store: Store, key: str, since: float) -> float:
    """When the last look that did not find it began; 0 if the first one did."""
    late = 0.0
    while True:
        begun = time.monotonic() - since
        if await exists(store, key):
            return late
        late = begun


async def seconds_until_listed(store: Store, key: str, since: float) -> float:
    late = 0.0
    while True:
        begun = time.monotonic() - since
        if key in await store.list(""):
            return late
        late = begun


def test_the_whole_product(cluster: Cluster, runtime: Path, tmp_path: Path) -> None:
    url = (cluster.mounts["a"] / "product").as_uri()
    pass_over(url, runtime, tmp_path)


def test_damage_seen_from_the_other_mount(cluster: Cluster, tmp_path: Path) -> None:
    damage_over((cluster.mounts["b"] / "damage").as_uri(), tmp_path)


@pytest.mark.timeout(3600)
@pytest.mark.kill
@pytest.mark.parametrize(("victim", "sample", "full"), [("daemon", 4, 60), ("both", 4, 60)])
def test_no_kill_tears_or_loses_anything(
    cluster: Cluster, victim: str, sample: int, full: int
) -> None:
    place = cluster.mounts["a"] / f"kills-{victim}"
    place.mkdir()
    kills = scaled(sample, full)
    places, facts = kill_at_random(victim, kills, place)
    print(f"{kills} kills on MooseFS: {dict(places)} {dict(facts)}")
    assert places.total() == kills
