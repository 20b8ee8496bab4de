"""From a sealed slot to a commit: superseded, interrupted, refused and taken over on the way."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from ckptmgr.errors import CkptmgrError, UsageError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.verify import verify_step
from ckptmgr.staging.inbox import prepare
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId, StepState
from crash.peek import ABORTED, slots_below
from driven import Daemon, Rank, Trainer, until
from rigged import Rig

ONE, TWO = "00000001/000000000001", "00000001/000000000002"


def states(rig: Rig) -> dict[str, StepState]:
    """Every step of the store and its state; committed ones are read back whole."""

    async def read() -> dict[str, StepState]:
        store = open_store(rig.file_url)
        catalog = Catalog(store)
        entries = await catalog.entries()
        for entry in entries:
            assert not entry.damage
            if entry.state in (StepState.COMMITTED, StepState.VERIFIED):
                assert entry.decision is not None
                assert not await verify_step(catalog, entry.decision, BufferPool(1))
        await store.aclose()
        return {str(entry.id): entry.state for entry in entries}

    return asyncio.run(read())


def files(rig: Rig, prefix: str) -> set[str]:
    root = rig.path / prefix
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("codec", ["none", "zstd", "planes", "auto"])
def test_every_codec_commits_and_comes_back(runtime: Path, rig: Rig, codec: str) -> None:
    with Daemon(runtime):
        with Rank(runtime, rig.url, codec=codec, mib=6) as rank:
            for step in (1, 2, 3):
                rank.save(step)
            assert rank.wait(3).outcome == Outcome.COMMITTED
        for path in (runtime / "buffers").iterdir():
            path.unlink()
    with Daemon(runtime), Rank(runtime, rig.url, codec=codec, mib=6) as rank:
        reply = rank.restore()
        assert (reply.step, reply.source) == (3, "store")


def test_a_snapshot_whose_slot_is_reused_while_it_is_written_is_given_up(
    runtime: Path, rig: Rig
) -> None:
    rig.obey(("put_new", f"data/{ONE}", "hold"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        first = rank.save(1)
        rank.save(2)
        until(lambda: rig.asked("put_new", f"data/{ONE}"), "step 1 is being written")
        rank.save(3, slot=first.slot)
        rig.obey()
        assert rank.wait(3).outcome == Outcome.COMMITTED
        assert daemon.await_event("superseded")["step"] == "1.1"
        assert rank.wait(1).outcome == Outcome.ABORTED
        assert rank.wait(2).outcome == Outcome.COMMITTED
    found = states(rig)
    assert found.pop("1.1") is StepState.ABORTED
    assert set(found.values()) <= {StepState.COMMITTED, StepState.VERIFIED}
    assert not files(rig, f"data/{ONE}")
    assert not files(rig, f"man/{ONE}")


@pytest.mark.parametrize("key", ["data/", "man/", "commit/", "attempts/00000001/active"])
@pytest.mark.parametrize("rule", ["full", "dead"])
def test_a_store_that_fails_and_comes_back_gets_everything(
    runtime: Path, rig: Rig, key: str, rule: str
) -> None:
    rig.obey(("put_new", key, rule))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        rank.save(2)
        until(lambda: rig.asked("put_new", key), "the store is tried")
        until(lambda: daemon.events("store_failed"), "the failure is told")
        waited = rank.wait(1, seconds=0.1)
        assert waited.outcome == Outcome.UNDECIDED
        assert waited.why
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert rank.wait(1).outcome == Outcome.COMMITTED
    assert set(states(rig)) == {"1.1", "1.2"}


def test_a_snapshot_over_which_the_writer_faults_again_is_left_alone(
    runtime: Path, rig: Rig
) -> None:
    """The daemon goes on with the others, and ends when idle; the snapshot stays in memory."""
    rig.obey(("put_new", f"data/{TWO}", "fault"))
    with Daemon(runtime, "--idle-seconds=2") as daemon:
        rank = Rank(runtime, rig.url)
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rank.save(2)
        waited = rank.wait(2)
        assert waited.outcome == Outcome.ABORTED
        assert "ZeroDivisionError" in waited.why
        rank.save(3)
        assert rank.wait(3).outcome == Outcome.COMMITTED
        assert [e["step"] for e in daemon.events("fault")] == ["1.2", "1.2"]
        assert [(e["step"], e["kind"]) for e in daemon.events("given_up")] == [
            ("1.2", "ZeroDivisionError")
        ]
        rank.close(clean=True)
        assert daemon.process.wait(60) == 0
    assert [s.id for s in slots_below(runtime) if s.undecided] == [(1, 2)]
    rig.obey()
    with Daemon(runtime) as daemon:
        until((rig.path / f"commit/{TWO}").exists, "the next daemon tries again")


def test_a_snapshot_over_which_the_writer_faults_once_is_committed(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", f"man/{ONE}", "fault once"))
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        assert len(daemon.events("fault")) == 1
        assert not daemon.events("given_up")


def test_a_register_that_does_not_hold_costs_its_own_step_only(runtime: Path, rig: Rig) -> None:
    """It may have been a commit: nothing of the step is deleted."""
    register = rig.path / f"commit/{ONE}"
    with Daemon(runtime) as daemon, Rank(runtime, rig.url) as rank:
        register.parent.mkdir(parents=True)
        register.write_bytes(b"not a register" * 30)
        rank.save(1)
        waited = rank.wait(1)
        assert (waited.outcome, f"commit/{ONE}" in waited.why) == (Outcome.ABORTED, True)
        rank.save(2)
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert not daemon.events("fault")
    assert files(rig, f"man/{ONE}")
    assert files(rig, f"data/{ONE}")


def test_a_manifest_that_a_killed_daemon_left_is_taken_over(runtime: Path, rig: Rig) -> None:
    """No byte is written twice: its packs were durable before it was put."""
    rig.obey(("put_new", f"commit/{ONE}", "hold"))
    with Daemon(runtime) as daemon, Trainer.of(runtime, rig, steps=1) as trainer:
        trainer.await_event("finished")
        until(lambda: rig.asked("put_new", f"commit/{ONE}"), "the manifest is there")
        trainer.kill()
        daemon.process.kill()
        daemon.process.wait()
    packs, manifest = files(rig, "data"), (rig.path / f"man/{ONE}/000000").read_bytes()
    written = rig.asked("put_new", "data/")
    looked = rig.asked("make_durable", "man/")
    rig.obey()
    with Daemon(runtime) as daemon:
        daemon.await_event("committed")
    assert files(rig, "data") == packs
    assert (rig.path / f"man/{ONE}/000000").read_bytes() == manifest
    assert rig.asked("put_new", "data/") == written
    assert rig.asked("make_durable", "man/") == looked + 1  # visible is not durable
    assert states(rig)["1.1"] in (StepState.COMMITTED, StepState.VERIFIED)


def test_packs_without_a_manifest_are_collected(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", f"man/{ONE}", "hold"))
    with Daemon(runtime) as daemon, Trainer.of(runtime, rig, steps=1) as trainer:
        trainer.await_event("finished")
        until(lambda: rig.asked("put_new", f"man/{ONE}"), "the packs are there")
        trainer.kill()
        daemon.process.kill()
        daemon.process.wait()
    for path in (runtime / "buffers").iterdir():
        path.unlink()  # the host was lost, too: nobody can finish step 1
    assert files(rig, "data")
    rig.obey()
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        assert rank.restore().attempt == 0
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        until(lambda: not files(rig, f"data/{ONE}"), "what was left behind is deleted")
    assert states(rig)["1.1"] is StepState.ABORTED


def test_a_newer_attempt_ends_a_live_older_one(runtime: Path, rig: Rig) -> None:
    """Two hosts, as their daemons see it: the old one was cut off and comes back."""
    other = runtime / "host2"
    other.mkdir(mode=0o700)
    with (
        Daemon(runtime) as daemon,
        Daemon(other),
        Rank(runtime, rig.url) as old,
    ):
        old.save(1)
        assert old.wait(1).outcome == Outcome.COMMITTED
        with Rank(other, rig.url) as new:
            assert new.restore().step == 1
            old.save(2)  # a claim alone hurts nobody
            assert old.wait(2).outcome == Outcome.COMMITTED
            new.save(5)
            assert new.wait(5).outcome == Outcome.COMMITTED
            old.save(3)
            waited = old.wait(3)
            assert (waited.outcome, old.buffer.superseded_by) == (Outcome.ABORTED, 2)
            assert "attempt 2 is active" in waited.why
            assert daemon.await_event("given_up")["kind"] == "SupersededError"
    found = states(rig)
    assert found.pop("1.3") is StepState.ABORTED
    assert set(found) == {"1.1", "1.2", "2.5"}
    assert set(found.values()) <= {StepState.COMMITTED, StepState.VERIFIED}


def test_the_last_snapshot_of_a_dead_older_attempt_is_finished_all_the_same(
    runtime: Path, rig: Rig
) -> None:
    other = runtime / "host2"
    other.mkdir(mode=0o700)
    rig.obey(("put_new", f"data/{ONE}", "hold"))
    with Daemon(runtime) as daemon, Daemon(other):
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
            until(lambda: rig.asked("put_new", f"data/{ONE}"), "it is being written")
        with Rank(other, rig.url) as new:
            new.restore()
            new.save(1)
            assert new.wait(1).outcome == Outcome.COMMITTED
            # Collection gives up what older attempts left undecided: let it come first.
            until(lambda: rig.asked("list", "data/"), "the new attempt has collected")
            rig.obey()
            daemon.await_event("committed")
    assert set(states(rig)) == {"1.1", "2.1"}
    assert asyncio.run(latest(rig)) == StepId(2, 1)  # it never goes back


def test_collection_of_a_newer_attempt_gives_up_the_older_ones_step(
    runtime: Path, rig: Rig
) -> None:
    """Its snapshot is then nobody's to resume from; the daemon that holds it says so."""
    other = runtime / "host2"
    other.mkdir(mode=0o700)
    rig.obey(("put_new", f"man/{ONE}", "hold"))
    with Daemon(runtime) as daemon, Daemon(other):
        with Trainer.of(runtime, rig, steps=1) as trainer:
            trainer.await_event("finished")
            until(lambda: rig.asked("put_new", f"man/{ONE}"), "its packs are there")
        with Rank(other, rig.url) as new:
            new.restore()
            new.save(1)
            assert new.wait(1).outcome == Outcome.COMMITTED
            until(lambda: not files(rig, f"data/{ONE}"), "the new attempt has collected")
            rig.obey()
            assert daemon.await_event("aborted")["step"] == "1.1"
    assert states(rig)["1.1"] is StepState.ABORTED
    assert asyncio.run(latest(rig)) == StepId(2, 1)


