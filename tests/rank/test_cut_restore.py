"""Ctrl-C amid a restore: whoever catches it goes on, with snapshots that are whole."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptmgr
from ckptmgr.errors import NothingToRestoreError, StateError, StateMismatchError
from ckptmgr.rank import place
from ckptmgr.rank.group import Alone, Verdict
from driven import Daemon
from interrupting import Interrupted, interrupt, signalled
from rigged import Rig


def test_a_save_after_an_interrupted_restore_is_whole(runtime: Path, store_url: str) -> None:
    state = {"x": torch.zeros(1 << 20)}
    with (
        Daemon(runtime) as daemon,
        ckptmgr.Checkpointer(store_url, state, every=None) as ckpt,
    ):
        for step in (1, 2, 3):
            state["x"].fill_(step)
            assert ckpt.save(step).committed(60)
        with daemon.stopped(), signalled(interrupt), pytest.raises(Interrupted):
            ckpt.restore(1)
        assert state["x"][0] == 3, "nothing was put back"
        state["x"].fill_(4)
        assert ckpt.save(4).committed(60)
        assert ckpt.restore(3) == 3
        assert state["x"].unique().tolist() == [3]
    assert ckptmgr.load(store_url, step=4)["x"].unique().tolist() == [4]


def test_a_second_interrupt_leaves_no_fetch_behind(runtime: Path, tmp_path: Path) -> None:
    """It cuts the release short: the next save asks for it again before it writes a slot."""
    rig = Rig(tmp_path)
    state = {"x": torch.zeros(1 << 20)}
    with (
        Daemon(runtime, environment=rig.environment()) as daemon,
        ckptmgr.Checkpointer(rig.url, state, every=None) as ckpt,
    ):
        for step in (1, 2, 3):
            state["x"].fill_(step)
            assert ckpt.save(step).committed(60)
        rig.obey(("get", "data/", "hold"))

        def fetches() -> bool:
            return rig.asked("get", "data/00000001/000000000001") > 0

        def stop_and_interrupt() -> None:
            daemon.process.send_signal(signal.SIGSTOP)
            interrupt()

        try:
            with (
                signalled(stop_and_interrupt, when=fetches, times=2),
                pytest.raises(Interrupted),
            ):
                ckpt.restore(1)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        state["x"].fill_(4)
        saved = ckpt.save(4)
        rig.obey()
        assert saved.committed(60)
        assert not daemon.events("restored")
    assert ckptmgr.load(rig.file_url, step=4)["x"].unique().tolist() == [4]


def test_what_a_cut_restore_had_decided_is_not_the_next_ones(runtime: Path, tmp_path: Path) -> None:
    """The choice was put into the store; the question for another step is another one."""
    rig = Rig(tmp_path)
    state = {"x": torch.zeros(1 << 20)}
    with Daemon(runtime, environment=rig.environment()):
        with ckptmgr.Checkpointer(rig.url, state, every=None, keep=10) as ckpt:
            for step in (1, 2, 3):
                state["x"].fill_(step)
                assert ckpt.save(step).committed(60)
        with ckptmgr.Checkpointer(rig.url, state, every=None, keep=10) as ckpt:
            rig.obey(("get", "man/00000001/000000000001", "hold"))

            def fetches() -> bool:
                return rig.asked("get", "man/00000001/000000000001") > 0

            with signalled(interrupt, when=fetches), pytest.raises(Interrupted):
                ckpt.restore(1)
            rig.obey()
            assert ckpt.restore(2) == 2
            assert state["x"].unique().tolist() == [2]


class Counting:
    """An object with code of its own. `then` is done once, amid loading."""

    def __init__(self) -> None:
        self.n = 0
        self.then: Callable[[], None] = lambda: None

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]
        then, self.then = self.then, lambda: None
        then()


class Refused(Alone):
    """Another rank's object does not take its state."""

    def agree(self, topic: str, verdict: Verdict, timeout_seconds: float) -> Verdict:
        if topic == "loaded":
            return Verdict(1, StateMismatchError.__name__, "refused its saved state", "other")
        return super().agree(topic, verdict, timeout_seconds)


@pytest.fixture
def counted(runtime: Path, store_url: str) -> Iterator[tuple[ckptmgr.Checkpointer, dict[str, Any]]]:
    """A block in which steps 1 and 2 are committed, and its state."""
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=0.0, momentum=0.9)
    state: dict[str, Any] = {"w": weight, "first": Counting(), "last": Counting(), "o": optimizer}
    with ckptmgr.Checkpointer(store_url, state, every=None) as ckpt:
        for step in (1, 2):
            set_all(state, step)
            assert ckpt.save(step).committed(60)
        yield ckpt, state


def set_all(state: dict[str, Any], step: int) -> None:
    with torch.no_grad():
        state["w"].fill_(step)
    state["first"].n = state["last"].n = step
    state["o"].state[state["w"]] = {"momentum_buffer": torch.full((4,), float(step))}
    state["o"].param_groups[0]["lr"] = float(step)


def steps_in(state: dict[str, Any]) -> set[float]:
    """The steps that the parts of the state are of."""
    (kept,) = state["o"].state.values()
    tensors = [*state["w"].tolist(), *kept["momentum_buffer"].tolist()]
    return {*tensors, state["first"].n, state["last"].n, state["o"].param_groups[0]["lr"]}


def test_what_ctrl_c_met_amid_loading_has_its_old_state(
    counted: tuple[ckptmgr.Checkpointer, dict[str, Any]],
) -> None:
    ckpt, state = counted
    for put_back in (partial(ckpt.restore, 1), partial(ckptmgr.load, ckpt._url, state, step=1)):
        state["last"].then = interrupt_by_ctrl_c
        with pytest.raises(KeyboardInterrupt):
            put_back()
        assert steps_in(state) == {2}
    assert ckpt.save(3).committed(60)
    assert ckpt.restore(1) == 1
    assert steps_in(state) == {1}


def test_what_another_rank_refuses_is_put_back_nowhere(
    counted: tuple[ckptmgr.Checkpointer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt, state = counted
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "_ranks", Refused())
        with pytest.raises(StateMismatchError, match="rank 1: other: refused"):
            ckpt.restore(1)
    assert steps_in(state) == {2}
    assert ckpt.save(3).committed(60)


def test_of_a_state_that_is_half_put_back_nothing_is_saved(
    counted: tuple[ckptmgr.Checkpointer, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt, state = counted
    with monkeypatch.context() as patch:
        patch.setattr(place, "write_all", lambda *_: interrupt_by_ctrl_c())
        with pytest.raises(KeyboardInterrupt):
            ckpt.restore(1)
    assert steps_in(state) == {1, 2}
    for use in (lambda: ckpt.step(3), lambda: ckpt.save(3)):
        with pytest.raises(StateError, match="a restore was cut short"):
            use()
    with pytest.raises(NothingToRestoreError):
        ckpt.restore(7)
    with pytest.raises(StateError, match="a restore was cut short"):
        ckpt.save(3)
    assert ckpt.restore(2) == 2
    assert steps_in(state) == {2}
    assert ckpt.save(3).committed(60)


def interrupt_by_ctrl_c() -> None:
    raise KeyboardInterrupt
