"""What a signal handler may ask of a Checkpointer, wherever it interrupts the training thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptmgr
from ckptmgr.errors import HostMemoryError, UsageError
from ckptmgr.rank.link import Link
from ckptmgr.rank.pace import OwnPace
from driven import PATIENCE_SECONDS, Daemon
from interrupting import signalled
from rigged import Rig

pytestmark = pytest.mark.timeout(2 * PATIENCE_SECONDS)
"""What is tested here is that it does not hang."""


def test_a_handler_saves_while_a_commit_is_waited_for(runtime: Path, store_url: str) -> None:
    """As the last save before a preemption does; what became of it is asked afterwards."""
    state = {"x": torch.ones(3)}
    handles = []
    with (
        Daemon(runtime) as daemon,
        ckptmgr.Checkpointer(store_url, state, every=None) as ckpt,
    ):
        assert ckpt.save(1).committed(PATIENCE_SECONDS)

        def handle() -> None:
            handles.append(ckpt.save(3))
            with pytest.raises(UsageError, match="amid another question"):
                handles[0].committed(PATIENCE_SECONDS)
            go_on.set()

        go_on = threading.Event()
        with daemon.stopped():
            second = ckpt.save(2)
            goer = threading.Thread(
                target=lambda: go_on.wait() and daemon.process.send_signal(signal.SIGCONT)
            )
            goer.start()
            with signalled(handle):
                assert second.committed(PATIENCE_SECONDS)
            goer.join()
        assert handles[0].committed(PATIENCE_SECONDS)


def test_a_handler_that_finds_no_free_slot_waits_for_one(runtime: Path, tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.obey(("put_new", "data/", "hold"))
    state = {"x": torch.ones(3)}
    with (
        Daemon(runtime, environment=rig.environment()),
        ckptmgr.Checkpointer(rig.url, state, every=None) as ckpt,
    ):
        ckpt.save(1)
        second = ckpt.save(2)
        handles = []

        def handle() -> None:
            rig.obey()
            handles.append(ckpt.save(3))

        with signalled(handle):
            assert second.committed(PATIENCE_SECONDS)
        assert handles[0].committed(PATIENCE_SECONDS)


def test_a_handler_does_not_save_a_state_that_is_half_put_back(
    runtime: Path, store_url: str
) -> None:
    state = {"x": torch.ones(3)}
    refused = []

    class Reentrant:
        def state_dict(self) -> dict[str, Any]:
            return {"n": 1}

        def load_state_dict(self, _: dict[str, Any]) -> None:
            for use in (lambda: ckpt.save(9), ckpt.restore):
                with pytest.raises(UsageError, match="amid a restore") as caught:
                    use()
                refused.append(caught)

    with ckptmgr.Checkpointer(store_url, {**state, "y": Reentrant()}, every=None) as ckpt:
        assert ckpt.save(1).committed(PATIENCE_SECONDS)
        assert ckpt.restore() == 1
        assert len(refused) == 2
        assert ckpt.save(2).committed(PATIENCE_SECONDS)


class Loss:
    """A loss whose value is waited for, as one of a GPU is: a signal comes meanwhile."""

    def item(self) -> float:
        os.kill(os.getpid(), signal.SIGUSR1)
        return 1.0


def signalled_after(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Choose a slot, and then let a signal come, the first time."""
    came = iter([False])

    def chosen(*given: Any) -> Any:
        found = choose(*given)
        if not next(came, True):
            os.kill(os.getpid(), signal.SIGUSR1)
        return found

    return chosen


@pytest.mark.parametrize("use", ["save", "step"])
@pytest.mark.parametrize("amid", ["tags", "slot"])
def test_what_a_handler_saves_is_not_overwritten_by_what_it_interrupts(
    amid: str, use: str, runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot was free when the interrupted call chose it."""
    state = {"x": torch.zeros(3)}
    handles: list[ckptmgr.SaveHandle] = []

    def handle(*_: object) -> None:
        state["x"].fill_(11)
        handles.append(ckpt.save(11))

    with ckptmgr.Checkpointer(store_url, state, every=1) as ckpt:
        assert ckpt.save(1).committed(PATIENCE_SECONDS)
        before = signal.signal(signal.SIGUSR1, handle)
        try:
            if amid == "slot":
                name = "slot_soon" if use == "save" else "slot"
                monkeypatch.setattr(OwnPace, name, signalled_after(getattr(OwnPace, name)))
            found = getattr(ckpt, use)(10, {"loss": Loss()} if amid == "tags" else None)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert found is (handles[0] if use == "save" else None)
        assert handles[0].committed(PATIENCE_SECONDS)
        assert ckpt.stats.delayed == 0
        assert ckpt.save(12).committed(PATIENCE_SECONDS)
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        assert ckpt.restore(11) == 11
        assert state["x"].tolist() == [11, 11, 11]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_not_sealed_of_a_state_that_a_handler_has_put_back(
    steps: int, runtime: Path, store_url: str
) -> None:
    """Its number is of the state before: of one that is gone, under an attempt that has ended."""
    state = {"x": torch.zeros(3)}
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        state["x"].fill_(5)
        assert ckpt.save(5).committed(PATIENCE_SECONDS)
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        if steps > 1:
            assert ckpt.save(9).committed(PATIENCE_SECONDS)
        before = signal.signal(signal.SIGUSR1, lambda *_: ckpt.restore(5) and None)
        try:
            state["x"].fill_(10)
            with pytest.raises(UsageError, match="a signal handler has restored"):
                ckpt.save(10, {"loss": Loss()})
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert state["x"].tolist() == [5, 5, 5]
        assert ckpt.save(6).committed(PATIENCE_SECONDS)
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        assert ckpt.restore() == 6


def test_a_slot_is_chosen_again_where_a_handler_has_failed_to_save(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"x": torch.zeros(3)}
    refused = []

    def handle(*_: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Link, "sealed", refuse)
            with pytest.raises(HostMemoryError):
                ckpt.save(11)

    def refuse(_: Link) -> None:
        refused.append(1)
        raise HostMemoryError("is gone", subject="inbox")

    with ckptmgr.Checkpointer(store_url, state, every=None, overlap=False) as ckpt:
        before = signal.signal(signal.SIGUSR1, handle)
        try:
            with pytest.warns(RuntimeWarning, match="is gone"):
                saved = ckpt.save(10, {"loss": Loss()})
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert refused
        assert saved.step == 10
        assert saved.committed(PATIENCE_SECONDS)
