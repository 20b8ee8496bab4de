"""What a signal handler may ask of a Checkpointer, wherever it interrupts the training thread."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptmgr
from ckptmgr.errors import UsageError
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
