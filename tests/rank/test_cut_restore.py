"""Ctrl-C amid a restore: whoever catches it goes on, with snapshots that are whole."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import ckptmgr
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