async def latest(rig: Rig) -> StepId | None:
    store = open_store(rig.file_url)
    found = await Catalog(store).latest()
    await store.aclose()
    return found


def test_the_newest_snapshot_of_a_dead_trainer_goes_first(runtime: Path, rig: Rig) -> None:
    rig.obey(("put_new", "attempts/", "hold"))
    with Daemon(runtime) as daemon:
        rig.obey(("put_new", "attempts/00000001/active", "hold"))
        with Trainer.of(runtime, rig, steps=2) as trainer:
            trainer.await_event("finished")
        daemon.end(9)
    rig.obey()
    with Daemon(runtime) as daemon:
        daemon.await_event("committed", 2)
        assert [e["step"] for e in daemon.events("committed")] == ["1.2", "1.1"]


# ---- damaged slots ----------------------------------------------------------


def spoil(runtime: Path, step: int, offset: int) -> None:
    """Change one byte of the slot of a step; `offset` counts from the start of the slot."""
    (path,) = (runtime / "buffers").glob("*.buf")
    content = bytearray(path.read_bytes())
    table, data = (int.from_bytes(content[at : at + 8], "little") for at in (16, 24))
    for slot in range(2):
        at = 8192 + slot * (4096 + table + data)
        if int.from_bytes(content[at + 80 : at + 88], "little") == step:
            fd = os.open(path, os.O_RDWR)
            os.pwrite(fd, bytes([content[at + offset] ^ 1]), at + offset)
            os.close(fd)


