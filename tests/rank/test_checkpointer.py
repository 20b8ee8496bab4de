"""The face of the training loop, with a real daemon."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training import STEPS, CrashError, Training, command, committed, ls, run, uninterrupted

import ckptmgr
from ckptmgr.errors import (
    CkptmgrError,
    HostMemoryError,
    HostMemoryFullError,
    NothingToRestoreError,
    StateError,
    StateMismatchError,
    StepOrderError,
    StoreError,
    SupersededError,
    UnsupportedLeafError,
    UsageError,
)
from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.launch import connect
from ckptmgr.types import STEP_MAX
from processes import end_processes_of, needs_root, owners_of


def wipe(runtime: Path) -> None:
    """Lose host memory, as a reboot does."""
    end_processes_of(runtime)
    subprocess.run(["rm", "-rf", str(runtime)], check=True)


def daemon_state(runtime: Path) -> dict[str, Any]:
    with connect(runtime) as client:
        return client.ask(Status(), Stated).state


def kill_daemon(runtime: Path) -> None:
    """SIGKILL the daemon, and wait until the trainer has started another."""
    pid = int(daemon_state(runtime)["pid"])
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline, "no new daemon"
        with contextlib.suppress(CkptmgrError):
            if daemon_state(runtime)["pid"] != pid:
                return
        time.sleep(0.05)


def first_committed(ckpt: ckptmgr.Checkpointer, step: int) -> int:
    """Save until a step is committed: one sealed before the new daemon was met may be lost."""
    for number in range(step, step + 20):
        with contextlib.suppress(CkptmgrError):
            if ckpt.save(number).committed(30):
                return number
    raise AssertionError("nothing is committed any more")


@pytest.mark.parametrize("overlap", [None, True])
@pytest.mark.parametrize("source", ["memory", "store"])
def test_resume_is_bit_exact(
    runtime: Path, store_url: str, source: str, overlap: bool | None
) -> None:
    truth = uninterrupted(STEPS)
    run(store_url, 12, crash=True, overlap=overlap)
    if source == "store":
        wipe(runtime)
    resumed = run(store_url, STEPS, overlap=overlap)
    assert resumed.resumed.source == source
    assert resumed.resumed.step == 10
    assert resumed.digest() == truth.digest()
    assert resumed.losses == {step: truth.losses[step] for step in range(11, STEPS + 1)}


def test_only_multiples_of_the_cadence_are_saved(runtime: Path, store_url: str) -> None:
    run(store_url, STEPS, every=5, keep=10)
    assert committed(store_url) == ["1.20", "1.15", "1.10", "1.5"]
    assert [row["tags"]["loss"] for row in ls(store_url)]


def test_keep_gives_old_steps_up(runtime: Path, store_url: str) -> None:
    run(store_url, STEPS, every=2, keep=3)
    assert committed(store_url)[:3] == ["1.24", "1.22", "1.20"]
    assert len(committed(store_url)) <= 4, "one more while a collection is under way"


def test_steps_must_increase(runtime: Path, store_url: str) -> None:
    with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}, every=1) as ckpt:
        ckpt.step(3)
        with pytest.raises(StepOrderError):
            ckpt.step(3)
        with pytest.raises(StepOrderError):
            ckpt.save(2)
        for wrong in (-1, 1.0, "4", True):
            with pytest.raises(UsageError):
                ckpt.step(wrong)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="the greatest step that can be named"):
            ckpt.save(STEP_MAX + 1)
        ckpt.step(np.int64(4))  # type: ignore[arg-type]


def test_outside_the_block_it_says_so(store_url: str) -> None:
    ckpt = ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)})
    for use in (lambda: ckpt.step(1), lambda: ckpt.save(1), ckpt.restore):
        with pytest.raises(UsageError, match="outside its block"):
            use()


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0},
        {"keep": "three"},
        {"keep": 2.5},
        {"slots": 1},
        {"slots": 4},
        {"codec": "lz4"},
        {"every": "often"},
        {"state": [1]},
        {"state": {1: torch.ones(3)}},
        {"url": ""},
        {"url": None},
        {"url": b"bytes"},
        {"replicated": "model/*"},
        {"replicated": [1]},
    ],
    ids=str,
)
def test_wrong_options_are_refused(store_url: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ckptmgr.Checkpointer(**{"url": store_url, "state": {"x": torch.ones(3)}, **options})


def test_a_handle_tells_its_outcome_after_the_block(runtime: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    ckpt = ckptmgr.Checkpointer(root, {"x": torch.ones(3)}, every=None, drain_timeout=0.2)
    with pytest.warns(RuntimeWarning, match="goes on trying"), ckpt:
        first = ckpt.save(1)
        assert first.committed(30)
        root.rename(tmp_path / "away")
        second = ckpt.save(2)
    assert first.committed()
    assert not second.committed(), "it was not when the block was left"
    with pytest.raises(UsageError, match="entered again"):
        ckpt.__enter__()


def test_many_processes_without_a_process_group_are_refused(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="init_process_group"):
        ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)})


def test_a_request_is_heard_at_the_next_step(runtime: Path, store_url: str) -> None:
    with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}, every=100) as ckpt:
        assert ckpt.step(1) is None
        ckpt.request()
        handle = ckpt.step(2)
        assert handle is not None
        assert handle.committed(30)
        assert ckpt.step(3) is None


def test_a_leaf_that_can_not_be_stored_is_named_on_entering(runtime: Path, store_url: str) -> None:
    state = {"good": torch.ones(3), "bad": {"inner": [1, lambda: 0]}}
    with pytest.raises(UnsupportedLeafError, match="bad/inner/1") as caught:
        ckptmgr.Checkpointer(store_url, state).__enter__()
    assert isinstance(caught.value, StateError)
    assert not owners_of(runtime), "no daemon was started for a state that can not be saved"


def test_another_model_is_refused_and_nothing_is_changed(runtime: Path, store_url: str) -> None:
    run(store_url, 6, crash=True)
    other = Training()
    other.model[3] = nn.Linear(12, 13)
    before = other.digest()
    with (
        pytest.raises(StateMismatchError, match=r"model/3\.weight"),
        ckptmgr.Checkpointer(store_url, other.state) as ckpt,
    ):
        ckpt.restore()
    assert other.digest() == before


def test_a_step_can_be_chosen(runtime: Path, store_url: str) -> None:
    run(store_url, STEPS, every=5, keep=10)
    truth = uninterrupted(10)
    for choice in (10, "10", "1.10"):
        training = Training()
        with ckptmgr.Checkpointer(store_url, training.state) as ckpt:
            assert ckpt.restore(choice) == 10
        assert training.digest() == truth.digest()
    with ckptmgr.Checkpointer(store_url, Training().state) as ckpt:
        with pytest.raises(NothingToRestoreError):
            ckpt.restore(11)
        for wrong in ("ten", 1.5, True):
            with pytest.raises(UsageError):
                ckpt.restore(wrong)  # type: ignore[arg-type]


def test_required_means_required(runtime: Path, store_url: str) -> None:
    with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}) as ckpt:
        assert ckpt.restore() == 0
        with pytest.raises(NothingToRestoreError):
            ckpt.restore(required=True)


def test_plain_python_comes_back_in_the_mapping(runtime: Path, store_url: str) -> None:
    inner = {"seen": [1, 2]}
    state: dict[str, Any] = {"x": torch.ones(3), "epoch": 3, "inner": inner}
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        ckpt.save(1)
    state["x"].zero_()
    state["epoch"] = 0
    inner["seen"].append(9)
    with ckptmgr.Checkpointer(store_url, state) as ckpt:
        assert ckpt.restore() == 1
    assert state["epoch"] == 3
    assert state["inner"] is inner
    assert inner == {"seen": [1, 2]}
    assert state["x"].tolist() == [1, 1, 1]


def test_an_older_attempt_ends_itself(runtime: Path, store_url: str) -> None:
    old = ckptmgr.Checkpointer(store_url, {"x": torch.ones(4)}, every=1)
    new = ckptmgr.Checkpointer(store_url, {"x": torch.zeros(4)}, every=1)
    with pytest.warns(RuntimeWarning, match="given up"), old:
        new.__enter__()
        assert (old.attempt, new.attempt) == (1, 2)
        handle = new.save(1)
        assert handle.committed(30)
        stale = old.save(50)
        with pytest.raises(CkptmgrError, match="attempt 2 is active"):
            stale.committed(30)
        with pytest.raises(SupersededError):
            old.step(51)
        new.__exit__(None, None, None)
    assert committed(store_url) == ["2.1"]


@pytest.mark.timeout(60)
def test_a_store_that_can_never_be_made_is_said_at_once(runtime: Path) -> None:
    with (
        pytest.raises(StoreError, match="/proc/nope: the directory of the store can not be made"),
        ckptmgr.Checkpointer("/proc/nope", {"x": torch.ones(4)}),
    ):
        pass


def test_training_goes_on_without_the_store(runtime: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    training = Training()
    with ckptmgr.Checkpointer(root, training.state, every=1, keep=2) as ckpt:
        training.train_one_step(1)
        assert ckpt.save(1).committed(30)
        root.rename(tmp_path / "away")
        for step in range(2, 12):
            training.train_one_step(step)
            ckpt.step(step)
        assert ckpt.stats.failures == 0
        sealed = ckpt.stats.snapshots
        (tmp_path / "away").rename(root)
        training.train_one_step(12)
        assert ckpt.save(12).committed(60)
    assert 2 < sealed < 12, "two slots were filled, then it waited for the store"
    assert committed(str(root))[0] == "1.12"
    assert training.digest() == uninterrupted(12).digest(), "training was not disturbed"


def test_leaving_with_a_dead_store_is_bounded_and_loses_nothing(
    runtime: Path, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    state = {"x": torch.arange(1000.0)}
    with (
        pytest.warns(RuntimeWarning, match="goes on trying"),
        ckptmgr.Checkpointer(root, state, every=1, drain_timeout=0.5) as ckpt,
    ):
        assert ckpt.save(1).committed(30)
        root.rename(tmp_path / "away")
        ckpt.step(2)
    (tmp_path / "away").rename(root)
    command("drain", "--timeout", "60")
    assert committed(str(root)) == ["1.2", "1.1"]


def test_a_killed_daemon_is_replaced_and_adopts(runtime: Path, store_url: str) -> None:
    training = Training()
    with ckptmgr.Checkpointer(store_url, training.state, every=1) as ckpt:
        for step in range(1, 31):
            training.train_one_step(step)
            ckpt.step(step)
            if step in (10, 20):
                kill_daemon(runtime)
        assert ckpt.save(31).committed(60)
        assert ckpt.stats.failures == 0
    assert committed(store_url)[0] == "1.31"


def test_a_state_that_grows_moves_to_a_larger_buffer(runtime: Path, store_url: str) -> None:
    state: dict[str, Any] = {"x": torch.ones(1000), "more": []}
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        ckpt.save(1).committed(30)
        state["more"] = [torch.full((500_000,), float(n)) for n in range(4)]
        ckpt.save(2).committed(30)
        state["more"].append("y" * 3_000_000)
        assert ckpt.save(3).committed(30)
    found = ckptmgr.load(store_url)
    assert [t.sum().item() for t in found["more"][:4]] == [0.0, 5e5, 1e6, 1.5e6]
    assert len(found["more"][4]) == 3_000_000


def test_a_removed_buffer_is_replaced(runtime: Path, store_url: str) -> None:
    state = {"x": torch.ones(1000)}
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        ckpt.save(1).committed(30)
        for path in (runtime / "buffers").iterdir():
            path.unlink()
        kill_daemon(runtime)
        last = first_committed(ckpt, 2)
    assert committed(store_url) == [f"1.{last}", "1.1"]


def test_an_emptied_store_starts_anew_and_says_so(runtime: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    run(str(root), 12, crash=True)
    subprocess.run(["rm", "-rf", str(root)], check=True)
    training = Training()
    with (
        pytest.warns(RuntimeWarning, match="the store was emptied"),
        ckptmgr.Checkpointer(root, training.state, every=5) as ckpt,
    ):
        assert ckpt.restore() == 0
        for step in range(1, 7):
            training.train_one_step(step)
            ckpt.step(step)
    assert committed(str(root)) == ["1.5"]


def test_damage_falls_back_and_says_so(runtime: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    run(str(root), 12, every=5)
    wipe(runtime)
    for pack in (root / "data/00000001/000000000010").rglob("*.pack"):
        blob = bytearray(pack.read_bytes())
        blob[5000] ^= 1
        pack.write_bytes(blob)
    training = Training()
    with ckptmgr.Checkpointer(root, training.state) as ckpt:
        with pytest.warns(RuntimeWarning, match="fell back to step 5"):
            assert ckpt.restore() == 5
        assert ckpt.restored is not None
        assert ckpt.restored.skipped[0][0] == "1.10"
    assert training.digest() == uninterrupted(5).digest()


@pytest.fixture
def small_runtime(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory on a tmpfs of 4 MiB, as containers have one of 64."""
    needs_root()
    small = runtime / "small"
    small.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "t", small], check=True)
    monkeypatch.setenv("CKPTMGR_RUNTIME_DIR", str(small))
    yield small
    end_processes_of(small)
    subprocess.run(["umount", "--lazy", small], check=True)


