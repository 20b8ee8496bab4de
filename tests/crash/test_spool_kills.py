"""kill -9 of daemons while snapshots are spooled and drained, through outages of the store."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import restore_files
from ckptmgr.restore.fetch import fetch
from ckptmgr.restore.plan import plan_whole
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome
from crash.content import fault_in
from driven import Daemon, Rank, files_below, ranks, until
from processes import end_processes_of
from rigged import Rig
from scale import scaled

pytestmark = [pytest.mark.kill, pytest.mark.reliability]

MIB = 1


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    monkeypatch.setenv("CKPTMGR_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("CKPTMGR_SPOOL_SECONDS", "0.3")
    return found


def parents(url: str, directory: Path) -> list[tuple[str, str]]:
    """Commits and the commit before each, oldest first; every bit of each is compared."""

    async def read() -> list[tuple[str, str]]:
        store = open_store(url)
        catalog = Catalog(store)
        found = []
        async for decision in catalog.committed():
            out = directory / f"out-{decision.id}"
            out.mkdir()
            await restore_files(catalog, str(decision.id), "safetensors", out, lambda _: None)
            blob = (out / "state.safetensors").read_bytes()
            body = blob[8 + int.from_bytes(blob[:8], "little") :]
            assert not fault_in(body, decision.attempt, decision.step, MIB << 20)
            shutil.rmtree(out)
            found.append((str(decision.id), "{}.{}".format(*decision.parent)))
        await store.aclose()
        return found[::-1]

    return asyncio.run(read())


def parts_in(spool: Path) -> int:
    return sum(len(files_below(job)) for job in spool.glob("*/man"))


def parts(tmp_path: Path) -> int:
    return parts_in(tmp_path / "spool")


def test_all_snapshots_of_an_outage_arrive_in_order(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    """Without host memory in the end, and with a daemon that is killed among them."""
    last = 1 + scaled(16, 50)
    with Rank(runtime, rig.url, keep=100, mib=MIB) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("*", "", "dead"))
        for step in range(2, last + 1):
            rank.save(step)
            if step % 10 == 0:
                end_processes_of(runtime)
        until(lambda: parts(tmp_path) == last - 1, "all are in the spool")
    end_processes_of(runtime)
    for path in (runtime / "buffers").iterdir():
        path.unlink()
    rig.obey()
    with Daemon(runtime) as daemon:
        daemon.await_event("drained_step", 5)
        daemon.end(signal.SIGKILL)
    with Daemon(runtime):
        until(lambda: parts(tmp_path) == 0, "the spool is empty")
        with Rank(runtime, rig.url, mib=MIB) as rank:
            assert rank.restore().step == last
    found = parents(rig.file_url, tmp_path)
    assert found == [(f"1.{s}", f"1.{s - 1}" if s > 1 else "0.0") for s in range(1, last + 1)]


def test_two_hosts_bring_all_snapshots_of_an_outage_in_order(
    runtime: Path, rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a spool of its own. The daemon of one is killed amid the outage and its rank goes on
    with the next; then both are killed and both lose their memory. Each brings its parts in order;
    of neighbours that are whole at the same time either may be decided first.
    """
    last = 1 + scaled(8, 50)
    steps = [f"1.{step}" for step in range(1, last + 1)]
    places, spools = [runtime / "h0", runtime / "h1"], [tmp_path / "spool0", tmp_path / "spool1"]
    # Of the daemons that ranks start here there are only those of the host that loses its own.
    monkeypatch.setenv("CKPTMGR_SPOOL", str(spools[1]))
    for place in places:
        place.mkdir(mode=0o700)
    with ExitStack() as stack:
        daemons = started(stack, places, spools)
        with ranks(rig.url, *places, keep=100, mib=MIB) as job:
            for step in range(1, last + 1):
                for rank in job:
                    rank.save(step)
                if step == 1:
                    assert [rank.wait(1).outcome for rank in job] == [Outcome.COMMITTED] * 2
                    rig.obey(("*", "", "dead"))
                if step == last // 2:
                    assert daemons[1].end(signal.SIGKILL) == -signal.SIGKILL
            until(lambda: [parts_in(one) for one in spools] == [last - 1] * 2, "all are spooled")
        assert [len(daemon.events("started")) for daemon in daemons] == [1, 2]
    for place in places:
        end_processes_of(place)
        for path in (place / "buffers").iterdir():
            path.unlink()
    rig.obey()
    with ExitStack() as stack:
        daemons = started(stack, places, spools)
        for daemon in daemons:
            until(
                lambda one=daemon: set(steps[1:]) <= {*steps_in(one, "drained_step")},
                "all are drained",
            )
        assert [parts_in(spool) for spool in spools] == [0, 0]
        # On a busy machine the first step may have gone through the spool, too.
        copied = [
            [step for step in steps_in(one, "draining_step") if step != steps[0]] for one in daemons
        ]
    assert copied == [steps[1:]] * 2
    assert asyncio.run(exact_commits(rig.file_url)) == steps