def left_by_killed_processes(runtime: Path, rig: Rig, *rules: tuple[str, str, str]) -> None:
    """Two sealed snapshots, of which `rules` let the daemon decide none or one."""
    rig.obey(*rules)
    with Daemon(runtime) as daemon, Trainer.of(runtime, rig, steps=2) as trainer:
        trainer.await_event("finished")
        until(lambda: rig.asked(*rules[0][:2]), "the daemon is at work")
        told = len(daemon.events("committed"))  # what is not marked yet, the next one tells again
        until(lambda: sum(not s.undecided for s in slots_below(runtime)) >= told, "it is marked")
        daemon.process.kill()
        trainer.kill()
        daemon.process.wait()
    rig.obey()


def test_decided_and_undecided_snapshots_are_adopted(runtime: Path, rig: Rig) -> None:
    left_by_killed_processes(runtime, rig, ("put_new", f"data/{TWO}", "hold"))
    with Daemon(runtime) as daemon:
        assert daemon.await_event("adopted")["snapshots"] == 2
        until(lambda: not any(s.undecided for s in slots_below(runtime)), "both are decided")
        until(lambda: daemon.status()["undecided"] == 0, "and the daemon knows")
    steps = [e["step"] for e in daemon.events("committed")]
    assert sorted(steps) == ["1.1", "1.2"]  # neither of them twice


def test_a_slot_whose_record_is_damaged_is_left_out(runtime: Path, rig: Rig) -> None:
    left_by_killed_processes(runtime, rig, ("put_new", "attempts/00000001/active", "hold"))
    spoil(runtime, 2, 100)
    with Daemon(runtime) as daemon:
        daemon.await_event("committed")
        for _ in range(20):
            daemon.status()
        assert len(daemon.events("slot_damaged")) == 1  # told once, not at every look
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().step == 1
    assert set(states(rig)) == {"1.1"}