def test_too_little_shared_memory_is_told_and_does_not_fail_the_job(
    small_runtime: Path, store_url: str
) -> None:
    state = {"x": torch.arange(4_000_000.0)}
    with pytest.warns(RuntimeWarning, match="shm-size"):
        ckpt = ckptmgr.Checkpointer(store_url, state, every=None).__enter__()
    for step in (1, 2, 3):
        assert ckpt.save(step).committed(60)
    ckpt.__exit__(CrashError, CrashError(), None)
    with pytest.warns(RuntimeWarning, match="shm-size"):
        found = ckptmgr.Checkpointer(store_url, {"x": torch.zeros(4_000_000), "y": [torch.ones(1)]})
        found.__enter__()
    found.__exit__(None, None, None)
    state["x"].zero_()
    with ckptmgr.Checkpointer(store_url, state) as again:
        assert again.restore() == 3
        assert again.restored is not None
        assert again.restored.source == "memory"
        kill_daemon(small_runtime)
        with pytest.warns(RuntimeWarning, match="shm-size"):
            last = first_committed(again, 4)
    assert torch.equal(state["x"], torch.arange(4_000_000.0))
    assert committed(store_url)[0].endswith(f".{last}")


def test_too_little_memory_at_all_is_an_error_with_a_way_out(
    small_runtime: Path, store_url: str
) -> None:
    huge = torch.empty(1, dtype=torch.uint8).expand(1 << 42)
    with pytest.raises(HostMemoryFullError, match="hint: Enlarge") as caught:
        ckptmgr.Checkpointer(store_url, {"x": huge}).__enter__()
    assert isinstance(caught.value, HostMemoryError)