def steps_in(daemon: Daemon, name: str) -> list[str]:
    """Steps of which the daemons of a place have told, in that order."""
    return [event["step"] for event in daemon.events(name)]


def started(stack: ExitStack, places: list[Path], spools: list[Path]) -> list[Daemon]:
    """A daemon at each place, with a spool of its own."""
    found = []
    for place, spool in zip(places, spools, strict=True):
        environment = {**os.environ, "CKPTMGR_SPOOL": str(spool)}
        found.append(stack.enter_context(Daemon(place, environment=environment)))
    return found


async def exact_commits(url: str) -> list[str]:
    """Commits, oldest first; every bit of each rank's part of each is compared."""
    store = open_store(url)
    catalog = Catalog(store)
    found = []
    async for decision in catalog.committed():
        for sealed in await catalog.manifests(decision):
            state = memoryview(bytearray(MIB << 20))
            await fetch(store, plan_whole(sealed.manifest), state, BufferPool(64 << 20))
            assert not fault_in(state, decision.attempt, decision.step, MIB << 20)
        assert decision.world == 2
        found.append(str(decision.id))
    await store.aclose()
    return found[::-1]


def test_no_kill_loses_anything_that_was_spooled(runtime: Path, rig: Rig, tmp_path: Path) -> None:
    chance = random.Random(scaled(1, random.randrange(1 << 30)))
    expected = []
    kills = scaled(6, 400)
    with Rank(runtime, rig.url, keep=10_000, mib=MIB) as rank:
        for step in range(1, kills + 1):
            rig.obey(*[("*", "", "dead")] * (chance.random() < 0.6))
            rank.save(step)
            expected.append(f"1.{step}")
            time.sleep(chance.uniform(0, 0.4))
            end_processes_of(runtime)
        rig.obey()
        assert rank.wait(kills).outcome == Outcome.COMMITTED
        until(lambda: parts(tmp_path) == 0, "the spool is empty")
    found = parents(rig.file_url, tmp_path)
    assert [step for step, _ in found] == expected


def test_a_kill_between_spool_and_slot_leaves_no_slot_taken(runtime: Path, rig: Rig) -> None:
    """What the spool has is marked in the slot last: that mark may be missing."""
    with Rank(runtime, rig.url, mib=MIB) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("*", "", "dead"))
        for step in (2, 3):
            spooled = rank.save(step)
            until(lambda s=spooled: rank.buffer.outcome(s) is Outcome.SPOOLED, "it is spooled")
        end_processes_of(runtime)
        for snapshot in rank.buffer.snapshots():  # as if the daemon had died a moment earlier
            rank.buffer.settle(snapshot.slot, snapshot.generation, Outcome.UNDECIDED)
        end_processes_of(runtime)  # one that has begun meanwhile
        for step in (4, 5, 6):
            rank.save(step)
        rig.obey()
        assert rank.wait(6).outcome == Outcome.COMMITTED