def test_a_slot_whose_table_is_damaged_is_given_up(runtime: Path, rig: Rig) -> None:
    left_by_killed_processes(runtime, rig, ("put_new", "attempts/00000001/active", "hold"))
    spoil(runtime, 2, 4096 + 10)
    with Daemon(runtime) as daemon:
        assert daemon.await_event("given_up")["kind"] == "HostBufferDamagedError"
        daemon.await_event("committed")
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().step == 1
        outcomes = {s.id: s.outcome for s in slots_below(runtime)}
        assert outcomes[1, 2] == ABORTED
    assert states(rig)["1.2"] is StepState.ABORTED


def test_an_abort_is_told_only_when_it_is_durable(runtime: Path, rig: Rig) -> None:
    """The table is damaged and the store is full: nothing is decided until it is not."""
    left_by_killed_processes(runtime, rig, ("put_new", "attempts/00000001/active", "hold"))
    spoil(runtime, 2, 4096 + 10)
    rig.obey(("put_new", f"commit/{TWO}", "full"))
    with Daemon(runtime) as daemon:
        daemon.await_event("write_failed")
        assert (1, 2) in [s.id for s in slots_below(runtime) if s.undecided]
        assert not daemon.events("given_up")
        rig.obey()
        daemon.await_event("given_up")
    assert states(rig)["1.2"] is StepState.ABORTED


def test_what_the_next_daemon_tells_of_a_step_is_durable_before(runtime: Path, rig: Rig) -> None:
    """The register may be one that a killed daemon had put, and not yet made durable."""
    with Daemon(runtime) as first, Rank(runtime, rig.url) as rank:
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        first.end(signal.SIGKILL)
        asked = len(rig.operations())
        assert rank.wait(1).outcome == Outcome.COMMITTED, "it has started the next daemon"
        of_register = [name for name, key in rig.operations()[asked:] if key == f"commit/{ONE}"]
        assert of_register[0] == "make_durable"


def test_files_that_are_no_buffers_are_left_alone(runtime: Path, rig: Rig) -> None:
    """They may hold what a newer version understands. Half-made ones hold nothing."""
    prepare(runtime)
    strange = runtime / "buffers" / f"{'ab' * 16}.buf"
    strange.write_bytes(b"CKPTHB\r\n\x02" + bytes(9000))
    (runtime / "buffers" / f".{'cd' * 16}").write_bytes(b"half")
    with Daemon(runtime) as daemon:
        refused = daemon.await_event("buffer_refused")
        assert (refused["path"], "version 2" in refused["why"]) == (strange.name, True)
        with Rank(runtime, rig.url) as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
    assert strange.exists()
    assert not (runtime / "buffers" / f".{'cd' * 16}").exists()


def test_a_lost_ticket_loses_nothing(runtime: Path, rig: Rig) -> None:
    """The next one makes the daemon look at the whole buffer."""
    with Daemon(runtime), Rank(runtime, rig.url) as rank:
        rank.seal(1)
        rank.save(2)
        assert rank.wait(2).outcome == Outcome.COMMITTED
        assert rank.wait(1).outcome == Outcome.COMMITTED


def test_a_plugin_that_fails_strands_its_own_buffer_until_a_trainer_comes(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    left_by_killed_processes(runtime, rig, ("put_new", "attempts/00000001/active", "hold"))
    rig.obey(("open", "", "fault"))
    with Daemon(runtime) as daemon:
        assert "ZeroDivisionError" in daemon.await_event("buffer_stranded")["why"]
        with Rank(runtime, f"file://{tmp_path}/other") as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
        with pytest.raises(UsageError, match="fails to open the store: ZeroDivisionError"):
            Rank(runtime, rig.url)
        rig.obey()
        with Rank(runtime, rig.url) as rank:
            assert rank.restore().step == 2
            until(lambda: daemon.status()["undecided"] == 0, "they are committed")


def test_a_store_that_needs_a_plugin_which_is_gone_strands_nothing_else(
    runtime: Path, rig: Rig, tmp_path: Path
) -> None:
    left_by_killed_processes(runtime, rig, ("put_new", "attempts/00000001/active", "hold"))
    without = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with Daemon(runtime, environment=without) as daemon:
        assert "rigged://" in daemon.await_event("buffer_stranded")["why"]
        with Rank(runtime, f"file://{tmp_path}/other") as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
        assert daemon.status()["undecided"] == 2
    with Daemon(runtime) as daemon:
        until(lambda: daemon.status()["undecided"] == 0, "with the plugin they are committed")
    with pytest.raises(CkptmgrError):
        open_store(rig.url)