def test_memory_is_freed_after_a_clean_end_and_kept_after_a_crash(
    runtime: Path, store_url: str
) -> None:
    run(store_url, 6, crash=True)
    assert list((runtime / "buffers").iterdir())
    run(store_url, 12)
    deadline = time.monotonic() + 30
    while list((runtime / "buffers").iterdir()):
        assert time.monotonic() < deadline, "the buffer of a finished job was not freed"
        time.sleep(0.05)


def test_a_commit_in_an_emptied_store_is_not_taken_for_one_in_the_new(
    runtime: Path, tmp_path: Path
) -> None:
    """Attempts and steps are numbered anew; the daemon that is still there remembers the old."""
    root = tmp_path / "store"
    for _ in range(2):
        state = {"x": torch.ones(500_000)}
        ckpt = ckptmgr.Checkpointer(root, state, every=None)
        ckpt.__enter__()
        for step in (1, 2, 3):
            assert ckpt.save(step).committed(30)
            assert f"1.{step}" in committed(str(root))
        with contextlib.suppress(CrashError):
            ckpt.__exit__(CrashError, CrashError(), None)
        subprocess.run(["rm", "-rf", str(root)], check=True)


def test_a_save_out_of_a_signal_handler_amid_a_save_is_refused(
    runtime: Path, store_url: str
) -> None:
    """It would write the slot that the interrupted one has begun."""
    refused = []

    class Reentrant:
        def state_dict(self) -> dict[str, Any]:
            if inside:
                with pytest.raises(UsageError, match="amid a snapshot") as caught:
                    ckpt.save(99)
                refused.append(caught)
            return {"n": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    inside = False
    with ckptmgr.Checkpointer(store_url, {"x": Reentrant()}, every=None) as ckpt:
        inside = True
        assert ckpt.save(1).committed(30)
        inside = False
    assert refused
    assert committed(store_url) == ["1.1"]
