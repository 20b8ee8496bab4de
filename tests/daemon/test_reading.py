"""The way back: from memory or store, past damage, and never into somebody else's slot."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import asking
from asking import Came
from ckptmgr.config import BUDGET_BYTES, DaemonSettings
from ckptmgr.daemon.intake import Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.reader import Reader
from ckptmgr.daemon.resume import claim_attempt, decide_resume
from ckptmgr.daemon.session import Session
from ckptmgr.errors import (
    DaemonUnreachableError,
    DamageError,
    NothingToRestoreError,
    StorePermissionError,
    UsageError,
)
from ckptmgr.metrics import Metrics
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.commit import abort_step
from ckptmgr.staging.control import Client, Done, Load, Release, Restore, Restored
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.inbox import BUFFERS, SOCKET
from ckptmgr.store.local import LocalStore
from ckptmgr.types import Outcome, StepId
from driven import PATIENCE_SECONDS, Daemon, Rank, Trainer, check_slot, until
from processes import needs_root
from rigged import Rig
from small_step import commit_ranks, encode_state, smallest_state


@pytest.fixture
def saved(runtime: Path, rig: Rig) -> Rig:
    """Steps 1 to 3 of attempt 1, committed; host memory is lost."""
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        for step in (1, 2, 3):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
    for path in (runtime / BUFFERS).iterdir():
        path.unlink()
    return rig


@pytest.fixture
def daemon(runtime: Path, saved: Rig) -> Iterator[Daemon]:
    with Daemon(runtime) as found:
        yield found


def spoil(rig: Rig, step: int, kind: str = "data") -> None:
    """Change one byte in the middle of a stored object of a step."""
    (path,) = (p for p in (rig.path / f"{kind}/00000001/{step:012d}").rglob("*") if p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fetched(runtime: Path) -> list[str]:
    return [path.name for path in (runtime / "fetched").glob("*.buf")]


# ---- attaching sessions -----------------------------------------------------


def test_the_last_step_is_fetched_before_it_is_asked_for(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    with Rank(runtime, saved.url) as rank:
        assert daemon.await_event("prefetched")["step"] == "1.3"
        read = saved.asked("get", "data/")
        reply = rank.restore()
        assert (reply.attempt, reply.step, reply.source) == (1, 3, "store")
        assert Path(reply.path) == rank.buffer.path
        assert saved.asked("get", "data/") == read


def test_nothing_is_prefetched_where_memory_has_it(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime) as daemon:
        with Trainer.of(runtime, rig, steps=2) as trainer:
            trainer.await_event("finished")
        daemon.await_event("committed", 2)
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().source == "memory"
        assert not daemon.events("prefetched")
        assert rig.asked("get", "data/0") == rig.asked("get", "data/")


def test_the_store_is_asked_once_whose_memory_is(runtime: Path, rig: Rig) -> None:
    """However many snapshots of an attempt there are, and tables and parts to bring of them."""
    claim = "attempts/00000001/claim"
    with Daemon(runtime):
        with Rank(runtime, rig.url) as rank:
            for step in (1, 2):
                rank.save(step)
                assert rank.wait(step).outcome == Outcome.COMMITTED
        before = rig.asked("get", claim)
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().source == "memory"
        # To tell the other hosts, for a head start, and for the restore; each in two reads.
        assert rig.asked("get", claim) - before == 3 * 2


def test_a_release_ends_the_prefetch_before_the_trainer_writes(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    """Not a byte of the prefetch may land in a slot that the trainer has begun to write."""
    saved.obey(("get", "data/", "hold"))
    with Rank(runtime, saved.url) as rank:
        until(lambda: saved.asked("get", "data/00000001/000000000003"), "the prefetch reads")
        rank.link.ask(Release(), Done)
        rank.save(10, slot=0)
        rank.save(11, slot=1)
        saved.obey()
        assert rank.wait(10).outcome == Outcome.COMMITTED
        assert rank.wait(11).outcome == Outcome.COMMITTED
        sealed = {s.step: s for s in rank.buffer.snapshots()}
        for step in (10, 11):
            at = sealed[step]
            check_slot(rank.buffer, Came(2, step, slot=at.slot, generation=at.generation))
        assert not daemon.events("prefetched")


@pytest.mark.parametrize("kind", ["data", "man", "commit"])
def test_an_object_that_can_not_be_read_costs_one_step(
    runtime: Path, saved: Rig, daemon: Daemon, kind: str
) -> None:
    """EIO of one object, for as long as anybody tries; everything else can be read."""
    saved.obey(("get", f"{kind}/00000001/000000000003", "unreadable"))
    with Rank(runtime, saved.url) as rank:
        reply = rank.restore()
    assert (reply.attempt, reply.step, reply.source) == (1, 2, "store")
    ((skipped, why),) = reply.skipped
    assert skipped == "1.3"
    assert f"{kind}/00000001/000000000003" in why
    assert "can not be read by the test's will" in why


def test_a_prefetch_that_fails_loses_only_a_head_start(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    saved.obey(("get", "data/", "refuse"))
    with Rank(runtime, saved.url) as rank:
        daemon.await_event("prefetch_failed")
        with pytest.raises(StorePermissionError):
            rank.restore()
        saved.obey()
        assert rank.restore().step == 3


def test_a_step_that_is_given_up_after_it_was_decided_on_costs_itself(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    """Its parts were in the memory of hosts when the daemon of rank 0 chose it."""

    async def give_up(attempt: int) -> None:
        store = LocalStore(str(saved.path))
        await abort_step(store, StepId(1, 4), "rank 1 is silent")
        await decide_resume(store, attempt, 0, StepId(1, 4))
        await store.aclose()

    with Rank(runtime, saved.url) as rank:
        asyncio.run(give_up(rank.attempt))
        reply = rank.link.ask(Restore(), Restored, PATIENCE_SECONDS)
        assert (reply.step, "was given up" in reply.damage) == (4, True)
        rank.k = 1
        assert rank.restore().step == 3
        assert not daemon.events("fault")


def test_a_restore_falls_back_over_damage_and_says_so(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    spoil(saved, 3)
    spoil(saved, 2, "man")
    with Rank(runtime, saved.url) as rank:
        reply = rank.restore()
        assert (reply.step, reply.source) == (1, "store")
        assert [step for step, _ in reply.skipped] == ["1.3", "1.2"]
        assert "data/00000001/000000000003/" in reply.skipped[0][1]
        assert "man/00000001/000000000002/" in reply.skipped[1][1]
    assert {e["step"] for e in daemon.events("restore_skipped")} >= {"1.3", "1.2"}


def test_a_store_of_nothing_but_damage_is_an_error(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    """Never a silent start from scratch."""
    for step in (1, 2, 3):
        spoil(saved, step)
    with Rank(runtime, saved.url) as rank:
        with pytest.raises(DamageError, match="no step can be restored") as caught:
            rank.restore()
        assert all(f"1.{step}:" in caught.value.message for step in (1, 2, 3))


@pytest.mark.parametrize("request_", [Restore(2), Restore(2, 1)])
def test_a_chosen_step_comes_back(
    runtime: Path, saved: Rig, daemon: Daemon, request_: Restore
) -> None:
    with Rank(runtime, saved.url) as rank:
        assert rank.restore(request_).step == 2
        assert rank.restore().step == 3


@pytest.mark.parametrize("request_", [Restore(9), Restore(2, 7)])
def test_a_chosen_step_that_is_not_there_is_an_error(
    runtime: Path, saved: Rig, daemon: Daemon, request_: Restore
) -> None:
    with Rank(runtime, saved.url) as rank, pytest.raises(NothingToRestoreError):
        rank.restore(request_)


def test_what_proved_unusable_is_not_offered_again(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    with Rank(runtime, saved.url) as rank:
        assert decided(rank, 0).step == 3
        assert decided(rank, 1).step == 2
        assert decided(rank, 2).step == 1
        with pytest.raises(DamageError, match=r"1\.3: proved unusable"):
            decided(rank, 3)


def test_a_decision_outlives_the_daemon(runtime: Path, saved: Rig) -> None:
    """The next daemon meets the registers of the first, obeys them, and goes one further."""
    with Daemon(runtime) as daemon:
        rank = Rank(runtime, saved.url)
        assert decided(rank, 0).step == 3
        daemon.process.kill()
        daemon.process.wait()
        assert decided(rank, 0).step == 3
        assert decided(rank, 1).step == 2
        rank.close()


def decided(rank: Rank, k: int) -> Restored:
    return rank.link.ask(Restore(k=k), Restored, PATIENCE_SECONDS)


def test_an_empty_store_gives_nothing_and_says_so(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        assert rank.restore() == Came(0, 0)


# ---- trainers that die meanwhile --------------------------------------------


def test_a_dead_trainers_restore_does_not_go_on_beside_the_next(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    saved.obey(("get", "data/", "hold"))
    with Trainer.of(runtime, saved, steps=0) as first:
        first.await_event("restore")
        until(lambda: saved.asked("get", "data/00000001/000000000003"), "it is being fetched")
    daemon.await_event("trainer_died")
    with Trainer.of(runtime, saved, steps=1) as second:
        second.await_event("restore")
        saved.obey()
        restored = second.await_event("restored")
        assert (restored["id"], restored["fault"]) == ([1, 3], "")
        second.await_event("finished")
    daemon.await_event("committed")
    assert len(daemon.events("prefetched")) <= 1


# ---- sessions that only read ------------------------------------------------


def load(runtime: Path, request: Load) -> tuple[Client, Came]:
    client = Client(runtime / SOCKET)
    try:
        return client, asking.load(client, request, PATIENCE_SECONDS)
    except BaseException:
        client.close()
        raise


def test_a_load_is_lent_memory_until_it_is_released(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    claims = saved.asked("put_new", "attempts/")
    client, reply = load(runtime, Load(saved.url))
    with client:
        assert fetched(runtime) == [Path(reply.path).name]
        with HostBuffer.open(Path(reply.path)) as lent:
            check_slot(lent, reply)
        client.ask(Release(), Done)
        assert fetched(runtime) == []
    assert saved.asked("put_new", "attempts/") == claims  # nothing is claimed


def test_what_was_lent_goes_with_the_connection(runtime: Path, saved: Rig, daemon: Daemon) -> None:
    client, _ = load(runtime, Load(saved.url, step=1))
    assert len(fetched(runtime)) == 1
    client.close()
    until(lambda: not fetched(runtime), "it is freed")


def test_a_second_load_on_a_connection_frees_the_first(
    runtime: Path, saved: Rig, daemon: Daemon
) -> None:
    client, first = load(runtime, Load(saved.url, step=1))
    with client:
        second = asking.load(client, Load(saved.url, step=2), PATIENCE_SECONDS)
        assert fetched(runtime) == [Path(second.path).name] != [Path(first.path).name]
    until(lambda: not fetched(runtime), "both are freed")


def test_lent_memory_of_a_killed_daemon_is_freed_by_the_next(runtime: Path, saved: Rig) -> None:
    with Daemon(runtime) as daemon:
        client, _ = load(runtime, Load(saved.url))
        daemon.process.kill()
        daemon.process.wait()
        client.close()
    assert len(fetched(runtime)) == 1
    with Daemon(runtime):
        assert fetched(runtime) == []


def test_a_load_never_sees_what_is_not_committed(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", "data/00000001/000000000002/", "hold"))
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rank.save(2)
        client, reply = load(runtime, Load(rig.url))
        client.close()
        assert (reply.attempt, reply.step, reply.source) == (1, 1, "store")
        with pytest.raises(NothingToRestoreError):
            load(runtime, Load(rig.url, step=2))
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED


def test_a_load_of_nothing_makes_nothing(runtime: Path, rig: Rig) -> None:
    with Daemon(runtime):
        try:
            client, reply = load(runtime, Load(rig.url))
            client.close()
            assert reply.attempt == 0
        except NothingToRestoreError:
            pass
        assert not rig.path.exists() or not list(rig.path.rglob("*"))
        assert fetched(runtime) == []


def test_a_load_that_meets_damage_skips_it(runtime: Path, saved: Rig, daemon: Daemon) -> None:
    spoil(saved, 3)
    client, reply = load(runtime, Load(saved.url))
    client.close()
    assert (reply.step, [step for step, _ in reply.skipped]) == (2, ["1.3"])


def test_readers_hold_what_they_read(runtime: Path, saved: Rig, daemon: Daemon) -> None:
    """Retention leaves a step alone while somebody reads it, and the hold goes afterwards."""
    saved.obey(("get", "data/00000001/000000000001", "hold"))
    with Client(runtime / SOCKET) as reading, Rank(runtime, saved.url) as rank:
        rank.restore()
        ask_in_background(reading, Load(saved.url, step=1))
        until(lambda: saved.asked("get", "data/00000001/000000000001"), "it is being read")
        for step in (4, 5, 6):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
        until((saved.path / "retired/00000001/000000000002").exists, "step 2 goes")
        assert not (saved.path / "retired/00000001/000000000001").exists()
        assert list((saved.path / "data/00000001/000000000001").rglob("*.pack"))
        saved.obey()
        until(lambda: daemon.events("restored"), "the load comes through")
        assert list((saved.path / "holds").rglob("reader*"))
        reading.close()
        until(lambda: not list((saved.path / "holds").rglob("reader*")), "the hold is released")


def ask_in_background(client: Client, request: Load) -> None:
    """Load a step and do not wait until its bytes come."""
    try:
        asking.load(client, request, seconds=1.0)
    except DaemonUnreachableError:
        return
    raise AssertionError("the bytes came though the read was held")


def test_a_wait_is_bounded_and_tells_what_holds_it_up(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", "data/", "hold"))
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        rank.save(1)
        begun = time.monotonic()
        waited = rank.wait(1, seconds=0.2)
        assert time.monotonic() - begun >= 0.2
        assert waited == type(waited)(int(Outcome.UNDECIDED), "still being written")
        rig.obey()
        assert rank.wait(1).outcome == Outcome.COMMITTED


def test_a_trainer_does_not_load_on_its_own_connection(runtime: Path, saved: Rig) -> None:
    with Daemon(runtime), Rank(runtime, saved.url) as rank:
        with pytest.raises(UsageError, match="connection of its own"):
            rank.link.ask(Load(saved.url), Restored)
        assert rank.restore().step == 3


def test_a_full_tmpfs_stops_no_load(tmp_path: Path, saved: Rig) -> None:
    """On a tmpfs of its own: what does not fit is lent outside of it, and nobody dies."""
    needs_root()
    place = tmp_path / "small"
    place.mkdir()
    options = "size=3300k,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        with Daemon(place) as daemon, ExitStack() as clients:
            for step in (1, 2, 3):  # 1.4 MiB each
                client, reply = load(place, Load(saved.url, step=step))
                clients.enter_context(client)
                with HostBuffer.open(Path(reply.path)) as lent:
                    check_slot(lent, reply)
            assert len(fetched(place)) == 2
            assert len(daemon.events("shared_memory_small")) == 1
            clients.close()
            until(lambda: not fetched(place), "all are freed")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_what_one_damaged_manifest_leaves_under_way_holds_nothing(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more ranks than are read at a time: those that came later put holds for nobody."""
    ranks, url = 24, f"file://{tmp_path}/store"

    async def main() -> None:
        pool = BufferPool(BUDGET_BYTES)
        job = Job.open(url, Metrics(), pool, DaemonSettings(runtime_dir=runtime))
        attempt, nonce = await claim_attempt(job.store, ranks, "")
        encoded = [encode_state(smallest_state(1))] * ranks
        decision = await commit_ranks(job.store, attempt, nonce, 10, encoded)
        manifest = tmp_path / "store" / keys.manifest(decision.id, 0)
        manifest.write_bytes(manifest.read_bytes()[:-1] + b"?")
        near = vars(job.store)["_inner"].get

        async def far(key: str, *where: Any, **into: Any) -> memoryview:
            if key.startswith("man/") and key != keys.manifest(decision.id, 0):
                await asyncio.sleep(0.05)
            found: memoryview = await near(key, *where, **into)
            return found

        monkeypatch.setattr(vars(job.store)["_inner"], "get", far)
        reader, session = Reader(Intake(runtime), runtime), Session(job, 0)
        await reader.load(session, Load(url=url))
        with pytest.raises(DamageError):
            await reader.describe(session)
        await session.release()
        await asyncio.sleep(0.5)  # in which others would have come to their turn
        assert await job.store.list("holds/") == []
        await job.aclose()

    asyncio.run(main())
