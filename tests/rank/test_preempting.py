"""A rank that is told that it will be ended: one more snapshot, or the last one before."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from training import committed

import ckptmgr
from ckptmgr.errors import UsageError
from ckptmgr.preemption import Announced
from ckptmgr.staging.control import Stated, Status
from ckptmgr.staging.launch import connect
from driven import PATIENCE_SECONDS, Daemon, events_of, until
from preemption.counted import counted


class Heard(Announced):
    """An announcement, and what comes back for it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []
        self.answered = threading.Event()

    def sealed(self, step: int) -> None:
        self.told.append(("sealed", step))

    def committed(self, step: int) -> None:
        self.told.append(("committed", step))
        self.answered.set()


def events(runtime: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in events_of(runtime / "daemon.log") if event["event"] == name]


def test_the_last_snapshot_is_sealed_when_the_loop_hears_that_it_is_to_leave(
    runtime: Path, store_url: str
) -> None:
    """Also an overlapped one, which a write into the parameters would tear from then on."""
    source = Heard()
    model = torch.nn.Linear(4096, 4096, bias=False)
    state = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    with ckptmgr.Checkpointer(
        store_url, state, every=None, preemption=source, overlap=True, max_d2h_gbps=0.1
    ) as ckpt:
        source.announce("maintenance", 600)
        until(lambda: events(runtime, "preempted"), "the notice is heard")
        handle = ckpt.step(1)
        assert handle is not None
        assert ckpt.preempted
        with torch.no_grad():
            model.weight.zero_()
        assert handle.committed()
    assert ckptmgr.load(store_url, dict(state)) == 1
    assert model.weight.abs().sum() > 0


def test_a_preempted_loop_snapshots_once_more_and_leaves(runtime: Path, store_url: str) -> None:
    source = Heard()
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=None, preemption=source) as ckpt:
        for step in range(1, 100):
            state["x"] += 1
            if step == 7:
                source.announce("maintenance", 600)
                until(lambda: events(runtime, "preempted"), "the notice is heard")
            assert (ckpt.step(step) is not None) == (step == 7)
            if ckpt.preempted:
                break
        assert source.answered.wait(PATIENCE_SECONDS)
    assert ckpt.preempted
    assert source.told == [("sealed", 7), ("committed", 7)]
    assert committed(store_url) == ["1.7"]
    until(lambda: counted(runtime) == {"signals": 1, "saves": 1}, "counted")
    (told,) = events(runtime, "preempted")
    assert (told["source"], told["seconds"], told["why"]) == ("announced", 600, "maintenance")
    (saved,) = events(runtime, "preemption_saved")
    assert saved["step"] == "1.7"
    # Left for a preemption, host memory stays for whoever comes next.
    state["x"].zero_()
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        assert ckpt.restore() == 7
        assert ckpt.restored is not None
        assert ckpt.restored.source == "memory"
        assert not ckpt.preempted
    assert state["x"].tolist() == [7, 7, 7]


def test_a_loop_that_hangs_costs_only_what_came_after_the_last_snapshot(
    runtime: Path, store_url: str
) -> None:
    source = Heard()
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=5, preemption=source) as ckpt:
        for step in range(1, 8):
            state["x"] += 1
            ckpt.step(step)
        source.announce("suspended", 1.0)
        assert source.answered.wait(PATIENCE_SECONDS), "it is told as the time ends"
        assert source.told == [("sealed", 5), ("committed", 5)]
        assert not ckpt.preempted
        assert counted(runtime) == {"signals": 1, "saves": 0}, "the loop may still come to a step"
    until(lambda: counted(runtime) == {"signals": 1, "saves": 1}, "it has ended, nothing is lost")
    assert committed(store_url) == ["1.5"]


class Failing(Heard):
    """A source whose platform can not be told."""

    def sealed(self, step: int) -> None:
        super().sealed(step)
        raise OSError("its platform does not answer")

    def committed(self, step: int) -> None:
        super().committed(step)
        raise FileNotFoundError("scontrol")


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_a_source_that_fails_keeps_no_other_from_being_told(runtime: Path, store_url: str) -> None:
    failing, source = Failing(), Heard()
    state = {"x": torch.ones(3)}
    both = [failing, source]
    with (
        pytest.warns(RuntimeWarning, match="source 'announced' failed at step 1: scontrol"),
        ckptmgr.Checkpointer(store_url, state, every=None, preemption=both) as ckpt,
    ):
        ckpt.save(1).committed(PATIENCE_SECONDS)
        failing.announce("suspended", 1.0)
        assert source.answered.wait(PATIENCE_SECONDS)
    assert source.told == failing.told == [("sealed", 1), ("committed", 1)]


def test_a_daemon_that_does_not_answer_holds_up_no_source(runtime: Path, store_url: str) -> None:
    source = Heard()
    state = {"x": torch.ones(3)}
    with Daemon(runtime) as daemon:
        with ckptmgr.Checkpointer(store_url, state, every=None, preemption=source) as ckpt:
            ckpt.save(1).committed(PATIENCE_SECONDS)
            with daemon.stopped():
                source.announce("suspended", 1.0)
                assert source.answered.wait(PATIENCE_SECONDS), "what is committed stands in memory"
            assert source.told == [("sealed", 1), ("committed", 1)]
        daemon.await_event("preemption_saved")


def test_a_last_snapshot_in_a_larger_buffer_is_answered(runtime: Path, store_url: str) -> None:
    """Its generation is less than those of the buffer before."""
    source = Heard()
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=None, preemption=source) as ckpt:
        for step in (1, 2, 3):
            assert ckpt.save(step).committed(PATIENCE_SECONDS)
        source.announce("maintenance", 600)
        until(lambda: events(runtime, "preempted"), "the notice is heard")
        state["x"] = torch.zeros(1 << 20)
        assert ckpt.step(4) is not None
        assert source.answered.wait(PATIENCE_SECONDS)
    assert source.told == [("sealed", 4), ("committed", 4)]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_daemon_that_takes_over_counts_the_save_and_not_the_signal_again(
    runtime: Path, store_url: str
) -> None:
    source = Heard()
    state = {"x": torch.ones(3)}
    with (
        Daemon(runtime) as daemon,
        ckptmgr.Checkpointer(store_url, state, every=None, preemption=source) as ckpt,
    ):
        source.announce("maintenance", 600)
        daemon.await_event("preempted")
        until(lambda: "ckptmgr preempted" not in threads(), "it has answered")
        daemon.end(signal.SIGKILL)
        daemon.await_event("attached", 2)  # to the one that the trainer has started
        ckpt.step(1)
        assert ckpt.preempted
        assert source.answered.wait(PATIENCE_SECONDS)
        until(lambda: counted(runtime) == {"signals": 0, "saves": 1}, "it was told, too")
    assert len(events(runtime, "preempted")) == 1
    (saved,) = events(runtime, "preemption_saved")
    assert saved["step"] == "1.1"


def test_a_source_that_can_not_listen_leaves_nothing_behind(runtime: Path, store_url: str) -> None:
    failures: list[BaseException] = []

    def enter() -> None:
        try:
            with ckptmgr.Checkpointer(store_url, {"x": torch.ones(3)}, preemption="signals"):
                pass
        except UsageError as error:
            failures.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(failures[0])
    with connect(runtime) as client:
        until(lambda: client.ask(Status(), Stated).state["trainers"] == 0, "nobody is attached")
