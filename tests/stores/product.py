"""The whole product over any store, by its URL: save, kill, restore bit by bit, verify, damage.

    pass_over(url, runtime, scratch)    all of it, with a trainer and a daemon of their own
    damage_over(url, scratch)           objects of every kind, damaged one by one

What is damaged is damaged through the store, by deleting an object and putting another one under
its name: so it works wherever the bytes live.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import verify_store
from ckptmgr.store.base import PutResult, Store
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import Outcome
from crash.damaged import KINDS, LOSES_NOTHING, Rig
from driven import PYTHON_PATH, Daemon, Rank, Trainer, events_of, until
from processes import end_processes_of
from small_step import Objects, made_in_memory, save_every_kind, smallest_state

STEPS = 5
DAMAGES_OF_A_KIND = 4
Work = Callable[[Store], Awaitable[None]]


def pass_over(url: str, runtime: Path, scratch: Path) -> None:
    """A trainer saves and is killed with its daemon; host memory is lost; all is still there."""
    acked = saved_and_killed(url, runtime)
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime) as daemon, Rank(runtime, url) as rank:
        came = rank.restore()  # compares every bit
        assert (came.attempt, came.step) >= (1, acked)
        assert not came.skipped
        rank.save(acked + STEPS + 1)
        assert Outcome(rank.wait(acked + STEPS + 1).outcome) is Outcome.COMMITTED
        assert daemon.end(signal.SIGTERM) == 0
    assert damage_in(url) == []
    damage_over(f"{url}-damaged", scratch)


def saved_and_killed(url: str, runtime: Path) -> int:
    """Save STEPS steps; SIGKILL trainer and daemon. Returns the last step that was committed."""
    environment = {**os.environ, "PYTHONPATH": python_path()}
    with Trainer(runtime, url, steps=STEPS, environment=environment) as trainer:
        trainer.await_event("finished")
        until(lambda: commits_told(runtime), "a step is committed")
        trainer.kill()
    acked = max(commits_told(runtime))
    end_processes_of(runtime)
    return acked


def commits_told(runtime: Path) -> list[int]:
    """Steps that a daemon has called committed."""
    events = events_of(runtime / "daemon.log")
    return [int(e["step"].partition(".")[2]) for e in events if e["event"] == "committed"]


def python_path() -> str:
    """Where children find the tree, its tests, and what the caller added: plugins."""
    return os.pathsep.join([PYTHON_PATH, os.environ.get("PYTHONPATH", "")])


def with_store(url: str, work: Work) -> None:
    """Do something with the store of a URL, through retries as the product does."""

    async def main() -> None:
        store = RetryingStore(open_store(url))
        try:
            await work(store)
        finally:
            await store.aclose()

    asyncio.run(main())


def damage_in(url: str) -> list[str]:
    """Keys that `verify --all` finds damaged; at least one step must be there."""
    found: list[str] = []

    async def look(store: Store) -> None:
        reports = await verify_store(
            Catalog(store), None, every=True, quick=False, progress=lambda _: None
        )
        assert any(report["committed"] for report in reports)
        found.extend(d["key"] for report in reports for d in report["damage"])

    with_store(url, look)
    return found


def damage_over(url: str, scratch: Path, of_a_kind: int = DAMAGES_OF_A_KIND) -> None:
    """Flipped, cut, grown, swapped and lost objects are named by verify, and never restored as
    other bits: so many damages of each kind of object, and each object deleted once.
    """
    saved, objects = made_in_memory(lambda store: save_every_kind(store, smallest_state))
    directory = scratch / "restored"
    directory.mkdir()
    chance = random.Random(7)

    async def sweep(store: Store) -> None:
        for key, blob in objects.items():
            assert await store.put_new(key, [memoryview(blob)]) is PutResult.OK
        rig = Rig(saved, objects, store, directory)
        assert await rig.verify() == []
        assert await rig.restore() == str(rig.newest.id)
        for kind in KINDS:
            for key in chance.choices(rig.keys_of(kind), k=of_a_kind):
                await replace(store, key, damaged(objects, key, chance))
                await rig.judge(key)
                await replace(store, key, objects[key])
        for key in rig.keys_of("packs") + rig.keys_of("manifests") + rig.keys_of("registers"):
            if key.startswith(LOSES_NOTHING):
                continue
            await store.delete(key)
            assert key in {name for name, _ in await rig.verify()}
            rig.counts["found gone"] += 1
            await rig.restore()
            await store.put_new(key, [memoryview(objects[key])])
        assert await rig.restore() == str(rig.newest.id)
        rig.tell(f"damage over {url}")
        assert rig.counts["fell back"] > 0

    with_store(url, sweep)


def damaged(objects: Objects, key: str, chance: random.Random) -> bytes:
    """One bit flipped, the end cut off, something added, or all of another object."""
    blob, kind = objects[key], chance.random()
    if kind < 0.3:
        return blob[: chance.randrange(len(blob))]
    if kind < 0.4:
        return blob + b"x"
    if kind < 0.5:
        return objects[chance.choice([other for other in objects if other != key])]
    changed = bytearray(blob)
    changed[chance.randrange(len(blob))] ^= 1 << chance.randrange(8)
    return bytes(changed)


async def replace(store: Store, key: str, blob: bytes) -> None:
    """Other bytes under the same key, as no writer of ours does."""
    await store.delete(key)
    assert await store.put_new(key, [memoryview(blob)]) is PutResult.OK
